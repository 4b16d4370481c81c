"""JSON lines on a descriptor that may be slow, blocked or closed: the caller never waits for it.

At most so many lines a second; what is over, or finds no room, is counted and told in a line of its own, at most one a
second: {"suppressed": n}.
"""

from __future__ import annotations

import errno
import json
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

PER_SECOND = 200
"""Lines a second, unless told otherwise: a flood of refusals must not fill the node's log."""

ROOM = 1000
"""Lines that wait for a slow reader: some 400 kB."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What a disk says that may have room again."""

PATIENCE = 1.0
"""Seconds that ``stop`` gives to what is still to be written."""


class Lines:
    """Writes in a thread of its own. ``written`` and ``suppressed`` count what was ``put``, since the start."""

    def __init__(self, fd: int, per_second: int = PER_SECOND, clock: Callable[[], float] = time.monotonic) -> None:
        self._fd = fd
        self._per_second = per_second
        self._clock = clock
        self._second = int(clock())
        self._left = per_second
        self._queue: deque[tuple[bytes, int]] = deque()  # a line, and how many events it is
        self._untold = 0
        self._changed = threading.Condition()
        self._end = False
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._begin = b""
        self.closed = False
        self.written = 0
        self.suppressed = 0

    def start(self) -> None:
        """Start writing."""
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, for as long as PATIENCE, and end."""
        with self._changed:
            self._end = True
            self._changed.notify()
        self._thread.join(PATIENCE)

    def put(self, data: Mapping[str, Any]) -> None:
        """Write a line, or count it as suppressed; returns at once."""
        with self._changed:
            self._turn()
            if self.closed or not self._left or len(self._queue) >= ROOM:
                self.suppressed += 1
                self._untold += 1
                return
            self._left -= 1
            self._queue.append((_line(data), 1))
            self._changed.notify()

    def tick(self) -> None:
        """Tell what was suppressed when a second has ended; to be called at least once a second."""
        with self._changed:
            self._turn()

    def _turn(self) -> None:
        now = int(self._clock())
        if now == self._second:
            return
        self._second, self._left = now, self._per_second
        if self._untold and len(self._queue) < ROOM:
            self._queue.append((_line({"suppressed": self._untold}), 0))
            self._untold = 0
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._end:
                    self._changed.wait()
                if not self._queue:
                    return
                line, events = self._queue.popleft()
            written = self._write(line)
            with self._changed:
                if written:
                    self.written += events
                    continue
                self.suppressed += events
                self._untold += events
                if self.closed:
                    self.suppressed += sum(number for _, number in self._queue)
                    self._queue.clear()
                    return

    def _write(self, line: bytes) -> bool:
        """Not through sys.stdout: a thread blocked in it would hold its lock when the process ends."""
        left = line = self._begin + line
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:
                select.select((), (self._fd,), ())
            except OSError as e:
                self.closed = e.errno not in FULL
                self._begin = self._begin if left == line else b"\n"  # the next line ends the half one
                return False
        self._begin = b""
        return True


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"
