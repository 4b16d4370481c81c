"""Pinned maps read as a whole: in batches where the kernel has them (5.6 for hashes, 5.13 for per-CPU arrays)."""

from __future__ import annotations

import ctypes as c
import functools
from collections.abc import Collection, Mapping

from agent.kernel import abi, libbpf
from agent.kernel.seam import Counters, Enrolment, Event, Refused, total

WORDS = c.sizeof(abi.Counters) // 8
"""struct weir_counters is nothing but 64-bit counters."""

KINDS = len(abi.DESTINATIONS)

_flags = functools.lru_cache(abi.Flag)
"""Few combinations occur, and making a Flag takes longer than all else about an entry."""


def enrolments(fd: int) -> dict[int, Enrolment]:
    """The map `cgroups`: cgroup id → its entry."""
    return {
        key: Enrolment(entry.slot, entry.policy, _flags(entry.flags))
        for keys, entries in libbpf.batches(fd, c.c_uint64, abi.Enrolled)
        for key, entry in zip(keys, entries, strict=True)
    }


def slots(fd: int) -> dict[int, int]:
    """The map `slots`, without its zeros."""
    return {
        key: value
        for keys, values in libbpf.batches(fd, c.c_uint32, c.c_uint32)
        for key, value in zip(keys, values, strict=True)
        if value
    }


def labels(fd: int) -> dict[int, str]:
    """The map `labels`: cgroup id → JSON."""
    return {
        key: value.text.decode(errors="replace")
        for keys, values in libbpf.batches(fd, c.c_uint64, abi.Labels)
        for key, value in zip(keys, values, strict=True)
    }


def refusals(fd: int) -> dict[Refused, int]:
    """The map `refusals`."""
    return {
        refused(key): count
        for keys, counts in libbpf.batches(fd, abi.Refusal, c.c_uint64)
        for key, count in zip(keys, counts, strict=True)
    }


def counters(fd: int, wanted: Collection[int], cpus: int) -> dict[int, Counters]:
    """The map `counters`: slot → totals over all CPUs, of the slots wanted."""
    found = {}
    for keys, values in libbpf.batches(fd, c.c_uint32, c.c_uint64 * (WORDS * cpus)):
        words = memoryview(values).cast("B").cast("Q")
        for index, key in enumerate(keys):
            if key in wanted:
                one = words[index * WORDS * cpus : (index + 1) * WORDS * cpus]
                found[key] = totals([sum(one[word::WORDS]) for word in range(WORDS)])
    return found


def totals(words: list[int]) -> Counters:
    """struct weir_counters, its words in order."""
    return Counters(
        dict(zip(abi.DESTINATIONS, words[:KINDS], strict=True)),
        dict(zip(abi.DESTINATIONS, words[KINDS : 2 * KINDS], strict=True)),
        *words[2 * KINDS :],
    )


def counting(marks: Mapping[int, int], used: Collection[int]) -> dict[int, int]:
    """Slots whose cgroups are gone → the slot that each one's counts are added to. ``used``: those of living entries."""
    waiting = {slot: mark for slot, mark in marks.items() if mark != abi.SPARE and slot not in used}
    sums = {mark for mark in waiting.values() if mark & abi.SUM}
    return {slot: mark & ~abi.SUM for slot, mark in waiting.items() if mark & abi.SUM or mark | abi.SUM not in sums}


def folded(counted: Mapping[int, Counters], into: Mapping[int, int]) -> dict[int, Counters]:
    """Counters with those of folded slots added to the slots that they count for."""
    result = dict(counted)
    for slot, target in into.items():
        if slot in counted and target in result:
            result[target] = total([result[target], counted[slot]])
    return result


def refused(raw: abi.Refusal | abi.Event) -> Refused:
    """What a key of `refusals`, or an event, says of the refusal."""
    rule = None if raw.rule == abi.DEFAULT_RULE else raw.rule
    return Refused(raw.slot, raw.policy, abi.Hook(raw.hook), abi.Reason(raw.reason), rule, bool(raw.audited))


def event(record: bytes) -> Event:
    """A record of the ring buffer."""
    raw = abi.Event.from_buffer_copy(record)
    address = int.from_bytes(bytes(raw.address), "big")
    comm = raw.comm.decode(errors="replace")
    return Event(raw.time, raw.cgroup, raw.pid, comm, address, raw.port, raw.protocol, refused(raw))
