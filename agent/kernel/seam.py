"""The one seam to the kernel: what weir asks of it, in weir's words.

pinned.py is the live implementation, tests/fake_kernel.py the one in memory. Everything here is plain data: the
structures of bpf/abi.h stay behind the seam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.kernel.abi import Flag, Hook, Reason
from agent.policy.compile import Tables


@dataclass(frozen=True)
class Build:
    """What is loaded. ``build`` names the programs' text; ``has_retval`` is false where a refusal is always EPERM."""

    build: int
    has_retval: bool
    capacity: int


@dataclass(frozen=True)
class Enrolment:
    """A cgroup's entry: its slot among the counters, its policy version, flags."""

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

    def enrol(self, cgroup_id: int, enrolment: Enrolment) -> None:
        """Write a cgroup's entry: it takes effect for the next call and packet."""

    def withdraw(self, cgroup_id: int) -> None:
        """Remove a cgroup's entry."""

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

    def clear(self, slot: int) -> None:
        """Zero a slot's counters and remove its refusal counters, for the next cgroup to use it."""

    def events(self, milliseconds: int) -> Sequence[Event]:
        """The events that are there, waiting at most so long for the first."""
