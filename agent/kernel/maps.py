"""weir's pinned maps, opened when they are needed, and the one element of `config`."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator
from contextlib import contextmanager

from agent.kernel import abi, libbpf
from agent.kernel.pins import Pins, explained

ZERO = c.c_uint32(0)


class Maps:
    """The maps below one directory of pins; ``close`` closes them."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._maps: dict[str, int] = {}
        self._inode = 0

    def close(self) -> None:
        """Close what is open; everything stays pinned."""
        for fd in self._maps.values():
            os.close(fd)
        self._maps.clear()

    def _map(self, name: str) -> int:
        if name not in self._maps:
            with explained(f"open weir's map {name}"):
                self._maps[name] = libbpf.obj_get(self._pins.maps / name)
        return self._maps[name]

    def _reopen(self) -> None:
        """Let go of maps that were unloaded and loaded anew meanwhile. Maps whose pins are gone altogether stay open."""
        try:
            inode = (self._pins.maps / "config").stat().st_ino
        except OSError:
            return
        if inode != self._inode:
            self.close()
            self._inode = inode

    def _config(self) -> abi.Config:
        config = abi.Config()
        with explained("read weir's configuration map"):
            libbpf.lookup(self._map("config"), ZERO, config)
        return config

    def _write_config(self, config: abi.Config) -> None:
        with explained("write weir's configuration map"):
            libbpf.update(self._map("config"), ZERO, config)

    @contextmanager
    def _switching(self) -> Iterator[int]:
        """Nothing that sockets remember of their owners counts from here on; yields the generation that comes after."""
        config = self._config()
        following = (config.generation & ~abi.UNSETTLED) % (abi.UNSETTLED - 1) + 1
        config.generation |= abi.UNSETTLED
        self._write_config(config)
        try:
            yield following
        finally:
            config.generation = following
            self._write_config(config)
