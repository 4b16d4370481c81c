"""Births and deaths of cgroups, told by the kernel (inotify on the cgroup2 tree).

A directory can get children before it is watched. So each is first watched, then listed: what was there by then is in the
list, what comes later is an event, and what is in both is reported once.

kernfs sends neither IN_DELETE_SELF nor IN_IGNORED for a removed cgroup (seen on 6.18): its watch would stay until the
agent ends. The parent's IN_DELETE is the sign to take it back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from sys import intern

from inotify_simple import INotify, flags

from agent.errors import WeirError

_MASK = flags.CREATE | flags.DELETE | flags.ONLYDIR | flags.DONT_FOLLOW
"""cgroups are never moved: rename() in cgroup2 is refused (kernel/cgroup/cgroup.c has it for v1 only)."""


@dataclass(frozen=True)
class Changes:
    """What differs from what was reported before; paths are below the mount, parents first.

    ``removed`` are cgroups reported earlier that are gone; when ``created`` has the path too, a new cgroup took its place.
    ``passed`` were born and died between two reads: nobody was told, but a scan may have met them. ``overflowed``: the
    kernel dropped events; the watch has looked at its part of the tree again and the rest is as complete as ever, but a
    scan of one's own is due.
    """

    created: tuple[PurePosixPath, ...] = ()
    removed: tuple[PurePosixPath, ...] = ()
    passed: tuple[PurePosixPath, ...] = ()
    overflowed: bool = False


class Watch:
    """Watches cgroups below the mount, each one that ``wanted`` (of its path below the mount) says yes to.

    ``limited`` is a sentence while something could not be watched, else "". Not for use by several threads.
    """

    def __init__(self, mount: Path, wanted: Callable[[PurePosixPath], bool]) -> None:
        """Raise WeirError when the kernel gives no inotify instance."""
        self.limited = ""
        self._mount = mount
        self._wanted = wanted
        self._tops: list[PurePosixPath] = []
        self._paths: dict[int, PurePosixPath] = {}
        self._watches: dict[PurePosixPath, int] = {}
        self._children: dict[PurePosixPath, set[str]] = {}
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as e:
            raise WeirError(
                f"no inotify instance: {e.strerror}", "Raise fs.inotify.max_user_instances, or the limit of open files."
            ) from e

    def close(self) -> None:
        """Give back the descriptor and with it every watch."""
        self._inotify.close()

    def fileno(self) -> int:
        """For select(): readable when ``read(0)`` has something to tell."""
        return int(self._inotify.fileno())

    def add_tree(self, path: PurePosixPath) -> Changes:
        """Watch a cgroup and what ``wanted`` takes below it; what is there already below it comes back as created.

        A path that does not exist gives nothing, and one that is removed is gone for good, until ``retry``: watching the
        mount itself, PurePosixPath(), sees everything come.
        """
        if not any(path.is_relative_to(top) for top in self._tops):
            self._tops = [top for top in self._tops if not top.is_relative_to(path)] + [path]
        seen = _Seen()
        self._look(path, seen)
        return seen.changes(overflowed=False)

    def read(self, timeout: float | None = 0) -> Changes:
        """What changed since the last read; waits for up to ``timeout`` seconds (None: for ever) when nothing has."""
        seen, overflowed = _Seen(), False
        for event in self._inotify.read(None if timeout is None else int(timeout * 1000)):
            if event.mask & flags.Q_OVERFLOW:
                overflowed = True
            parent = self._paths.get(event.wd)
            if parent is None or not event.mask & flags.ISDIR:
                continue  # an event from before the watch was taken back
            if event.mask & flags.CREATE:
                self._appear(parent, event.name, seen)
            elif event.mask & flags.DELETE:
                self._vanish(parent, event.name, seen)
        if overflowed:
            self._look_anew(seen)
        return seen.changes(overflowed=overflowed)

    def retry(self) -> Changes:
        """Look at all watched trees anew, for the periodic reconcile; ``limited`` says how it went."""
        seen = _Seen()
        self._look_anew(seen)
        return seen.changes(overflowed=False)

    def _look_anew(self, seen: _Seen) -> None:
        self.limited = ""
        for top in self._tops:
            self._look(top, seen)

    def _look(self, path: PurePosixPath, seen: _Seen) -> None:
        """Watch a directory, then compare its children with those known, and so on down."""
        if not self._wanted(path):
            return
        directory = self._mount / path
        try:
            wd = self._inotify.add_watch(directory, _MASK)
        except OSError as e:
            if e.errno in {errno.ENOENT, errno.ENOTDIR}:
                self._forget(path, seen)
                return
            self._limit(path, e)
        else:
            self._bind(path, wd, seen)
        try:
            with os.scandir(directory) as entries:
                names = {intern(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)}
        except OSError as e:
            if e.errno in {errno.ENOENT, errno.ENOTDIR, errno.ENODEV}:
                self._forget(path, seen)
            else:
                self._limit(path, e)  # it is there: no descriptor or memory to read it
            return
        for name in self._children.get(path, set()) - names:
            self._vanish(path, name, seen)
        for name in sorted(names):
            if name in self._children.get(path, ()):
                self._look(path / name, seen)
            else:
                self._appear(path, name, seen)

    def _bind(self, path: PurePosixPath, wd: int, seen: _Seen) -> None:
        """Note the watch. Another than before: a new cgroup has the name, and the old one went unnoticed."""
        if self._watches.get(path, wd) != wd:
            self._forget(path, seen)
            seen.vanished(path)
            seen.appeared(path)
        self._watches[path] = wd
        self._paths[wd] = path

    def _appear(self, parent: PurePosixPath, name: str, seen: _Seen) -> None:
        known = self._children.setdefault(parent, set())
        if name in known:
            return
        known.add(intern(name))
        path = parent / name
        seen.appeared(path)
        self._look(path, seen)

    def _vanish(self, parent: PurePosixPath, name: str, seen: _Seen) -> None:
        known = self._children.get(parent, set())
        if name in known:
            known.discard(name)
            path = parent / name
            self._forget(path, seen)
            seen.vanished(path)

    def _forget(self, path: PurePosixPath, seen: _Seen) -> None:
        """Take back the watches of a cgroup that is gone, and of what was known below it."""
        for name in sorted(self._children.get(path, ())):
            self._vanish(path, name, seen)
        self._children.pop(path, None)
        wd = self._watches.pop(path, None)
        if wd is not None:
            self._drop(wd)

    def _drop(self, wd: int) -> None:
        self._paths.pop(wd, None)
        try:
            self._inotify.rm_watch(wd)
        except OSError as e:
            if e.errno != errno.EINVAL:  # a kernel that took it back itself
                raise

    def _limit(self, path: PurePosixPath, error: OSError) -> None:
        if error.errno == errno.ENOSPC:
            reason = "no more inotify watches; raise the sysctl fs.inotify.max_user_watches"
        else:
            reason = error.strerror or str(error)
        self.limited = f"Cgroups below {path} are found late, by the periodic look: {reason}."


class _Seen:
    """Collects what one read changes, netted against what was reported before it."""

    def __init__(self) -> None:
        self._created: dict[PurePosixPath, None] = {}
        self._removed: dict[PurePosixPath, None] = {}
        self._passed: dict[PurePosixPath, None] = {}

    def appeared(self, path: PurePosixPath) -> None:
        self._created[path] = None

    def vanished(self, path: PurePosixPath) -> None:
        if path in self._created:
            del self._created[path]
            self._passed[path] = None
        else:
            self._removed[path] = None

    def changes(self, *, overflowed: bool) -> Changes:
        created, removed, passed = map(_parents_first, (self._created, self._removed, self._passed))
        return Changes(created, removed, passed, overflowed)


def _parents_first(paths: Iterable[PurePosixPath]) -> tuple[PurePosixPath, ...]:
    return tuple(sorted(paths, key=lambda path: len(path.parts)))
