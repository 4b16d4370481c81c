"""Single keys from a terminal, without waiting for Enter, and the terminal as it was afterwards."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

ESCAPE = "\x1b"
END = "\x04"
"""What a key press reads as when the terminal is gone: Ctrl-D."""


@contextmanager
def keys(fd: int) -> Iterator[Callable[[float], str]]:
    """Yield a function that waits so many seconds for keys and returns what was typed, or "".

    Function and arrow keys count as nothing typed. Interrupt (Ctrl-C) and a SIGTERM end the block as exceptions, so
    that the terminal is restored; Ctrl-Z does nothing, for a stopped program would leave the terminal as it is here.
    """
    before = termios.tcgetattr(fd)
    handler = signal.signal(signal.SIGTERM, _terminated)
    wanted = termios.tcgetattr(fd)
    wanted[3] &= ~(termios.ECHO | termios.ICANON)
    wanted[6][termios.VMIN], wanted[6][termios.VTIME], wanted[6][termios.VSUSP] = 1, 0, b"\0"
    try:
        termios.tcsetattr(fd, termios.TCSADRAIN, wanted)
        yield lambda seconds: _typed(fd, seconds)
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
        signal.signal(signal.SIGTERM, handler)


def _typed(fd: int, seconds: float) -> str:
    ready, _, _ = select.select((fd,), (), (), max(0.0, seconds))
    if not ready:
        return ""
    try:
        data = os.read(fd, 256)
    except OSError:
        return END  # the terminal hung up
    text = data.decode(errors="ignore") if data else END
    return "" if text.startswith(ESCAPE) and len(text) > 1 else text


def _terminated(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)
