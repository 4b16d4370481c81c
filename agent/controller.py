"""Desired against actual: which cgroup is under which policy version. Sees the kernel only through the seam.

The order of the steps is what keeps a killed weir from leaving half a rule: a policy version is whole before a cgroup
uses it, programs are attached before a cgroup is enrolled, and enrolling, switching and withdrawing are one map write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.cgroups import tree
from agent.errors import WeirError
from agent.kernel.abi import MAX_LEVEL, MAX_POLICIES, PROGRAMS, Flag
from agent.kernel.seam import Counters, Enrolment, Kernel, Refused, RuleName, Version
from agent.policy.compile import Tables, compile_policy
from agent.policy.model import Action, Bind, Family, Mode, Policy, Protocol, Unenforced

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
        version = self._install(policy)
        try:
            return self._enrol_numbers(numbers, version, policy.version.flags, how)
        finally:
            self.collect()

    def close_off(self, cgroup: Path) -> None:
        """Enrol a cgroup under no policy at all: whatever in it has no enrolment of its own is refused."""
        if tree.cgroup_id(cgroup) not in self._kernel.enrolments():
            self._enrol_numbers([tree.cgroup_id(cgroup)], 0, Flag(0), Flag.BORN)

    def _install(self, policy: Compiled) -> int:
        versions = self._kernel.versions()
        for number, version in versions.items():
            if version.sha256 == policy.version.sha256:
                return number
        unused = sorted(versions.keys() - {e.policy for e in self._kernel.enrolments().values()})
        if unused and len(versions) >= MAX_POLICIES:
            self._kernel.retire(unused[0])  # kept only to name the rules of old refusals
        return self._kernel.install(policy.version, policy.tables)

    def _enrol_numbers(self, cgroup_ids: Sequence[int], version: int, flags: Flag, how: Flag) -> list[Enrolment]:
        present = self._kernel.enrolments()
        free = self._free_slots(present, sum(number not in present for number in cgroup_ids))
        enrolments = []
        for number in cgroup_ids:
            known = present.get(number)
            kept = (known.flags if known else how) & (Flag.BORN | Flag.RUN)
            enrolments.append(Enrolment(known.slot if known else next(free), version, flags | kept))
        for number, enrolment in zip(cgroup_ids, enrolments, strict=True):
            self._kernel.enrol(number, enrolment)
        return enrolments

    def _free_slots(self, present: Mapping[int, Enrolment], wanted: int) -> Iterator[int]:
        build = self._kernel.build()
        capacity = build.capacity if build else 0
        used = {enrolment.slot for enrolment in present.values()}
        free = [slot for slot in range(1, capacity) if slot not in used][:wanted]
        if len(free) < wanted:
            raise WeirError(
                f"all {capacity - 1} places for cgroups are taken",
                "Detach what is no longer needed (weir status), or unload and load with --max-containers N.",
            )
        for slot in free:
            self._kernel.clear(slot)
        return iter(free)

    def withdraw(self, cgroup_id: int) -> None:
        """Take a cgroup from under its policy: from now on its parent's enrolment counts, if any."""
        self._kernel.withdraw(cgroup_id)
        self.collect()

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

    def collect(self) -> None:
        """Retire policy versions that no cgroup uses and no refusal counter names."""
        used = {enrolment.policy for enrolment in self._kernel.enrolments().values()}
        named = {refused.policy for refused in self._kernel.refusals()}
        for number in self._kernel.versions():
            if number not in used | named:
                self._kernel.retire(number)

    def totals(self, slot: int) -> tuple[Counters, dict[Refused, int]]:
        """What a slot has counted: bytes and refusals."""
        refusals = {refused: n for refused, n in self._kernel.refusals().items() if refused.slot == slot}
        return self._kernel.counters(slot), refusals
