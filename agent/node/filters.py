"""Which containers' processes have a seccomp filter, from /proc: looked at in turns, for a whole node is slow."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from agent.node.members import Member
from agent.node.rows import Filters
from agent.status import seccomp

TURNS = 10
"""A container is looked at when it is new, and then at every tenth full look."""


class Processes:
    """The newest answers by cgroup id."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[int, Filters] = {}
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

    def of(self, cgroup: int) -> Filters:
        """What was seen last."""
        return self._known.get(cgroup, Filters())
