"""Holds weir's links open, so that they outlive their pins: unmounting bpffs frees every pinned object that nobody holds.

Only the agent does this. When bpffs is mounted again it pins everything as it was.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from agent.kernel import libbpf
from agent.kernel.pins import Pins, explained


class Keeper:
    """Descriptors of everything pinned, by the pin's path."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._held: dict[Path, tuple[int, int]] = {}
        self._half_pinned = False

    def hold(self) -> None:
        """Hold what is pinned now, and let go of what was replaced or removed while bpffs was there.

        When bpffs goes away during the look, everything stays held: the links' last holder must not let go of them.
        """
        present: dict[Path, int] = {}
        for directory in (self._pins.maps, self._pins.programs, self._pins.rules, *self._link_directories()):
            with suppress(OSError), os.scandir(directory) as entries:
                present |= {
                    Path(entry.path): entry.inode() for entry in entries if entry.is_file(follow_symlinks=False)
                }
        if self.is_orphaned:
            return
        for path in [path for path, (_, inode) in self._held.items() if present.get(path) != inode]:
            os.close(self._held.pop(path)[0])
        for path in present.keys() - self._held.keys():
            with suppress(OSError):
                self._held[path] = (libbpf.obj_get(path), present[path])

    def _link_directories(self) -> list[Path]:
        with suppress(OSError):
            return list(self._pins.links.iterdir())
        return []

    @property
    def is_orphaned(self) -> bool:
        """Whether objects are held whose pins are all gone: bpffs was unmounted, or another one mounted over it."""
        return self._half_pinned or (bool(self._held) and not any(path.exists() for path in self._held))

    def pin_again(self) -> None:
        """Pin everything as it was: the links last, so that who finds one finds the maps that it uses.

        Raises WeirError while there is no bpffs, and when it does not come to the end; then it is to be done again.
        """
        self._pins.make()
        self._half_pinned = True
        for path in sorted(self._held, key=lambda path: path.is_relative_to(self._pins.links)):
            with explained(f"pin {path} again"):
                path.parent.mkdir(mode=0o700, exist_ok=True)
                if not path.exists():
                    libbpf.obj_pin(self._held[path][0], path)
                self._held[path] = self._held[path][0], path.stat().st_ino
        self._half_pinned = False

    def close(self) -> None:
        """Let go of everything; what is pinned stays."""
        for fd, _ in self._held.values():
            os.close(fd)
        self._held.clear()
