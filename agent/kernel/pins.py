"""Where weir's objects are pinned on bpffs, and errors of the kernel in words.

/sys/fs/bpf/weir/abi-N/maps/NAME, programs/NAME, rules/POLICY-VERSION, links/CGROUP-ID/NAME. Everything below /sys/fs/bpf/weir is weir's, and
nothing else is ever touched.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.errors import WeirError
from agent.kernel.abi import ABI

_PRIVILEGE = "Run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (`weir probe` says what is missing)."
_FULL = "The table is full. Detach what is no longer needed (`weir status`), or load with a larger one."
HINTS = {
    errno.EPERM: _PRIVILEGE,
    errno.EACCES: _PRIVILEGE,
    errno.E2BIG: _FULL,
    errno.ENOSPC: _FULL,
    errno.ENOMEM: "The kernel has no memory for it: check the memory limit of weir's own cgroup and ulimit -l.",
    errno.ENOENT: "Load weir first: weir load",
}


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn an OSError into a WeirError that says what was being done and what to do about it."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or os.strerror(e.errno or 0)
        hint = HINTS.get(e.errno or 0, "See what the kernel offers: weir probe")
        raise WeirError(f"cannot {doing}: {reason}", hint) from e


@dataclass(frozen=True)
class Pins:
    """The directory of the pins, /sys/fs/bpf/weir unless told otherwise."""

    root: Path = Path("/sys/fs/bpf/weir")

    @property
    def base(self) -> Path:
        """The pins of this ABI version."""
        return self.root / f"abi-{ABI}"

    @property
    def maps(self) -> Path:
        """The pinned maps."""
        return self.base / "maps"

    @property
    def programs(self) -> Path:
        """The pinned programs."""
        return self.base / "programs"

    @property
    def rules(self) -> Path:
        """The names of the rules of each policy version: a pinned array, by the version's number."""
        return self.base / "rules"

    @property
    def links(self) -> Path:
        """The pinned links: one directory for each cgroup id."""
        return self.base / "links"

    def foreign(self) -> list[str]:
        """Pins of other ABI versions."""
        try:
            return sorted(entry.name for entry in self.root.iterdir() if entry.name != self.base.name)
        except FileNotFoundError:
            return []

    def make(self) -> None:
        """Make the directories.

        Raises WeirError when bpffs is not mounted there, or someone else made them: a bpffs mounted without options
        lets everyone make directories.
        """
        require_bpffs(self.root)
        with explained(f"make {self.base}"):
            # The root, too, is for weir alone: who can open it could hold the lock on it for ever.
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            owner = self.root.stat().st_uid
            if owner != os.geteuid():
                raise WeirError(
                    f"{self.root} belongs to user {owner}, who could change the rules",
                    f"Find out who made it, then: rm -r {self.root}",
                )
            for directory in (self.base, self.maps, self.programs, self.rules, self.links):
                directory.mkdir(exist_ok=True, mode=0o700)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """A lock of the loader's own: killed, the command that started it lets go of the place while the loader works on."""
        with explained(f"lock {self.base}"):
            fd = os.open(self.base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def remove_unfinished(self) -> None:
        """Remove the maps and programs of a load or unload that was killed, unless something is still attached.

        The loader takes a pinned map as it finds it, whatever its size and contents.
        """
        if any(self.links.iterdir()):
            return
        with explained(f"remove what a killed load left in {self.base}"):
            for pin in [*self.programs.iterdir(), *self.rules.iterdir(), *self.maps.iterdir()]:
                pin.unlink()

    def remove(self) -> None:
        """Remove every pin: links first, so that no program stays attached without its maps."""
        with explained(f"remove {self.root}"):
            for base in sorted(self.root.iterdir()) if self.root.exists() else []:
                self.remove_base(base)
            if self.root.exists():
                self.root.rmdir()

    def remove_base(self, base: Path) -> None:
        """Remove the pins of one ABI version."""
        with explained(f"remove {base}"):
            for part in ("links", "programs", "rules", "maps"):
                _remove_tree(base / part)
            base.rmdir()


def _remove_tree(path: Path) -> None:
    if not path.exists():
        return
    for entry in list(path.iterdir()):
        if entry.is_dir():
            _remove_tree(entry)
        else:
            entry.unlink()
    path.rmdir()


def require_bpffs(path: Path) -> None:
    """Raise WeirError unless ``path``, or the nearest directory above it that exists, is on a BPF file system."""
    nearest = path
    while not nearest.exists():
        nearest = nearest.parent
    if not _is_bpffs(nearest):
        raise WeirError(
            f"{path} is not on a BPF file system: rules could not outlive this command",
            "Mount it: mount -t bpf bpf /sys/fs/bpf",
        )


def _is_bpffs(path: Path) -> bool:
    """By the mount table: Python has no statfs() that gives the file system's type."""
    wanted = os.stat(path).st_dev
    device = f"{os.major(wanted)}:{os.minor(wanted)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == device and rest.split()[0] == "bpf":
            return True
    return False
