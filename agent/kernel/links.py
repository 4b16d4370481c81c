"""The programs' links: one directory of pins for each cgroup that the programs are attached to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agent.kernel import abi, libbpf
from agent.kernel.pins import Pins, explained


class Links:
    """The links below one directory of pins."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins

    def attached(self) -> Mapping[int, frozenset[str]]:
        """Per cgroup id with programs attached: their names. A cgroup that is gone is not listed.

        For readers without the lock too: what is removed while it is looked at is not there.
        """
        found = {}
        for directory in self._directories():
            names = frozenset(pin.name for pin in _entries(directory) if self._cgroup_of(pin))
            if names:
                found[int(directory.name)] = names
        return found

    def _directories(self) -> list[Path]:
        return [path for path in _entries(self._pins.links) if path.is_dir()]

    def _cgroup_of(self, pin: Path) -> int:
        """The id of the cgroup that a link is attached to; 0 when there is none, or the link is gone."""
        with explained(f"read the link {pin}"):
            try:
                fd = libbpf.obj_get(pin)
            except FileNotFoundError:
                return 0
            with opened(fd):
                return int(libbpf.link_info(fd).cgroup_id)

    def attach(self, cgroup: Path) -> None:
        """Attach every program to a cgroup; those that are attached stay."""
        with explained(f"attach to {cgroup}"), ExitStack() as stack:
            cgroup_fd = stack.enter_context(opened(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
            directory = self._pins.links / str(os.fstat(cgroup_fd).st_ino)
            directory.mkdir(mode=0o700, exist_ok=True)
            for name, (_, attach_type) in abi.PROGRAMS.items():
                pin = directory / name
                if pin.exists() and self._cgroup_of(pin):
                    continue
                pin.unlink(missing_ok=True)
                program = stack.enter_context(opened(libbpf.obj_get(self._pins.programs / name)))
                link = stack.enter_context(opened(libbpf.link_create(program, cgroup_fd, attach_type)))
                libbpf.obj_pin(link, pin)

    def detach(self, cgroup_id: int) -> None:
        """Remove weir's programs from a cgroup."""
        directory = self._pins.links / str(cgroup_id)
        with explained(f"detach from cgroup {cgroup_id}"):
            for pin in list(directory.iterdir()) if directory.exists() else []:
                pin.unlink()
            if directory.exists():
                directory.rmdir()

    def sweep(self) -> None:
        """Remove the pins of links whose cgroup is gone."""
        alive = self.attached()
        for directory in self._directories():
            if int(directory.name) not in alive:
                self.detach(int(directory.name))


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


@contextmanager
def opened(fd: int) -> Iterator[int]:
    """Close a descriptor at the end."""
    try:
        yield fd
    finally:
        os.close(fd)
