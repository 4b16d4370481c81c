"""The cgroup v2 tree: where it is mounted, and paths to ids and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from agent.errors import WeirError


def mount(mountinfo: str | None = None) -> Path:
    """Where cgroup2 is mounted: on hybrid hosts that is not /sys/fs/cgroup. ``mountinfo``: the text, for tests.

    Raises WeirError when it is not mounted.
    """
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split()[0] == "cgroup2":
            return Path(fields.split()[4].encode().decode("unicode_escape"))
    raise WeirError(
        "cgroup2 is not mounted: programs can be attached to cgroup v2 only",
        "Mount it: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
    )


def cgroup_id(path: Path) -> int:
    """The id that bpf_get_current_cgroup_id gives: the directory's inode number (kernfs, Linux 5.5).

    Raises WeirError when there is no such cgroup.
    """
    try:
        return os.stat(path).st_ino
    except OSError as e:
        raise WeirError(f"{path} is no cgroup: {e.strerror}", "List the cgroups: weir status, or systemd-cgls") from e


def resolve(name: str, root: Path) -> Path:
    """A cgroup's directory from what a user writes: a path in the file system, or one below the cgroup2 mount.

    Raises WeirError when it is not a cgroup of the tree at ``root``.
    """
    given = Path(name)
    below = root / name.strip("/")
    path = given if given.is_absolute() and given.is_relative_to(root) else below
    if not (path / "cgroup.procs").exists() or not path.resolve().is_relative_to(root):
        raise WeirError(f"{name} is no cgroup below {root}", f"Give a directory that has a cgroup.procs: ls {root}")
    return path.resolve()


def level(path: Path, root: Path) -> int:
    """How deep a cgroup lies: 0 for the root."""
    return len(path.relative_to(root).parts)


def processes(path: Path) -> list[int]:
    """The pids in a cgroup and below it."""
    pids = []
    for directory in [path, *descendants(path)]:
        try:
            pids += [int(pid) for pid in (directory / "cgroup.procs").read_text().split()]
        except OSError:
            continue  # removed while we looked
    return pids


def descendants(path: Path) -> Iterator[Path]:
    """Every cgroup below ``path``, parents first. One that vanishes meanwhile is passed over."""
    for directory, names, _ in os.walk(path):
        for name in names:
            yield Path(directory) / name


def paths_by_id(root: Path) -> dict[int, Path]:
    """The whole tree: cgroup id → directory."""
    return {number: root / path for path, number in scan(root, PurePosixPath()).items()}


def scan(
    mount: Path, start: PurePosixPath, into: Callable[[PurePosixPath], bool] = lambda _: True
) -> dict[PurePosixPath, int]:
    """The cgroup ``start`` and those below it, parents first: path below the mount → cgroup id. Empty when it is not there.

    Below a cgroup that ``into`` refuses nothing is looked at. The ids come with the names (kernfs: d_ino is the inode's
    number). A cgroup without children is not opened: its link count is 2, and one more for each child. (It is always 1 on
    some file systems, such as overlayfs; those are opened.)
    """
    try:
        found = {start: os.stat(mount / start).st_ino}
    except OSError:
        return {}
    waiting = [start]
    while waiting:
        at = waiting.pop()
        directory = f"{mount}/{at}"
        try:
            if os.stat(directory).st_nlink == 2 or not into(at):
                continue
            with os.scandir(directory) as entries:
                children = {at / e.name: e.inode() for e in entries if e.is_dir(follow_symlinks=False)}
        except OSError:
            continue  # removed while we looked
        found |= children
        waiting += children
    return found
