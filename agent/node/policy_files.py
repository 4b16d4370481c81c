"""What lies in a policy directory, and which version of each file is in force. Reads no file's content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from agent.errors import WeirError
from agent.node.compiling import Loaded

MAX_FILES = 256  # bpf/abi.h has room for as many policies in force

Stamp = tuple[int, ...]
"""Device, inode, size, time of the last write and of the last change in ns; only an errno when there is no such file.

Device and inode say which file a link leads to, without the look at every part of its path that resolving it takes.
"""


@dataclass(frozen=True)
class Look:
    """A directory as it was found: the files in order of their names. ``problem`` is a sentence when none is usable."""

    stamps: Mapping[str, Stamp]
    around: Stamp
    problem: str = ""

    @property
    def newest(self) -> int:
        """The time of the last change of anything in it, in ns since the epoch."""
        return max((stamp[-1] for stamp in (self.around, *self.stamps.values()) if stamp), default=0)


def look(directory: Path) -> Look:
    """Return what is in the directory now. Costs one stat() for each file."""
    try:
        around = stamp_of(os.stat(directory))
        with os.scandir(directory) as entries:
            found = [entry for entry in entries if is_policy(entry.name)]
    except OSError as error:
        return Look({}, (), f"the policy directory {directory} cannot be read: {error.strerror}")
    if not found:
        return Look({}, around, f"there is no policy in {directory} (*.yaml, *.yml)")
    if len(found) > MAX_FILES:
        return Look({}, around, f"there are {len(found)} policies in {directory}; the limit is {MAX_FILES}")
    return Look({entry.name: stamp(entry) for entry in sorted(found, key=lambda entry: entry.name)}, around)


def is_policy(name: str) -> bool:
    """Return whether a file of this name is a policy; a ConfigMap's own links and directories begin with two dots."""
    return name.endswith((".yaml", ".yml")) and not name.startswith(".")


def stamp(entry: os.DirEntry[str]) -> Stamp:
    """Return the stamp of the file that an entry is or leads to."""
    try:
        return stamp_of(entry.stat())
    except OSError as error:
        return (error.errno or 0,)


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of a file's status."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class File:
    """A file as it was read. ``present`` is what is in it now, ``wrong`` what is wrong with that by itself.

    ``good`` is the version in force, which may be an older one.
    """

    stamp: Stamp
    digest: str = ""
    present: Loaded | None = None
    wrong: str = ""
    good: Loaded | None = None


def decide(files: Mapping[str, File]) -> tuple[dict[str, File], dict[str, str]]:
    """Return the files, each with the version that is to be in force, and the problems by file.

    A version is not taken while its policy's name is also that of another file's version, the present or the one in
    force. The versions in force have different names, before and after.
    """
    taken = {name for name, file in files.items() if file.present}
    while True:
        holders: dict[str, set[str]] = {}
        for name, file in files.items():
            for policy in claims(file, taken=name in taken):
                holders.setdefault(policy, set()).add(name)
        clashing = {name for name in taken if len(holders[called(files[name].present)]) > 1}
        if not clashing:
            break
        taken -= clashing
    problems = {}
    for name, file in files.items():
        if file.wrong:
            problems[name] = file.wrong
        elif name not in taken:
            policy = called(file.present)
            problems[name] = clash(policy, sorted(holders[policy] - {name}))
    return {
        name: replace(file, good=file.present if name in taken else file.good) for name, file in files.items()
    }, problems


def claims(file: File, *, taken: bool) -> set[str]:
    """Return the names that a file keeps from others: that of what is in it and, unless it is taken, of what it was."""
    return {called(version) for version in (file.present, None if taken else file.good) if version}


def called(version: Loaded | None) -> str:
    """Return the name of a version's policy."""
    return version.state.name if version else ""


def clash(policy: str, others: list[str]) -> str:
    """Say that other files have a policy of the same name."""
    return str(
        WeirError(
            f"the policy is called {policy}, and so is that of {', '.join(others)}; what was in force stays",
            "Give each its own metadata.name, or remove one of the files.",
        )
    )
