"""Desired against actual, for the whole node: what is enrolled, under which policy, what is gone and may be forgotten.

The controller's order keeps a killed agent from leaving half a rule; here only what differs is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import PurePosixPath

from agent.cgroups import roots
from agent.cgroups.containers import Kind
from agent.cgroups.parents import Parents
from agent.cgroups.watch import Changes
from agent.controller import Controller, Placement
from agent.errors import WeirError
from agent.kernel.abi import MAX_SPARE, Flag
from agent.kernel.seam import Enrolment, Kernel
from agent.node import own
from agent.node.choose import Choice, Why
from agent.node.compiling import Loaded
from agent.node.filters import Processes
from agent.node.gone import Gone
from agent.node.labels import Labels
from agent.node.log import log
from agent.node.members import Member, Namer, members
from agent.node.others import Others
from agent.node.rows import layers, row, words
from agent.node.state import Row
from agent.node.wanted import different
from agent.place import Place

SPARE_SHARE = 4
"""A quarter of all slots, at most, waits for containers that are born while nobody looks."""

LOST = "no readable file has the policy {} now; the version that an earlier agent put in force stays"


class Reconciler:
    """Holds what was found and what was done. Not for use by several threads."""

    def __init__(
        self, place: Place, kernel: Kernel, patterns: Iterable[roots.Pattern], retain: float, namer: Namer
    ) -> None:
        self._place = place
        self._kernel = kernel
        self._controller = Controller(kernel, place.root)
        self._patterns = tuple(patterns)
        self._namer = namer
        self._parents = Parents(place.root)
        self._gone = Gone(kernel, self._controller, namer, retain)
        self._others = Others(place, self._controller, self._gone)
        self._own: int | None = None
        self._members: dict[int, Member] = {}
        self._basis: object = None
        self._shown: dict[int, tuple[Member, Row]] = {}
        self._at: dict[PurePosixPath, Member] = {}
        self._labels = Labels(kernel)
        self.processes = Processes(place.root)
        self.roots: tuple[PurePosixPath, ...] = ()
        self.troubles: tuple[str, ...] = ()

    def adopt(self) -> None:
        """Pick up what an earlier agent left: names of cgroups, slots that it had marked and that nobody has."""
        with self._place.locked():
            self._kernel.sweep()
            self._controller.restock()
            self._labels.adopt()

    def follow(self, changes: Changes) -> None:
        """Births and deaths for the next look."""
        self._parents.follow(changes)

    def look(self, policies: Mapping[str, Loaded], default: str, *, full: bool, incomplete: bool = False) -> None:
        """Look at the tree and put everything in it where it belongs; ``troubles`` says what could not be done.

        ``full``: the whole tree, and also what changes without a notification (processes, cgroups outside the managed
        parents). Else only what ``follow`` was told has changed in the tree since the last look.
        ``incomplete``: some policies could not be read; what an earlier agent put under one of them stays under it.
        Raises WeirError when the kernel's tables cannot be read or written at all.
        """
        troubles: list[str] = []
        if full:
            self._parents.forget()
        found = roots.find(self._place.root, self._patterns)
        self.roots = found.found
        if not found.found:
            wanted = ", ".join("/".join(pattern) for pattern in self._patterns)
            troubles.append(f"There is no managed parent yet: no cgroup matches {wanted}.")
        troubles += [f"/{inner} lies in /{outer} and is managed with it." for inner, outer in found.covered.items()]
        with self._place.locked():
            for root in found.found:
                with _noting(troubles):
                    self._controller.manage(self._place.root / root)
            # Once for the look: what comes in meanwhile enrols itself, and the controller looks again before it writes.
            present = self._kernel.enrolments()
            basis = (tuple(policies.items()), default, self._namer.answer, incomplete)  # in their order, which decides
            self._take(policies, default, present, incomplete=incomplete, settled=basis == self._basis and not full)
            self._basis = basis
            with _noting(troubles):
                self._gone.name()
            self._others.settle(present, self._members, self.roots, self._labels.earlier, full=full)
            self._enrol({**policies, own.NAME: own.POLICY}, present, troubles, full=full)
            with _noting(troubles):
                self._gone.forget(self._at)
            self._stock(troubles)
        self.processes.greet(self._members)
        if full:
            self.processes.look(self._members.values())
        self.troubles = tuple(troubles)

    def _take(
        self,
        policies: Mapping[str, Loaded],
        default: str,
        present: Mapping[int, Enrolment],
        *,
        incomplete: bool,
        settled: bool,
    ) -> None:
        """Find the members anew; those that are not there any more are gone."""
        current = self._find(policies, default, settled=settled)
        if incomplete:
            current |= self._under_what_is_lost(current, present, policies)
        if not self._members:
            self._own = own.cgroup(self._place.root, current.values())
        if self._own in current:
            mine, before = replace(current[self._own], choice=own.CHOICE), self._members.get(self._own)
            current[self._own] = before if before == mine else mine
        self._gone.back(current)
        for number, member in self._members.items():
            if number not in current:
                self._is_gone(member, present)
        for number, member in current.items():
            before = self._members.get(number)
            if before is not member and member.identity and member.identity.kind is not Kind.POD:
                _tell(member, before)
        self._members = current
        self._at = {member.path: member for member in current.values()}

    def _find(self, policies: Mapping[str, Loaded], default: str, *, settled: bool) -> dict[int, Member]:
        choices = [(name, loaded.selector) for name, loaded in policies.items()]
        found = (
            members(self._parents.below(root), root, self._namer, choices, default, self._members, settled=settled)
            for root in self.roots
        )
        return {member.cgroup: member for below in found for member in below}

    def _under_what_is_lost(
        self, current: Mapping[int, Member], present: Mapping[int, Enrolment], policies: Mapping[str, Loaded]
    ) -> dict[int, Member]:
        """Members that are under a policy which is in no readable file any more: an agent that starts then has no other."""
        names = {number: version.name for number, version in self._kernel.versions().items()}
        lost = {number: names.get(present[number].policy, "") for number in current if number in present}
        return {
            number: replace(current[number], choice=Choice(name, Why.DEFAULT, LOST.format(name)))
            for number, name in lost.items()
            if name and name not in policies and name != own.NAME
        }

    def _is_gone(self, member: Member, present: Mapping[int, Enrolment]) -> None:
        inside = self._others.inside().get(member.cgroup, ())
        last = row(member, present, inside, self.processes.of(member.cgroup), hooks=False)
        if last.cgroup_ids:
            self._gone.add(member, last)
        self._others.forget(last.cgroup_ids)

    def _enrol(
        self, policies: Mapping[str, Loaded], present: Mapping[int, Enrolment], troubles: list[str], *, full: bool
    ) -> None:
        versions: dict[str, tuple[int, Flag]] = {}
        for name in dict.fromkeys(member.choice.policy for member in self._members.values()):  # the parents' first
            if name not in policies:
                continue  # as ``_under_what_is_lost`` says
            with _noting(troubles):
                compiled = policies[name].compiled
                versions[name] = (self._controller.install(compiled), compiled.version.flags)
        placements, switched = different(self._at, versions, self._others.inside(), present), False
        if placements:
            self._place_all(placements, present, troubles)
            switched = any(one.cgroup in present for one in placements)
            present = self._kernel.enrolments()
        if full or switched:
            self._controller.collect(kept=[number for number, _ in versions.values()])
        self._labels.write(self._members, present, troubles)

    def _place_all(self, placements: list[Placement], present: Mapping[int, Enrolment], troubles: list[str]) -> None:
        """As many as there is room for, parents first; what is left out is under its parent's policy and counts with it."""
        fresh = [one for one in placements if not {one.cgroup, *one.nested} & present.keys()]
        room = self._controller.room() if fresh else 0
        if len(fresh) > room:
            self._gone.make_room(len(fresh) - room)
            room = self._controller.room()
        if len(fresh) > room:
            self._controller.take_spare(len(fresh) - room)
            room = self._controller.room()
        left_out = {one.cgroup for one in fresh[: max(0, len(fresh) - room)]}
        if left_out:
            troubles.append(
                f"{len(left_out)} cgroups have no place of their own: they are under their parent's policy and count with "
                "it. Load with a larger --max-containers."
            )
        with _noting(troubles):
            self._controller.place([one for one in placements if one.cgroup not in left_out])

    def _stock(self, troubles: list[str]) -> None:
        build = self._kernel.build()
        wanted = min(MAX_SPARE, (build.capacity if build else 0) // SPARE_SHARE)
        with _noting(troubles):
            missing = self._controller.stock(wanted)
            if missing:
                self._gone.make_room(missing)
                self._controller.stock(wanted)

    @property
    def is_detached(self) -> bool:
        """Whether a managed parent lacks a program: somebody has removed a link. It costs a third of a millisecond each."""
        attached = self._kernel.attached()
        return not all(self._is_attached(root, attached) for root in self.roots)

    def rows(self) -> tuple[Row, ...]:
        """Everything that is or was enrolled and still has counters."""
        present, attached = self._kernel.enrolments(), self._kernel.attached()
        uncovered = [
            root
            for root in self.roots
            if root not in self._at or self._at[root].cgroup not in present or not self._is_attached(root, attached)
        ]
        inside = self._others.inside()
        shown = {}
        for number, member in self._members.items():
            hooks = not any(member.path.is_relative_to(root) for root in uncovered)
            of, before = self._shown.get(number, (None, None))
            filters, nested = self.processes.of(number), inside.get(number, ())
            made = row(member, present, nested, filters, hooks=hooks, before=before if of is member else None)
            shown[number] = (member, made)
        self._shown = shown
        names = {number: version.name for number, version in self._kernel.versions().items()}
        outside = []
        for number, path in self._others.elsewhere.items():
            if number in present:
                parent = self._is_attached(path, attached)
                policy = names.get(present[number].policy, "")
                outside.append(Row(f"/{path}", (number,), policy=policy, layers=layers(parent, False)))
        return (*(made for _, made in shown.values()), *outside, *self._gone.rows())

    def _is_attached(self, root: PurePosixPath, attached: Mapping[int, frozenset[str]]) -> bool:
        with suppress(WeirError):
            return self._controller.parent_of(self._place.root / root, attached) is not None
        return False


def _tell(member: Member, before: Member | None) -> None:
    """Log a container that is new, and one that is now called something else or under another policy."""
    said = words(member)
    if before is None or said != words(before):
        log.info("found" if before is None else "changed", cgroup=f"/{member.path}", **said)
    if member.choice.problem and (before is None or before.choice.problem != member.choice.problem):
        who = "/".join(filter(None, (member.names.namespace, member.names.pod, member.names.container)))
        log.warning(
            f"{who}: {member.choice.problem}", cgroup=f"/{member.path}"
        )  # one message each: equal ones are held back


@contextmanager
def _noting(troubles: list[str]) -> Iterator[None]:
    """Goes on after a WeirError, and keeps its sentence."""
    try:
        yield
    except WeirError as e:
        troubles.append(e.message)
