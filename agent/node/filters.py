"""Which containers' processes have a seccomp filter, from /proc: looked at in turns, for a whole node is slow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from agent.node.members import Member
from agent.node.rows import Filters
from agent.status import seccomp

TURNS = 10
"""A container is looked at when it is new, and then at every tenth full look."""

YOUNG = 10.0
"""Seconds in which a container that is new and has no process yet is looked at again: a runtime makes the cgroup first."""


class Processes:
    """The newest answers by cgroup id."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[int, Filters] = {}
        self._young: dict[int, tuple[Member, float]] = {}
        self._turn = 0

    def look(self, members: Iterable[Member]) -> None:
        """Look at those whose turn it is, and forget those that are no members any more."""
        self._turn = (self._turn + 1) % TURNS
        current = {}
        for index, member in enumerate(members):
            known = self._known.get(member.cgroup)
            if known is None or index % TURNS == self._turn:
                known = Filters(*seccomp(self._root / member.path)) if not member.is_parent else Filters()
            current[member.cgroup] = known
        self._known = current

    def greet(self, members: Mapping[int, Member]) -> None:
        """Take note of who is new, for ``look_at_young``, and who is gone; what is there at the agent's start is not new."""
        if not self._known:
            return
        for number in self._known.keys() - members.keys():
            del self._known[number]
            self._young.pop(number, None)
        for number in members.keys() - self._known.keys():
            self._known[number] = Filters()
            if not members[number].is_parent:
                self._young[number] = (members[number], time.monotonic() + YOUNG)

    def look_at_young(self) -> bool:
        """Look at new containers that had no process yet; whether one has now."""
        now = time.monotonic()
        self._young = {number: one for number, one in self._young.items() if now < one[1]}
        found = {number: Filters(*seccomp(self._root / member.path)) for number, (member, _) in self._young.items()}
        started = {number: filters for number, filters in found.items() if filters.processes}
        self._known.update(started)
        self._young = {number: one for number, one in self._young.items() if number not in started}
        return bool(started)

    def of(self, cgroup: int) -> Filters:
        """What was seen last."""
        return self._known.get(cgroup, Filters())
