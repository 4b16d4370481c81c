"""The cgroups below the managed parents that containers can be, kept up to date by what the watch says.

A whole node is read when nothing is known, and whenever something may have been missed; a birth costs one stat().
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from agent.cgroups import tree
from agent.cgroups.containers import may_hold
from agent.cgroups.watch import Changes
from agent.errors import WeirError


class Parents:
    """By managed parent: path below the mount → cgroup id, parents first. Not for use by several threads."""

    def __init__(self, mount: Path) -> None:
        self._mount = mount
        self._found: dict[PurePosixPath, dict[PurePosixPath, int]] = {}
        self._same: dict[PurePosixPath, PurePosixPath] = {}
        self._ahead: set[PurePosixPath] = set()  # parents that were read since the watch has told anything

    def forget(self) -> None:
        """Read everything anew when it is next asked for."""
        # The same cgroup keeps the same path object, which the agent's other tables hold too: thousands, 400 bytes each.
        self._same = {path: path for found in self._found.values() for path in found}
        self._found.clear()

    def below(self, root: PurePosixPath) -> Mapping[PurePosixPath, int]:
        """A managed parent itself and what may be a container below it. Empty when it is not there."""
        if root not in self._found:
            found = tree.scan(self._mount, root, lambda path: may_hold(path, root))
            if not found:
                return {}
            self._ahead.add(root)
            self._found[root] = {self._same.pop(path, path): number for path, number in found.items()}
        return self._found[root]

    def follow(self, changes: Changes) -> None:
        """Take over births and deaths. ``changes.overflowed``: some were missed."""
        if changes.overflowed:
            self.forget()
            return
        for path in (*changes.removed, *changes.passed):
            self._found.pop(path, None)
            for found in self._found.values():
                found.pop(path, None)
        self._drop_unseen(changes)
        for path in changes.created:
            for root, found in self._found.items():
                if path.is_relative_to(root):
                    self._add(path, found)

    def _drop_unseen(self, changes: Changes) -> None:
        """What was read before the watch knew of it, and gone by then: of what is below a new cgroup all is told."""
        created = set(changes.created)
        told = created.union(changes.removed, changes.passed)
        for found in (self._found[root] for root in self._ahead if told and root in self._found):
            for path in [path for path in found if path not in created and not told.isdisjoint(path.parents)]:
                del found[path]
        self._ahead.clear()

    def _add(self, path: PurePosixPath, found: dict[PurePosixPath, int]) -> None:
        try:
            found[path] = tree.cgroup_id(self._mount / path)
        except WeirError:
            found.pop(path, None)  # it is gone already; its death is told next
