"""Where weir keeps its things on this host: the pins and the parent of the cgroups of `weir run`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.cgroups import tree
from agent.kernel import libbpf
from agent.kernel.pins import Pins, explained


def pins_of(environment: Mapping[str, str] = os.environ) -> Pins:
    """Where the pins are: WEIR_PINS, or the usual place."""
    return Pins(Path(environment.get("WEIR_PINS", Pins.root)))


@dataclass(frozen=True)
class Place:
    """``slice`` is the cgroup whose children `weir run` makes; ``root`` is the cgroup2 mount."""

    pins: Pins
    root: Path
    slice: Path

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """The usual places. WEIR_PINS and WEIR_SLICE name others, so that two sets of rules can live on one host.

        Raises WeirError when cgroup2 is not mounted.
        """
        root = tree.mount()
        return cls(pins_of(environment), root, root / environment.get("WEIR_SLICE", "weir"))

    def living(self) -> dict[int, Path]:
        """Every cgroup that there is: id → directory."""
        return tree.paths_by_id(self.root)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time: slots and numbers of versions are chosen by reading, then writing.

        The lock is on the directory of the pins and goes with the process.
        """
        with explained("use BPF"):
            libbpf.require_privilege()
        fd = self._lock()
        try:
            yield
        finally:
            os.close(fd)

    def _lock(self) -> int:
        while True:
            self.pins.make()
            with explained(f"lock {self.pins.root}"):
                fd = os.open(self.pins.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if self.pins.root.exists() and os.path.samestat(os.fstat(fd), self.pins.root.stat()):
                return fd
            os.close(fd)  # who held the lock has unloaded: this is the lock of a directory that is gone
