"""A terminal of a test's own: a command under a shell, the keys that are typed, and what is on the screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shlex
import signal
import struct
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.kernel.site import ROOT, TIMEOUT

ROWS, COLUMNS = 30, 160

HOME = "\x1b[H"
"""How a program that draws the whole screen begins."""

LAST_WORD = "q quit"
"""With which `weir top` ends each."""

ALTERNATE, ORDINARY = "\x1b[?1049h", "\x1b[?1049l"
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"
"""What it writes to take the screen and the cursor, and to give them back (xterm's control sequences)."""

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """The far end. ``text`` is all that has been written so far."""

    def __init__(self, fd: int, shell: int) -> None:
        self.fd = fd
        self.shell = shell
        self.text = ""

    def type(self, keys: str) -> None:
        """Press keys; \x03 is Ctrl-C."""
        os.write(self.fd, keys.encode())

    def until(self, holds: Callable[[], object]) -> None:
        """Take in what is written until something holds; fails after a long while."""
        deadline = time.monotonic() + TIMEOUT
        while not holds():
            assert time.monotonic() < deadline, self.text[-3000:]
            if select.select((self.fd,), (), (), 1)[0]:
                self.text += os.read(self.fd, 65536).decode(errors="replace")

    def frame(self) -> list[str]:
        """The lines of the last screen that was drawn to its last word, without its colours."""
        frames = [frame for frame in self.text.split(HOME)[1:] if LAST_WORD in frame]
        return [line.rstrip() for line in CODES.sub("", frames[-1]).splitlines()] if frames else []

    def pids(self) -> Sequence[int]:
        """The processes that the shell has started."""
        return [int(pid) for pid in Path(f"/proc/{self.shell}/task/{self.shell}/children").read_text().split()]


@contextmanager
def terminal(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    """Run a command in a terminal. The shell around it writes `stty -g` before and after, and the exit status."""
    script = (
        f"trap : INT; echo before=$(stty -g); {shlex.join(command)}; echo status=$?; echo after=$(stty -g).; read end"
    )
    shell, fd = pty.fork()
    if shell == 0:
        try:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
            os.chdir(ROOT)
            os.execve("/bin/sh", ["sh", "-c", script], {**environment, "TERM": "xterm-256color"})
        finally:
            os._exit(127)
    try:
        yield Terminal(fd, shell)
    finally:
        os.killpg(shell, signal.SIGKILL)
        os.waitpid(shell, 0)
        os.close(fd)
