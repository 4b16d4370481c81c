"""Slots: the counters of a cgroup, what is remembered of each slot, and what cgroups are called."""

from __future__ import annotations

import ctypes as c
import errno
from collections.abc import Collection, Mapping
from typing import Any

from agent.kernel import abi, libbpf, reading
from agent.kernel.maps import Maps
from agent.kernel.pins import Pins, explained
from agent.kernel.seam import Counters, Refused


class Slots(Maps):
    """The part of the seam that is about slots."""

    def __init__(self, pins: Pins) -> None:
        super().__init__(pins)
        self._cpus = 0

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

    def slots(self) -> Mapping[int, int]:
        """What is remembered of slots that no entry may take: SPARE, or the slot that their counts are added to (SUM: alone)."""
        with explained("read the slots"):
            return reading.slots(self._map("slots"))

    def mark(self, slot: int, mark: int) -> None:
        """Remember SPARE, or the slot that this one's counts are added to; 0 forgets."""
        with explained(f"mark slot {slot}"):
            libbpf.update(self._map("slots"), c.c_uint32(slot), c.c_uint32(mark))

    def merge(self, slots: Collection[int], fresh: int, target: int) -> None:
        """Put the sum of slots that count for ``target`` into a free one, which from then on counts instead of them.

        No cgroup counts in any of them any more. One write brings the sum and hides the rest: killed before or after it,
        nothing is there twice and nothing is missing.
        """
        self.clear([fresh])
        values, sums = self._per_cpu(), self._per_cpu()
        words, more = (memoryview(one).cast("B").cast("Q") for one in (sums, values))
        with explained(f"merge slots into {fresh}"):
            for slot in slots:
                libbpf.lookup(self._map("counters"), c.c_uint32(slot), values)
                for index, word in enumerate(more):
                    words[index] += word
            for key, count in self._refusals_of(slots):
                total = c.c_uint64()
                key.slot = fresh
                libbpf.lookup(self._map("refusals"), key, total)
                try:
                    libbpf.update(self._map("refusals"), key, c.c_uint64(count + total.value))
                except OSError as e:
                    if e.errno != errno.E2BIG:
                        raise
                    sums[0].refusals_uncounted += count  # as the programs do when the table is full
            libbpf.update(self._map("counters"), c.c_uint32(fresh), sums)
        self.mark(fresh, abi.SUM | target)
        self.sweep_sums()

    def sweep_sums(self) -> None:
        """Clear the slots whose counts are in a sum."""
        marks = self.slots()
        for slot, mark in marks.items():
            if mark != abi.SPARE and mark & abi.SUM:
                target = mark & ~abi.SUM
                self.clear([other for other, mark in marks.items() if mark == target])
                self.mark(slot, target)

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
        """Remember what a cgroup is called: JSON of less than LABELS bytes; "" forgets."""
        with explained(f"name cgroup {cgroup_id}"):
            if not text:
                libbpf.delete(self._map("labels"), c.c_uint64(cgroup_id))
                return
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
            for key, _ in self._refusals_of(slots):
                libbpf.delete(self._map("refusals"), key)

    def _refusals_of(self, slots: Collection[int]) -> list[tuple[abi.Refusal, int]]:
        """The keys of refusal counters as they are in the map, and their counts."""
        batches = libbpf.batches(self._map("refusals"), abi.Refusal, c.c_uint64)
        return [pair for keys, counts in batches for pair in zip(keys, counts, strict=True) if pair[0].slot in slots]
