"""What a started program's process does between fork and exec: lets go of weir, takes the filter, becomes the program."""

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NoReturn

from agent.errors import WeirError
from agent.seccomp.filter import Filter
from agent.seccomp.rules import Deny

NOT_FOUND = 127
"""Exit status when the command does not exist (POSIX shells, section 2.8.2)."""
NOT_EXECUTABLE = 126
"""Exit status when the command exists and cannot be executed (same section)."""
_FAILED = 1
_BUG = 3

# Python ignores these two at start (Python/pylifecycle.c), and an ignored signal stays ignored across exec.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


@dataclass(frozen=True)
class User:
    """Whom a program runs as: numeric ids, and the name they were found by for messages."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """A program to start. ``user`` None: as weir itself. ``inherit_fds``: keep descriptors above 2 that weir was given.

    Without ``rules`` there is neither a filter nor no_new_privs: that is what a policy in audit mode asks for.
    """

    argv: tuple[str, ...]
    user: User | None
    inherit_fds: bool
    rules: tuple[Deny, ...]


class StartError(WeirError):
    """The program was not started; ``status`` is the exit status that a shell would give."""

    def __init__(self, message: str, hint: str = "", status: int = _FAILED) -> None:
        super().__init__(message, hint)
        self.status = status

    def encode(self) -> bytes:
        """Return the error as bytes for the pipe between child and parent."""
        return json.dumps({"message": self.message, "hint": self.hint, "status": self.status}).encode()

    @classmethod
    def decode(cls, report: bytes) -> "StartError":
        """Return the error that ``encode`` wrote."""
        return cls(**json.loads(report))


def become(
    start: Start, seccomp: Filter | None, enter: Callable[[], None], report_fd: int, mask: Iterable[int]
) -> NoReturn:
    """Turn this forked child into the program. Every signal is blocked when it is called; ``mask`` is what exec gets.

    ``enter`` runs first, with all privileges and descriptors: it joins the cgroup. A failure is written to ``report_fd``, which must
    be close-on-exec and above 2; a bug shows its traceback. Never returns, never raises.
    """
    try:
        enter()
        if not start.inherit_fds:
            _close_inherited(keep=report_fd)
        _restore_signals()
        if start.user:
            _become_user(start.user)
        if seccomp:  # after the user, so that the program of --user needs no privilege: no_new_privs is enough
            seccomp.load()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _exec(start.argv)
    except WeirError as error:
        status = error.status if isinstance(error, StartError) else _FAILED
        os.write(report_fd, StartError(error.message, error.hint, status).encode())
        os._exit(status)
    except BaseException:  # noqa: BLE001 - a forked child must not unwind into the parent's code
        traceback.print_exc()
    os._exit(_BUG)


def _close_inherited(keep: int) -> None:
    # Read from /proc rather than counted up to a limit: a descriptor can lie above a limit that was lowered later.
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != keep:
            os.closerange(fd, fd + 1)  # unlike close() says nothing of the descriptor that listed the directory


def _restore_signals() -> None:
    for number in signal.valid_signals():
        if number in _IGNORED_BY_PYTHON or callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)


def _become_user(user: User) -> None:
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except PermissionError as error:
        raise StartError(
            f"weir may not become user {user.name}.", "Start weir as root, or leave out --user."
        ) from error
    if user.uid == 0:
        return
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        return
    raise StartError(
        f"The program could return from user {user.name} to root.",
        "Clear the securebits that keep capabilities across setuid().",
    )


def _exec(argv: tuple[str, ...]) -> NoReturn:
    command = argv[0]
    try:
        os.execvp(command, argv)
    except (FileNotFoundError, NotADirectoryError) as error:
        if "/" in command and os.path.isfile(command):
            raise StartError(
                f"{command} is there, but the interpreter or loader that it names is not.",
                "Look at its first line, or at `file` of it.",
                NOT_FOUND,
            ) from error
        raise StartError(f"{command}: command not found.", "Check the spelling and PATH.", NOT_FOUND) from error
    except OSError as error:
        raise StartError(
            f"{command} cannot be executed: {error.strerror}.",
            "Check its mode, and that it is a program or begins with #!.",
            NOT_EXECUTABLE,
        ) from error
