"""The live kernel: weir's pinned maps, programs and links, through libbpf. Never imports bcc."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.errors import WeirError
from agent.kernel import abi, libbpf, reading
from agent.kernel.links import Links, opened
from agent.kernel.pins import Pins, explained
from agent.kernel.seam import Build, Counters, Enrolment, Event, Reading, Refused, RuleName, Version
from agent.kernel.tables import fill, rules
from agent.policy.compile import Tables

ZERO = c.c_uint32(0)


class PinnedKernel:
    """The pins below one directory. Opens maps when they are needed; ``close`` closes them."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._links = Links(pins)
        self._maps: dict[str, int] = {}
        self._ring: libbpf.RingBuffer | None = None
        self._cpus = 0
        self._inode = 0
        self._versions: dict[int, Version] = {}  # they never change, and their numbers are never used again

    def close(self) -> None:
        """Close what is open; everything stays pinned."""
        if self._ring:
            self._ring.close()
            self._ring = None
        for fd in self._maps.values():
            os.close(fd)
        self._maps.clear()
        self._versions.clear()

    def _map(self, name: str) -> int:
        if name not in self._maps:
            with explained(f"open weir's map {name}"):
                self._maps[name] = libbpf.obj_get(self._pins.maps / name)
        return self._maps[name]

    def is_loaded(self) -> bool:
        """Whether a load has been finished here."""
        return self.build() is not None

    def _reopen(self) -> None:
        """Let go of maps that were unloaded and loaded anew meanwhile. Maps whose pins are gone altogether stay open."""
        try:
            inode = (self._pins.maps / "config").stat().st_ino
        except OSError:
            return
        if inode != self._inode:
            self.close()
            self._inode = inode

    def build(self) -> Build | None:
        """What is loaded, None when nothing (or not all) is."""
        self._reopen()
        pins = [self._pins.maps / "config", *(self._pins.programs / name for name in abi.PROGRAMS)]
        if not all(self._is_there(pin) for pin in pins):
            return None
        config = self._config()
        if not config.build:
            return None
        return Build(config.build, bool(config.has_retval), libbpf.map_info(self._map("cgroups")).max_entries)

    def _is_there(self, pin: Path) -> bool:
        """Not Path.exists: that answers False to those who may not look, in some versions of Python."""
        with explained(f"look into {self._pins.root}"):
            try:
                pin.stat()
            except FileNotFoundError:
                return False
            return True

    def _config(self) -> abi.Config:
        config = abi.Config()
        with explained("read weir's configuration map"):
            libbpf.lookup(self._map("config"), ZERO, config)
        return config

    def begin(self, build: int, has_retval: bool, secret: int) -> None:
        """Record a finished load. The secret and the counters of an earlier one stay."""
        config = self._config()
        config.abi, config.build, config.has_retval = abi.ABI, build, has_retval
        config.secret = config.secret or secret
        config.generation = config.generation or 1
        config.next_policy = config.next_policy or 1
        self._write_config(config)

    def _write_config(self, config: abi.Config) -> None:
        with explained("write weir's configuration map"):
            libbpf.update(self._map("config"), ZERO, config)

    def max_capacity(self) -> Mapping[str, tuple[int, int]]:
        """Per map that can fill up: (entries, capacity)."""
        key_types = {"cgroups": c.c_uint64, "refusals": abi.Refusal, "policies": c.c_uint32}
        return {
            name: (sum(1 for _ in libbpf.keys(self._map(name), key)), libbpf.map_info(self._map(name)).max_entries)
            for name, key in key_types.items()
        }

    def attached(self) -> Mapping[int, frozenset[str]]:
        """Per cgroup id with programs attached: their names. A cgroup that is gone is not listed."""
        return self._links.attached()

    def attach(self, cgroup: Path) -> None:
        """Attach every program to a cgroup; those that are attached stay."""
        self._links.attach(cgroup)

    def detach(self, cgroup_id: int) -> None:
        """Remove weir's programs from a cgroup."""
        self._links.detach(cgroup_id)

    def sweep(self) -> None:
        """Remove the pins of links whose cgroup is gone, and what a killed ``install`` or ``enrol`` left."""
        if self._config().generation & abi.UNSETTLED:
            with self._switching():
                pass
        self._links.sweep()
        known = self._numbers()
        left = {int(pin.name) for pin in self._pins.rules.iterdir()}
        for name in ("addresses", "clauses"):
            left |= {key.value for key in libbpf.keys(self._map(name), c.c_uint32)}
        for number in left - known:
            self.retire(number)

    def enrolments(self) -> Mapping[int, Enrolment]:
        """Per cgroup id: its entry."""
        with explained("read the enrolments"):
            return reading.enrolments(self._map("cgroups"))

    def enrol(self, entries: Mapping[int, Enrolment], fresh: Collection[int] = ()) -> None:
        """Write cgroups' entries: each takes effect for the next call and packet.

        ``fresh`` are those that had none when their slots were chosen: one that has made its first socket meanwhile has
        enrolled itself, and keeps the slot that it counts in.
        """
        with self._switching() as generation:
            for number, enrolment in entries.items():
                with explained(f"enrol cgroup {number}"):
                    while not self._write_entry(number, enrolment, generation, number in fresh):
                        pass

    def _write_entry(self, number: int, enrolment: Enrolment, generation: int, fresh: bool) -> bool:
        """False when an entry appeared between looking and writing."""
        cgroups, key, entry = self._map("cgroups"), c.c_uint64(number), abi.Enrolled()
        present = libbpf.lookup(cgroups, key, entry)
        if not present:
            entry.since = generation
        if not (present and fresh):
            entry.slot = enrolment.slot
        entry.policy, entry.flags = enrolment.policy, enrolment.flags
        try:
            libbpf.update(cgroups, key, entry, libbpf.BPF_ANY if present else libbpf.BPF_NOEXIST)
        except FileExistsError:
            return False
        return True

    def withdraw(self, cgroup_ids: Collection[int]) -> None:
        """Remove cgroups' entries and labels."""
        with self._switching():
            for number in cgroup_ids:
                with explained(f"withdraw cgroup {number}"):
                    libbpf.delete(self._map("cgroups"), c.c_uint64(number))
                    libbpf.delete(self._map("labels"), c.c_uint64(number))

    @contextmanager
    def _switching(self) -> Iterator[int]:
        """Nothing that sockets remember of their owners counts from here on; yields the generation that comes after."""
        config = self._config()
        following = (config.generation & ~abi.UNSETTLED) % (abi.UNSETTLED - 1) + 1
        config.generation |= abi.UNSETTLED
        self._write_config(config)
        try:
            yield following
        finally:
            config.generation = following
            self._write_config(config)

    def _numbers(self) -> set[int]:
        """The numbers of the policy versions, without the names of their rules."""
        return {key.value for key in libbpf.keys(self._map("policies"), c.c_uint32)}

    def versions(self) -> Mapping[int, Version]:
        """The policy versions in the kernel, by number."""
        numbers = self._numbers()
        for number in numbers - self._versions.keys():
            header, key = abi.Policy(), c.c_uint32(number)
            if libbpf.lookup(self._map("policies"), key, header):
                self._versions[number] = Version(
                    header.name.decode(),
                    bytes(header.sha256),
                    abi.Flag(header.flags),
                    tuple(self._rules(number, header.rules)),
                )
        return {number: version for number, version in self._versions.items() if number in numbers}

    def _rules(self, number: int, count: int) -> Iterator[RuleName]:
        pin = self._pins.rules / str(number)
        if not pin.exists():
            return
        with explained(f"read {pin}"), opened(libbpf.obj_get(pin)) as fd:
            for index in range(count):
                rule = abi.Rule()
                libbpf.lookup(fd, c.c_uint32(index), rule)
                yield RuleName(rule.name.decode(), rule.line, bool(rule.deny))

    def install(self, version: Version, tables: Tables) -> int:
        """Write a new policy version; returns its number. Nobody uses it yet."""
        config = self._config()
        number = config.next_policy
        config.next_policy += 1
        self._write_config(config)
        key = c.c_uint32(number)
        header = abi.Policy(name=version.name.encode(), flags=version.flags, rules=len(version.rules))
        header.sha256[:] = version.sha256
        with explained(f"write the policy {version.name}"):
            if len(self._numbers()) >= abi.MAX_POLICIES:
                raise WeirError(
                    f"the kernel already holds {abi.MAX_POLICIES} policy versions",
                    "Detach cgroups that are no longer needed, or give several the same policy (`weir status`).",
                )
            try:
                for name, fd in fill(tables):
                    with opened(fd):
                        libbpf.update(self._map(name), key, c.c_uint32(fd))
                with opened(rules(version)) as fd:
                    libbpf.obj_pin(fd, self._pins.rules / str(number))
                libbpf.update(self._map("policies"), key, header)
            except BaseException:
                self.retire(number)
                raise
        return int(number)

    def retire(self, number: int) -> None:
        """Remove a policy version that no cgroup uses.

        A program may have read the number a moment ago. The kernel waits for running programs when an element of a map
        of maps is deleted (maybe_wait_bpf_programs, Linux 5.0): so the rules' names go first, which no program reads.
        """
        with explained(f"retire policy version {number}"):
            libbpf.delete(self._map("policies"), c.c_uint32(number))
            (self._pins.rules / str(number)).unlink(missing_ok=True)
            for name in ("clauses", "addresses"):
                libbpf.delete(self._map(name), c.c_uint32(number))

    def counters(self, slot: int) -> Counters:
        """The totals of a slot."""
        values = self._per_cpu()
        with explained(f"read the counters of slot {slot}"):
            libbpf.lookup(self._map("counters"), c.c_uint32(slot), values)
        words = memoryview(values).cast("B").cast("Q")
        return reading.totals([sum(words[word :: reading.WORDS]) for word in range(reading.WORDS)])

    def _per_cpu(self) -> Any:
        self._cpus = self._cpus or libbpf.possible_cpus()
        return (abi.Counters * self._cpus)()

    def refusals(self) -> Mapping[Refused, int]:
        """Every refusal counter."""
        with explained("read the refusals"):
            return reading.refusals(self._map("refusals"))

    def read(self) -> Reading:
        """Everything that is counted, in batches."""
        present, marks = self.enrolments(), self.slots()
        used = {enrolment.slot for enrolment in present.values()}
        into = {slot: mark for slot, mark in marks.items() if mark != abi.SPARE and slot not in used}
        cpus = len(self._per_cpu())
        with explained("read the counters"):
            counted = reading.counters(self._map("counters"), used | into.keys(), cpus)
        refusals: dict[Refused, int] = {}
        for refused, count in self.refusals().items():
            owner = replace(refused, slot=into[refused.slot]) if refused.slot in into else refused
            refusals[owner] = refusals.get(owner, 0) + count
        return Reading(present, reading.folded(counted, into), refusals, self.versions())

    def slots(self) -> Mapping[int, int]:
        """What is remembered of slots that no entry may take: SPARE, or the slot that their counts are added to."""
        with explained("read the slots"):
            return reading.slots(self._map("slots"))

    def mark(self, slot: int, mark: int) -> None:
        """Remember SPARE, or the slot that this one's counts are added to; 0 forgets."""
        with explained(f"mark slot {slot}"):
            libbpf.update(self._map("slots"), c.c_uint32(slot), c.c_uint32(mark))

    def merge(self, slot: int, into: int) -> None:
        """Add the counts of a slot to another's and clear it; no cgroup counts in either any more.

        Killed between the two, the slot's counts are there twice: these two calls are all that no order makes safe.
        """
        values, sums = self._per_cpu(), self._per_cpu()
        with explained(f"merge slot {slot} into {into}"):
            libbpf.lookup(self._map("counters"), c.c_uint32(slot), values)
            libbpf.lookup(self._map("counters"), c.c_uint32(into), sums)
            words, more = (memoryview(one).cast("B").cast("Q") for one in (sums, values))
            for index, word in enumerate(more):
                words[index] += word
            for key in [key for key in libbpf.keys(self._map("refusals"), abi.Refusal) if key.slot == slot]:
                count, total = c.c_uint64(), c.c_uint64()
                libbpf.lookup(self._map("refusals"), key, count)
                key.slot = into
                libbpf.lookup(self._map("refusals"), key, total)
                libbpf.update(self._map("refusals"), key, c.c_uint64(count.value + total.value))
            libbpf.update(self._map("counters"), c.c_uint32(into), sums)
        self.clear([slot])

    def stock(self, slots: Collection[int]) -> None:
        """Give cleared slots to cgroups that are not born yet."""
        for slot in slots:
            self.mark(slot, abi.SPARE)
            with explained("stock spare slots"):
                libbpf.push(self._map("spare"), c.c_uint32(slot))

    def drain(self) -> Collection[int]:
        """Take back the slots that no cgroup has taken; they stay marked."""
        slot, found = c.c_uint32(), []
        with explained("take back spare slots"):
            while libbpf.pop(self._map("spare"), slot):
                found.append(slot.value)
        return found

    def label(self, cgroup_id: int, text: str) -> None:
        """Remember what a cgroup is called: JSON of less than LABELS bytes."""
        with explained(f"name cgroup {cgroup_id}"):
            libbpf.update(self._map("labels"), c.c_uint64(cgroup_id), abi.Labels(text.encode()))

    def labels(self) -> Mapping[int, str]:
        """What ``label`` remembered, by cgroup id."""
        with explained("read the cgroups' names"):
            return reading.labels(self._map("labels"))

    def clear(self, slots: Collection[int]) -> None:
        """Zero the counters of slots, remove their refusal counters and marks, for other cgroups to use them."""
        for slot in slots:
            with explained(f"clear slot {slot}"):
                libbpf.update(self._map("counters"), c.c_uint32(slot), self._per_cpu())
                self.mark(slot, 0)
        with explained("clear refusal counters"):
            for key in [key for key in libbpf.keys(self._map("refusals"), abi.Refusal) if key.slot in slots]:
                libbpf.delete(self._map("refusals"), key)

    def events(self, milliseconds: int) -> Sequence[Event]:
        """The events that are there, waiting at most so long for the first."""
        self._reopen()
        if self._ring is None:
            with explained("read weir's events"):
                self._ring = libbpf.RingBuffer(self._map("events"))
        return [reading.event(record) for record in self._ring.poll(milliseconds)]
