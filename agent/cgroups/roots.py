"""The managed parents: which cgroups' children are containers to look after.

Patterns are matched name by name, so that ``*`` does not cross a ``/``. A parent that is not there yet is none of the
agent's errors: the kubelet may start after it. Whoever watches asks ``is_worth_watching`` how far to look.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from agent.cgroups.containers import may_hold
from agent.errors import WeirError

Pattern = tuple[str, ...]

_SET = re.compile(r"\[!?\]?[^\]]*\]")
"""A set of characters as fnmatch reads it."""

DEFAULT = ("kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubelet/kubepods")
"""The kubelet's cgroup with its systemd and its cgroupfs driver; then the same where --cgroup-root is /kubelet.

The latter two are kind's (its node image sets cgroupRoot: /kubelet), seen from inside the node, where a DaemonSet runs.
k3s, also in k3d, has kubepods at the top of what its node sees. Seen from the host, a kind or k3d node is one container
of Docker; its pods are for the agent inside, so kubepods further down needs a --root of its own.
"""


@dataclass(frozen=True)
class Roots:
    """``found`` are the managed parents, below the mount; no two of them lie in each other.

    ``covered`` are parents that matched too but lie in another (→ which): attaching to both would count twice.
    ``missing`` are the patterns that match nothing now.
    """

    found: tuple[PurePosixPath, ...] = ()
    covered: Mapping[PurePosixPath, PurePosixPath] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def parse(globs: Iterable[str]) -> tuple[Pattern, ...]:
    """The patterns, name by name. Raises WeirError for one that can match no cgroup, or would match the whole host."""
    return tuple(_parse(glob) for glob in globs)


def _parse(glob: str) -> Pattern:
    names = tuple(glob.strip("/").split("/"))
    if names == ("",):
        raise WeirError(
            f"--root {glob!r} is the whole host", "Name a cgroup below the mount, such as kubepods.slice or 'tenant-*'."
        )
    if names[:2] == ("sys", "fs"):
        raise WeirError(f"--root {glob} starts at /", "Give the path below the cgroup2 mount, such as kubepods.slice.")
    if "**" in names:
        raise WeirError(f"--root {glob}: ** is not known", "Write one * for each level, such as '*/*/kubepods'.")
    for name in names:
        if name in {"", ".", ".."} or "\0" in name:
            raise WeirError(
                f"--root {glob} is no path of cgroups", "Write the names below the mount, with one / between them."
            )
        if "[" in _SET.sub("", name):
            raise WeirError(f"--root {glob} has a [ without ]", "Close the bracket, or write [[] for the character.")
    return names


def select(candidates: Iterable[PurePosixPath], patterns: Iterable[Pattern]) -> Roots:
    """The managed parents among existing cgroups: all that match and lie in no other that does."""
    candidates, patterns = tuple(candidates), tuple(patterns)
    matched = {pattern: [path for path in candidates if _matches(path.parts, pattern)] for pattern in patterns}
    found: list[PurePosixPath] = []
    covered: dict[PurePosixPath, PurePosixPath] = {}
    for path in sorted({path for paths in matched.values() for path in paths}):
        outer = next((root for root in found if path.is_relative_to(root)), None)
        if outer is None:
            found.append(path)
        else:
            covered[path] = outer
    return Roots(tuple(found), covered, tuple("/".join(pattern) for pattern in patterns if not matched[pattern]))


def find(mount: Path, patterns: Iterable[Pattern]) -> Roots:
    """The managed parents that there are now. Looks only where a pattern leads."""
    patterns = tuple(patterns)
    return select(
        sorted({path for pattern in patterns for path in _existing(mount, PurePosixPath(), pattern)}), patterns
    )


def root_of(relative: PurePosixPath, patterns: Iterable[Pattern]) -> PurePosixPath | None:
    """The managed parent that a cgroup is or lies in: the outermost that matches. None outside of all."""
    parts = relative.parts
    lengths = [len(pattern) for pattern in patterns if _matches(parts[: len(pattern)], pattern)]
    return PurePosixPath(*parts[: min(lengths)]) if lengths else None


def is_worth_watching(relative: PurePosixPath, patterns: Iterable[Pattern]) -> bool:
    """True where a managed parent or a container can appear as a child: the predicate for ``watch.Watch``."""
    patterns = tuple(patterns)
    root = root_of(relative, patterns)
    if root is not None:
        return may_hold(relative, root)
    parts = relative.parts
    return any(_matches(parts, pattern[: len(parts)]) for pattern in patterns)


def _matches(parts: Pattern, pattern: Pattern) -> bool:
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))


def _existing(mount: Path, at: PurePosixPath, pattern: Pattern) -> Iterator[PurePosixPath]:
    """The cgroups below ``at`` that match; one that vanishes meanwhile is passed over."""
    if not pattern:
        yield at
        return
    try:
        with os.scandir(mount / at) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for name in names:
        if fnmatchcase(name, pattern[0]):
            yield from _existing(mount, at / name, pattern[1:])
