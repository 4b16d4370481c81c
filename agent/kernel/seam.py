"""The one seam to the kernel: what weir asks of it, in weir's words.

pinned.py is the live implementation, tests/fake_kernel.py the one in memory. Everything here is plain data: the
structures of bpf/abi.h stay behind the seam.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from agent.kernel.abi import DESTINATIONS, Flag, Hook, Reason
from agent.policy.compile import Tables


@dataclass(frozen=True)
class Build:
    """What is loaded. ``build`` names the programs' text; ``has_retval`` is false where a refusal is always EPERM."""

    build: int
    has_retval: bool
    capacity: int


class Enrolment(NamedTuple):
    """A cgroup's entry: its slot among the counters, its policy version, flags.

    Not a frozen dataclass, which takes twice as long to make: every look of the agent makes thousands.
    """

    slot: int
    policy: int
    flags: Flag


@dataclass(frozen=True)
class RuleName:
    """What a refusal's rule index stands for."""

    name: str
    line: int
    deny: bool


@dataclass(frozen=True)
class Version:
    """A policy version: never changed once a cgroup uses it. ``sha256`` is that of what was compiled."""

    name: str
    sha256: bytes
    flags: Flag
    rules: tuple[RuleName, ...]


@dataclass(frozen=True)
class Counters:
    """Totals of one slot since its enrolment. Bytes are IP bytes as they leave on the wire, by destination class."""

    bytes: Mapping[str, int]
    packets: Mapping[str, int]
    sockets_created: int
    sockets_released: int
    sockets_adopted: int
    events_suppressed: int
    events_lost: int
    refusals_uncounted: int


NOTHING = Counters(
    bytes=dict.fromkeys(DESTINATIONS, 0),
    packets=dict.fromkeys(DESTINATIONS, 0),
    sockets_created=0,
    sockets_released=0,
    sockets_adopted=0,
    events_suppressed=0,
    events_lost=0,
    refusals_uncounted=0,
)
"""The counters of a slot in which nothing has happened."""


def total(parts: Sequence[Counters]) -> Counters:
    """The sum of the counters of several slots."""
    if len(parts) <= 1:
        return parts[0] if parts else NOTHING
    return Counters(
        bytes={kind: sum(part.bytes[kind] for part in parts) for kind in DESTINATIONS},
        packets={kind: sum(part.packets[kind] for part in parts) for kind in DESTINATIONS},
        sockets_created=sum(part.sockets_created for part in parts),
        sockets_released=sum(part.sockets_released for part in parts),
        sockets_adopted=sum(part.sockets_adopted for part in parts),
        events_suppressed=sum(part.events_suppressed for part in parts),
        events_lost=sum(part.events_lost for part in parts),
        refusals_uncounted=sum(part.refusals_uncounted for part in parts),
    )


@dataclass(frozen=True)
class Refused:
    """What a refusal counter counts. ``rule`` is an index in the version's rules, None for the default or no rule."""

    slot: int
    policy: int
    hook: Hook
    reason: Reason
    rule: int | None
    audited: bool


@dataclass(frozen=True)
class Reading:
    """Everything that is counted. ``counters`` are by slot; folded slots are added to those that they count for."""

    enrolments: Mapping[int, Enrolment]
    counters: Mapping[int, Counters]
    refusals: Mapping[Refused, int]
    versions: Mapping[int, Version]


@dataclass(frozen=True)
class Event:
    """One refusal or audit as it happened. ``time`` is CLOCK_MONOTONIC in ns; ``pid`` is 0 for packets."""

    time: int
    cgroup: int
    pid: int
    comm: str
    address: int
    port: int
    protocol: int
    refused: Refused


class Kernel(Protocol):
    """Everything weir reads from and writes to the kernel's tables. Methods raise WeirError with a hint."""

    def build(self) -> Build | None:
        """What is loaded, None when nothing (or not all) is."""

    def max_capacity(self) -> Mapping[str, tuple[int, int]]:
        """Per map that can fill up: (entries, capacity)."""

    def attached(self) -> Mapping[int, frozenset[str]]:
        """Per cgroup id with programs attached: their names. A cgroup that is gone is not listed."""

    def attach(self, cgroup: Path) -> None:
        """Attach every program to a cgroup; those that are attached stay."""

    def detach(self, cgroup_id: int) -> None:
        """Remove weir's programs from a cgroup."""

    def sweep(self) -> None:
        """Remove the pins of links whose cgroup is gone."""

    def enrolments(self) -> Mapping[int, Enrolment]:
        """Per cgroup id: its entry."""

    def enrol(self, entries: Mapping[int, Enrolment], fresh: Collection[int] = ()) -> None:
        """Write cgroups' entries: each takes effect for the next call and packet.

        ``fresh`` are those that had none when their slots were chosen: one that has made its first socket meanwhile has
        enrolled itself, and keeps the slot that it counts in.
        """

    def withdraw(self, cgroup_ids: Collection[int]) -> None:
        """Remove cgroups' entries and labels."""

    def versions(self) -> Mapping[int, Version]:
        """The policy versions in the kernel, by number."""

    def install(self, version: Version, tables: Tables) -> int:
        """Write a new policy version; returns its number. Nobody uses it yet."""

    def retire(self, number: int) -> None:
        """Remove a policy version that no cgroup uses."""

    def counters(self, slot: int) -> Counters:
        """The totals of a slot."""

    def refusals(self) -> Mapping[Refused, int]:
        """Every refusal counter."""

    def read(self) -> Reading:
        """Everything that is counted."""

    def slots(self) -> Mapping[int, int]:
        """What is remembered of slots that no entry may take: SPARE, or the slot that their counts are added to.

        With SUM, a slot's counts are added instead of those of all others that are marked with the same.
        """

    def mark(self, slot: int, mark: int) -> None:
        """Remember SPARE, or the slot that this one's counts are added to; 0 forgets."""

    def merge(self, slots: Collection[int], fresh: int, target: int) -> None:
        """Put the sum of slots that count for ``target`` into a free one, which from then on counts instead of them."""

    def stock(self, slots: Collection[int]) -> None:
        """Give cleared slots to cgroups that are not born yet; marks them SPARE."""

    def drain(self) -> Collection[int]:
        """Take back the slots that no cgroup has taken; they stay marked."""

    def label(self, cgroup_id: int, text: str) -> None:
        """Remember what a cgroup is called: JSON of less than LABELS bytes; "" forgets."""

    def labels(self) -> Mapping[int, str]:
        """What ``label`` remembered, by cgroup id."""

    def clear(self, slots: Collection[int]) -> None:
        """Zero the counters of slots, remove their refusal counters and marks, for other cgroups to use them."""

    def events(self, milliseconds: int) -> Sequence[Event]:
        """The events that are there, waiting at most so long for the first."""
