"""The kernel in memory: an implementation of agent.kernel.seam.Kernel for tests that need no root.

It keeps what the real one keeps and refuses what would break a promise of bpf/abi.h (an AssertionError: a bug in the
caller). Each change of state is a *step*; ``stop_at`` ends the test's "process" before the step of that number, as
kill -9 would, or fails it as a full table would.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.errors import WeirError
from agent.kernel.abi import MAX_POLICIES, PROGRAMS, SPARE, SUM, Flag
from agent.kernel.reading import counting, folded
from agent.kernel.seam import NOTHING, Build, Counters, Enrolment, Event, Reading, Refused, Version, total
from agent.policy.compile import Tables


class Killed(BaseException):
    """Stands for SIGKILL: nothing that catches errors may catch it, and no clean-up is expected of anyone."""


@dataclass
class FakeKernel:
    """Everything public is state that a test may read or set. ``steps`` names the changes made so far."""

    capacity: int = 8
    steps: list[str] = field(default_factory=list)
    stop_at: int | None = None
    stop_with: type[BaseException] = Killed
    links: dict[int, set[str]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    entries: dict[int, Enrolment] = field(default_factory=dict)
    installed: dict[int, tuple[Version, Tables]] = field(default_factory=dict)
    half_installed: set[int] = field(default_factory=set)
    counted: dict[int, Counters] = field(default_factory=dict)
    refused: dict[Refused, int] = field(default_factory=dict)
    marks: dict[int, int] = field(default_factory=dict)
    queue: list[int] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    waiting: list[Event] = field(default_factory=list)
    next_policy: int = 1

    def _step(self, what: str) -> None:
        if self.stop_at == len(self.steps):
            raise self.stop_with(f"stopped before {what}")
        self.steps.append(what)

    def build(self) -> Build | None:
        """A finished load, always."""
        return Build(build=1, has_retval=True, capacity=self.capacity)

    def max_capacity(self) -> Mapping[str, tuple[int, int]]:
        """Entries and capacity of the two tables that are limited here."""
        return {"cgroups": (len(self.entries), self.capacity), "policies": (len(self.installed), MAX_POLICIES)}

    def attached(self) -> Mapping[int, frozenset[str]]:
        """The programs of each living cgroup that has some."""
        return {number: frozenset(names) for number, names in self.links.items() if names and number not in self.gone}

    def attach(self, cgroup: Path) -> None:
        """One step for each program that is not attached yet."""
        links = self.links.setdefault(os.stat(cgroup).st_ino, set())
        for name in PROGRAMS:
            if name not in links:
                self._step(f"link {name}")
                links.add(name)

    def detach(self, cgroup_id: int) -> None:
        """One step for each program."""
        for name in sorted(self.links.get(cgroup_id, ())):
            self._step(f"unlink {name}")
            self.links[cgroup_id].discard(name)
        self.links.pop(cgroup_id, None)

    def sweep(self) -> None:
        """Forget links of cgroups that are gone, half-written versions, and what has been added up."""
        for number in self.gone & self.links.keys():
            self.detach(number)
        for number in sorted(self.half_installed):
            self._step(f"remove the rest of version {number}")
            self.half_installed.discard(number)
        self.sweep_sums()

    def enrolments(self) -> Mapping[int, Enrolment]:
        """A copy: the kernel's table does not change under the reader's hands here."""
        return dict(self.entries)

    def enrol(self, entries: Mapping[int, Enrolment], fresh: Collection[int] = ()) -> None:
        """One write each."""
        for number, enrolment in entries.items():
            assert enrolment.policy == 0 or enrolment.policy in self.installed, (
                "enrolled under a version that is not there"
            )
            assert 0 < enrolment.slot < self.capacity
            self._step(f"enrol {enrolment.policy}")
            known = self.entries.get(number)
            self.entries[number] = enrolment._replace(slot=known.slot) if known and number in fresh else enrolment

    def withdraw(self, cgroup_ids: Collection[int]) -> None:
        """One removal each; a cgroup without an entry is no error."""
        for number in cgroup_ids:
            self._step("withdraw")
            self.entries.pop(number, None)
            self.names.pop(number, None)

    def versions(self) -> Mapping[int, Version]:
        """The versions that are whole."""
        return {number: version for number, (version, _) in self.installed.items()}

    def install(self, version: Version, tables: Tables) -> int:
        """Three steps: the number is taken, the tables are written, the version is named."""
        self._step("take a number")
        number, self.next_policy = self.next_policy, self.next_policy + 1
        if len(self.installed) >= MAX_POLICIES:
            raise WeirError("the table of policies is full", "Retire some.")
        self._step("write tables")
        self.half_installed.add(number)
        self._step("name the version")
        self.half_installed.discard(number)
        self.installed[number] = (version, tables)
        return number

    def retire(self, number: int) -> None:
        """Two steps: the version is unnamed, then its tables go."""
        assert all(entry.policy != number for entry in self.entries.values()), "retired a version in use"
        self._step(f"unname {number}")
        if self.installed.pop(number, None):
            self.half_installed.add(number)
        self._step(f"remove tables of {number}")
        self.half_installed.discard(number)

    def counters(self, slot: int) -> Counters:
        """What a test has put there, or zeros."""
        return self.counted.get(slot, NOTHING)

    def refusals(self) -> Mapping[Refused, int]:
        """Every refusal counter."""
        return dict(self.refused)

    def read(self) -> Reading:
        """Everything that a test has put there; folded slots added to those that they count for."""
        used = {entry.slot for entry in self.entries.values()}
        into = counting(self.marks, used)
        counted = {slot: self.counters(slot) for slot in used | into.keys()}
        refusals: dict[Refused, int] = {}
        for refused, count in self.refused.items():
            owner = replace(refused, slot=into.get(refused.slot, refused.slot))
            refusals[owner] = refusals.get(owner, 0) + count
        return Reading(dict(self.entries), folded(counted, into), refusals, self.versions())

    def slots(self) -> Mapping[int, int]:
        """The marks."""
        return dict(self.marks)

    def mark(self, slot: int, mark: int) -> None:
        """One write."""
        self._step(f"mark {slot}")
        self.marks.pop(slot, None)
        if mark:
            self.marks[slot] = mark

    def merge(self, slots: Collection[int], fresh: int, target: int) -> None:
        """The sum, unseen; the mark that brings it; the clearing."""
        used = {entry.slot for entry in self.entries.values()}
        assert not {*slots, fresh} & used, "merged the counters of a cgroup"
        assert fresh not in self.marks
        self.clear([fresh])
        self._step(f"sum {slots}")
        self.counted[fresh] = total([self.counters(slot) for slot in slots])
        for refused in [refused for refused in self.refused if refused.slot in slots]:
            there = replace(refused, slot=fresh)
            self.refused[there] = self.refused.get(there, 0) + self.refused[refused]
        self.mark(fresh, SUM | target)
        self.sweep_sums()

    def sweep_sums(self) -> None:
        """Slot by slot."""
        for slot, mark in [*self.marks.items()]:
            if mark != SPARE and mark & SUM:
                self.clear([other for other, mark_ in self.marks.items() if mark_ == mark & ~SUM])
                self.mark(slot, mark & ~SUM)

    def stock(self, slots: Collection[int]) -> None:
        """Two steps each: the mark, then the queue."""
        for slot in slots:
            self.mark(slot, SPARE)
            self._step(f"push {slot}")
            self.queue.append(slot)

    def drain(self) -> Collection[int]:
        """The whole queue at once."""
        taken, self.queue = self.queue, []
        return taken

    def born(self, cgroup_id: int, parent: int) -> None:
        """What the programs do at the first socket of a cgroup below a managed parent."""
        above = self.entries[parent]
        if self.queue and above.flags & Flag.PARENT:
            flags = above.flags & ~Flag.PARENT | Flag.BORN
            self.entries[cgroup_id] = Enrolment(self.queue.pop(0), above.policy, flags)

    def label(self, cgroup_id: int, text: str) -> None:
        """One write."""
        self._step("label")
        self.names.pop(cgroup_id, None)
        if text:
            self.names[cgroup_id] = text

    def labels(self) -> Mapping[int, str]:
        """What was labelled."""
        return dict(self.names)

    def clear(self, slots: Collection[int]) -> None:
        """Zero slots, drop their refusal counters and marks."""
        for slot in slots:
            assert slot not in {entry.slot for entry in self.entries.values()}, "cleared the counters of a cgroup"
            self._step(f"clear {slot}")
            self.counted.pop(slot, None)
            self.marks.pop(slot, None)
            self.refused = {refused: n for refused, n in self.refused.items() if refused.slot != slot}

    def events(self, milliseconds: int) -> Sequence[Event]:
        """What a test has put there; never waits."""
        taken, self.waiting = self.waiting, []
        return taken
