"""Desired against actual: which cgroup is under which policy version. Sees the kernel only through the seam.

The order of the steps is what keeps a killed weir from leaving half a rule: a policy version is whole before a cgroup
uses it, programs are attached before a cgroup is enrolled, and enrolling, switching and withdrawing are one map write.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.cgroups import tree
from agent.errors import WeirError
from agent.kernel.abi import MAX_LEVEL, MAX_POLICIES, MAX_SPARE, PROGRAMS, SPARE, SUM, Flag
from agent.kernel.seam import Counters, Enrolment, Kernel, Refused, RuleName, Version
from agent.policy.compile import Tables, compile_policy
from agent.policy.model import Action, Bind, Family, Mode, Policy, Protocol, Unenforced

KEPT = Flag.BORN | Flag.RUN | Flag.PARENT
"""How a cgroup was enrolled outlives a switch of its policy."""

IN_FLIGHT = 0.05
"""Seconds in which a program that has taken a spare slot has surely written its entry: it cannot sleep."""

AS_IT_IS = Flag(0)
"""How a cgroup is enrolled that others made and that may have processes."""


def flags_of(policy: Policy) -> Flag:
    """The part of a policy that fits in one word: what is not about destinations."""
    sockets = policy.sockets
    wanted = {
        Flag.AUDIT: policy.mode is Mode.AUDIT,
        Flag.LISTEN: sockets.listen is Action.ALLOW,
        Flag.BIND_ANY: sockets.bind is Bind.ALLOW,
        Flag.BIND_EPHEMERAL: sockets.bind is Bind.EPHEMERAL,
        Flag.TRANSFER: sockets.transfer is Action.ALLOW,
        Flag.INET: Family.INET in sockets.families,
        Flag.INET6: Family.INET6 in sockets.families,
        Flag.TCP: Protocol.TCP in sockets.protocols,
        Flag.UDP: Protocol.UDP in sockets.protocols,
        Flag.WANTS_NAMES: Unenforced.NAMES in policy.unenforced(),
        Flag.WANTS_OPTIONS: Unenforced.OPTIONS in policy.unenforced(),
        Flag.WANTS_IDLE: Unenforced.IDLE in policy.unenforced(),
    }
    result = Flag(0)
    for flag, holds in wanted.items():
        if holds:
            result |= flag
    return result


@dataclass(frozen=True)
class Compiled:
    """A policy ready for the kernel. Equal policies have the same ``version.sha256``, whatever their files say else."""

    version: Version
    tables: Tables


def compiled(policy: Policy) -> Compiled:
    """Compile a policy; touches nothing.

    Raises WeirError when it is over a limit of the kernel's tables.
    """
    tables = compile_policy(policy)
    rules = tuple(RuleName(rule.name, rule.line, rule.action is Action.DENY) for rule in policy.egress)
    flags = flags_of(policy)
    digest = hashlib.sha256(repr((policy.name, flags, rules, tables)).encode()).digest()
    return Compiled(Version(policy.name, digest, flags, rules), tables)


@dataclass(frozen=True)
class Placement:
    """A cgroup, and the policy version that it shall be under. ``flags`` are the policy's.

    ``how``: BORN, RUN, PARENT or nothing. ``nested``: enrolled cgroups inside it, which are of the same container: they
    come under the same policy and count in the same slot.
    """

    cgroup: int
    version: int
    flags: Flag
    how: Flag = AS_IT_IS
    nested: tuple[int, ...] = ()


class Controller:
    """Enrols, switches and withdraws cgroups. The caller holds the lock of the place."""

    def __init__(self, kernel: Kernel, root: Path) -> None:
        self._kernel = kernel
        self._root = root

    def manage(self, parent: Path) -> None:
        """Attach the programs to a cgroup, so that everything below it can be enrolled.

        Raises WeirError when programs are attached below it: they would run twice and count twice.
        """
        attached = self._kernel.attached()
        if self.parent_of(parent, attached):
            return
        below = set(self._ids_below(parent)) & attached.keys()
        if below:
            path = tree.paths_by_id(parent)[min(below)]
            raise WeirError(
                f"weir's programs are attached below {parent} already, at {path}",
                f"They would count every byte twice. First: weir detach {path}",
            )
        self._kernel.attach(parent)

    def parent_of(self, cgroup: Path, attached: Mapping[int, frozenset[str]]) -> Path | None:
        """The nearest cgroup, itself or above, that has all programs attached (``attached``: as the kernel says)."""
        complete = [number for number, programs in attached.items() if programs == frozenset(PROGRAMS)]
        for path in (cgroup, *cgroup.parents):
            if path.is_relative_to(self._root) and tree.cgroup_id(path) in complete:
                return path
        return None

    def enrol(self, cgroup: Path, policy: Compiled, how: Flag = AS_IT_IS) -> Enrolment:
        """Put one cgroup under a policy, or switch it to another; see ``enrol_all``."""
        return self.enrol_all([cgroup], policy, how)[0]

    def enrol_all(self, cgroups: Sequence[Path], policy: Compiled, how: Flag = AS_IT_IS) -> list[Enrolment]:
        """Put cgroups under a policy, or switch them to another: one map write each.

        ``how``: BORN when they have had no process yet, RUN when they are `weir run`'s; a switch keeps them.

        Raises WeirError; each cgroup is then as it was before, or under the new policy.
        """
        for cgroup in cgroups:
            depth = tree.level(cgroup, self._root)
            if depth > MAX_LEVEL:
                raise WeirError(
                    f"{cgroup} lies {depth} levels deep; the programs find cgroups up to level {MAX_LEVEL}",
                    "Enrol one of its parents.",
                )
        numbers = [tree.cgroup_id(cgroup) for cgroup in cgroups]
        self._kernel.sweep()  # what a killed weir left behind
        version = self.install(policy)
        try:
            return self.place([Placement(number, version, policy.version.flags, how) for number in numbers])
        finally:
            self.collect()

    def close_off(self, cgroup: Path) -> None:
        """Enrol a cgroup under no policy at all: whatever in it has no enrolment of its own is refused."""
        if tree.cgroup_id(cgroup) not in self._kernel.enrolments():
            self.place([Placement(tree.cgroup_id(cgroup), 0, Flag(0), Flag.BORN)])

    def install(self, policy: Compiled) -> int:
        """Write a policy version unless the kernel has it; returns its number. ``collect`` removes what nobody uses."""
        versions = self._kernel.versions()
        for number, version in versions.items():
            if version.sha256 == policy.version.sha256:
                return number
        unused = sorted(versions.keys() - {e.policy for e in self._kernel.enrolments().values()})
        if unused and len(versions) >= MAX_POLICIES:
            self._kernel.retire(unused[0])  # kept only to name the rules of old refusals
        return self._kernel.install(policy.version, policy.tables)

    def place(self, placements: Sequence[Placement]) -> list[Enrolment]:
        """Write the entries of cgroups; those that are enrolled keep their slots and the way they were enrolled."""
        present = self._kernel.enrolments()
        free = self._free_slots(present, sum(not {p.cgroup, *p.nested} & present.keys() for p in placements))
        enrolments, entries = [], {}
        for wanted in placements:
            inside = [present[number] for number in wanted.nested if number in present]
            known = present.get(wanted.cgroup)
            slot = (known or inside[0]).slot if known or inside else next(free)
            kept = (known.flags & KEPT | wanted.how & Flag.PARENT) if known else wanted.how
            enrolment = Enrolment(slot, wanted.version, wanted.flags | kept)
            enrolments.append(enrolment)
            entries[wanted.cgroup] = enrolment
            for number in wanted.nested:
                entries[number] = Enrolment(slot, wanted.version, wanted.flags | kept & ~Flag.PARENT)
            for other in {enrolment.slot for enrolment in inside} - {slot}:
                self._kernel.mark(other, slot)
        self._kernel.enrol(entries, entries.keys() - present.keys())
        return enrolments

    def _free_slots(self, present: Mapping[int, Enrolment], wanted: int) -> Iterator[int]:
        free = self._unused(present)[:wanted]
        if len(free) < wanted:
            raise WeirError(
                f"all {self._capacity() - 1} places for cgroups are taken",
                "Detach what is no longer needed (weir status), or unload and load with --max-containers N.",
            )
        if free:
            self._kernel.clear(free)
        return iter(free)

    def _capacity(self) -> int:
        build = self._kernel.build()
        return build.capacity if build else 0

    def _unused(self, present: Mapping[int, Enrolment]) -> list[int]:
        taken = {enrolment.slot for enrolment in present.values()} | self._kernel.slots().keys()
        return [slot for slot in range(1, self._capacity()) if slot not in taken]

    def room(self) -> int:
        """How many more cgroups can be enrolled."""
        return len(self._unused(self._kernel.enrolments()))

    def stock(self, wanted: int) -> int:
        """Keep so many slots ready for cgroups that are born below a managed parent; returns how many are missing."""
        present = self._kernel.enrolments()
        used = {enrolment.slot for enrolment in present.values()}
        waiting = sum(mark == SPARE and slot not in used for slot, mark in self._kernel.slots().items())
        missing = max(0, min(wanted, MAX_SPARE) - waiting)
        fresh = self._unused(present)[:missing]
        if fresh:
            self._kernel.clear(fresh)
            self._kernel.stock(fresh)
        return missing - len(fresh)

    def take_spare(self, wanted: int) -> None:
        """Free so many of the slots that wait for cgroups not born yet: those that live come first."""
        waiting = [*self._kernel.drain()]
        for slot in waiting[:wanted]:
            self._kernel.mark(slot, 0)
        self._kernel.stock(waiting[wanted:])

    def restock(self) -> None:
        """Find slots that a killed weir marked, and that nobody has. What is born meanwhile stays with its parent."""
        waiting = self._kernel.drain()
        time.sleep(IN_FLIGHT)
        used = {enrolment.slot for enrolment in self._kernel.enrolments().values()}
        marks = self._kernel.slots()
        for slot, mark in marks.items():
            target = slot if mark == SPARE else mark
            if target not in used and (mark == SPARE or target not in marks):
                self._kernel.mark(slot, 0)
        self._kernel.stock(waiting)

    def withdraw(self, cgroup_id: int) -> None:
        """Take a cgroup from under its policy: from now on its parent's enrolment counts, if any."""
        self.withdraw_all([cgroup_id])
        self.collect()

    def withdraw_all(self, cgroup_ids: Collection[int]) -> None:
        """The same for many; a slot is free when the last cgroup that counts in it is withdrawn."""
        present = self._kernel.enrolments()
        kept = {enrolment.slot for number, enrolment in present.items() if number not in cgroup_ids}
        freed = {present[number].slot for number in cgroup_ids if number in present} - kept
        self._kernel.withdraw(cgroup_ids)
        for slot, mark in self._kernel.slots().items():
            if slot in freed or mark & ~SUM in freed:
                self._kernel.mark(slot, 0)

    def fold(self, cgroup_ids: Collection[int], into: int) -> None:
        """Withdraw cgroups that are gone; their counts go on with those of another, which is known by the same name.

        However often that happens, one slot holds all that is folded (while there is a free one to add them up in). An
        earlier fold that has failed half-way is to be swept before.
        """
        present = self._kernel.enrolments()
        if into not in present:
            self.withdraw_all(cgroup_ids)
            return
        target = present[into].slot
        used = {enrolment.slot for number, enrolment in present.items() if number not in cgroup_ids}
        slots = {present[number].slot for number in cgroup_ids if number in present}
        marks = self._kernel.slots()
        slots |= {slot for slot, mark in marks.items() if mark == target or mark in slots}
        slots -= used  # the target; and a nested cgroup's, where moving it into its container's has failed half-way
        for slot in slots:
            self._kernel.mark(slot, target)
        self._kernel.withdraw(cgroup_ids)
        if len(slots) <= 1:
            return
        free = self._unused(present)
        if not free:
            self.take_spare(1)
            free = self._unused(present)
        if free:
            self._kernel.merge(slots, free[0], target)

    def release(self, cgroup_id: int) -> None:
        """Remove the programs from a cgroup when nothing at or below it needs them."""
        path = tree.paths_by_id(self._root).get(cgroup_id)
        if path is None:
            self._kernel.sweep()
            return
        inside = {tree.cgroup_id(path), *(number for number in self._ids_below(path))}
        if cgroup_id in self._kernel.attached() and not inside & self._kernel.enrolments().keys():
            self._kernel.detach(cgroup_id)

    def _ids_below(self, path: Path) -> Iterable[int]:
        for child in tree.descendants(path):
            try:
                yield tree.cgroup_id(child)
            except WeirError:
                continue  # removed while we looked

    def collect(self, kept: Collection[int] = ()) -> None:
        """Retire policy versions that no cgroup uses, no refusal counter names, and that are not among ``kept``."""
        used = {enrolment.policy for enrolment in self._kernel.enrolments().values()}
        named = {refused.policy for refused in self._kernel.refusals()}
        for number in self._kernel.versions():
            if number not in used | named and number not in kept:
                self._kernel.retire(number)

    def totals(self, slot: int) -> tuple[Counters, dict[Refused, int]]:
        """What a slot has counted: bytes and refusals."""
        refusals = {refused: n for refused, n in self._kernel.refusals().items() if refused.slot == slot}
        return self._kernel.counters(slot), refusals
