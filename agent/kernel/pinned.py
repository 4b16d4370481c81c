"""The live kernel: weir's pinned maps, programs and links, through libbpf. Never imports bcc."""

from __future__ import annotations

import ctypes as c
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from agent.kernel import abi, libbpf, reading
from agent.kernel.links import Links
from agent.kernel.pins import Pins, explained
from agent.kernel.seam import Build, Enrolment, Event, Reading, Refused
from agent.kernel.slots import Slots
from agent.kernel.versions import PolicyVersions

_READS = 5
"""So often at most everything is read for one answer: counts move when a service that was started again is forgotten."""


class PinnedKernel(PolicyVersions, Slots):
    """The pins below one directory. Opens maps when they are needed; ``close`` closes them."""

    def __init__(self, pins: Pins) -> None:
        super().__init__(pins)
        self._links = Links(pins)
        self._ring: libbpf.RingBuffer | None = None

    def close(self) -> None:
        """Close what is open; everything stays pinned."""
        if self._ring:
            self._ring.close()
            self._ring = None
        super().close()

    def is_loaded(self) -> bool:
        """Whether a load has been finished here."""
        return self.build() is not None

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

    def begin(self, build: int, has_retval: bool, secret: int) -> None:
        """Record a finished load. The secret and the counters of an earlier one stay."""
        config = self._config()
        config.abi, config.build, config.has_retval = abi.ABI, build, has_retval
        config.secret = config.secret or secret
        config.generation = config.generation or 1
        config.next_policy = config.next_policy or 1
        self._write_config(config)

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
        self.sweep_versions()
        self.sweep_sums()

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

    def read(self) -> Reading:
        """Everything that is counted, in batches.

        The tables are read one after the other: when counts have moved from one slot to another meanwhile, once more.
        """
        for _ in range(_READS):
            used, into, found = self._read()
            if reading.counting(self.slots(), used) == into:
                break
        return found

    def _read(self) -> tuple[set[int], dict[int, int], Reading]:
        present = self.enrolments()
        used = {enrolment.slot for enrolment in present.values()}
        into = reading.counting(self.slots(), used)
        cpus = len(self._per_cpu())
        with explained("read the counters"):
            counted = reading.counters(self._map("counters"), used | into.keys(), cpus)
        refusals: dict[Refused, int] = {}
        for refused, count in self.refusals().items():
            owner = replace(refused, slot=into[refused.slot]) if refused.slot in into else refused
            refusals[owner] = refusals.get(owner, 0) + count
        return used, into, Reading(present, reading.folded(counted, into), refusals, self.versions())

    def events(self, milliseconds: int) -> Sequence[Event]:
        """The events that are there, waiting at most so long for the first."""
        self._reopen()
        if self._ring is None:
            with explained("read weir's events"):
                self._ring = libbpf.RingBuffer(self._map("events"))
        return [reading.event(record) for record in self._ring.poll(milliseconds)]
