"""Containers as Prometheus tells them apart: by their labels.

The numbers of rows with equal labels are added, because a page that has the same labels twice is refused as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agent import names
from agent.kernel.seam import NOTHING, Counters, Enrolment, Reading, total
from agent.node.state import LAYERS, NodeState, Row

Who = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Series:
    """What has one set of labels. ``slots`` are the distinct ones of all its cgroups, ``counters`` their sum.

    ``policy`` and ``mode`` are the kernel's where it has an entry, else what the agent asked for. ``layers`` is None when
    it is gone: then nothing has to be in force.
    """

    key: Who
    who: dict[str, str]
    slots: tuple[int, ...]
    counters: Counters
    policy: str
    mode: str
    problem: bool
    layers: Mapping[str, bool] | None


def text(value: str) -> str:
    """A label's value. Names in Linux are bytes; what is not UTF-8 in them is escaped, or the page could not be written."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()


def series_of(state: NodeState, reading: Reading | None) -> list[Series]:
    """One Series for each set of labels, in the order of the rows. Without a reading every number is 0."""
    modes = {policy.name: policy.mode for policy in state.policies}
    groups: dict[Who, list[Row]] = {}
    for row in state.rows:
        groups.setdefault((row.namespace, row.pod, row.container, row.cgroup), []).append(row)
    return [_series(key, group, reading, modes) for key, group in groups.items()]


def _series(key: Who, rows: Sequence[Row], reading: Reading | None, modes: Mapping[str, str]) -> Series:
    living = [row for row in rows if row.gone is None]
    shown = living[0] if living else rows[-1]
    slots: tuple[int, ...] = ()
    counters, policy, mode = NOTHING, shown.policy, modes.get(shown.policy, "")
    if reading is not None:
        entries = reading.enrolments
        slots = tuple({entries[number].slot for row in rows for number in row.cgroup_ids if number in entries})
        counters = total([reading.counters[slot] for slot in slots if slot in reading.counters])
        own = next((entries[number] for number in shown.cgroup_ids if number in entries), None)
        if own is not None:
            policy, mode = _in_kernel(own, reading)
    return Series(
        key=key,
        who=dict(zip(("namespace", "pod", "container", "cgroup"), map(text, key), strict=True)),
        slots=slots,
        counters=counters,
        policy=policy,
        mode=mode,
        problem=any(row.problem for row in living),
        layers=_layers(*(all(row.layers.get(layer, False) for row in living) for layer in LAYERS)) if living else None,
    )


@functools.cache
def _layers(*holds: bool) -> Mapping[str, bool]:
    """The same object for the same answer: thousands of series share a few."""
    return dict(zip(LAYERS, holds, strict=True))


def _in_kernel(enrolment: Enrolment, reading: Reading) -> tuple[str, str]:
    version = reading.versions.get(enrolment.policy)
    return (version.name, names.mode(enrolment.flags)) if version else ("", "refuse all")
