"""Starting a program: whom it runs as, what it may inherit, and how its start fails."""

import fcntl
import grp
import os
import pwd
import signal
import socket
import stat
from collections.abc import Callable

from agent.errors import WeirError
from agent.seccomp.child import Start, StartError, User, become
from agent.seccomp.filter import Filter

_STREAMS = ("standard input", "standard output", "standard error")
_PIPE_SIZE = 65536  # bytes; a report is far shorter


def find_user(text: str) -> User:
    """Return the user that ``NAME``, ``UID``, ``NAME:GROUP`` or ``UID:GID`` means. Raises WeirError when there is none.

    Without a group it gets the user's own groups, with one it gets that group alone.
    """
    name, colon, group = text.partition(":")
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        if not (name.isdecimal() and colon):
            raise WeirError(f"There is no user {name}.", "Name a user of /etc/passwd, or write UID:GID.") from None
        gid = _find_group(group)
        return User(name, int(name), gid, (gid,))
    if colon:
        gid = _find_group(group)
        return User(entry.pw_name, entry.pw_uid, gid, (gid,))
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)))


def _find_group(text: str) -> int:
    if text.isdecimal():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise WeirError(f"There is no group {text}.", "Name a group of /etc/group, or write its number.") from None


def check_inherited() -> None:
    """Raise WeirError when standard input, output or error is a network socket.

    Such a socket belongs to the cgroup that made it: no hook of the program's own cgroup would ever see it.
    """
    for fd, stream in enumerate(_STREAMS):
        if _is_network_socket(fd):
            raise WeirError(
                f"The program's {stream} would be a network socket that its policy cannot govern.",
                "Redirect it, or insist with --inherit-fds.",
            )


def _is_network_socket(fd: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
    except OSError:  # a closed descriptor
        return False
    with socket.socket(fileno=os.dup(fd)) as inherited:
        return inherited.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) != socket.AF_UNIX


def spawn(start: Start, enter: Callable[[], None]) -> int:
    """Start a program in a child and return its process id once it runs; ``enter`` is called in the child, to join a cgroup.

    Install signal handlers before (handlers, not SIG_IGN: that would outlive exec): signals stay blocked until the program runs or
    has failed. Raises StartError when the program cannot be started, WeirError when it may not be.
    """
    if not start.inherit_fds:
        check_inherited()
    seccomp = Filter(start.rules) if start.rules else None  # built before the fork, so that the child only loads it
    reader, low_writer = os.pipe()
    # Above 2 even when weir was started with its standard streams closed: the program must not get it as one of those.
    writer = fcntl.fcntl(low_writer, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(low_writer)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            become(start, seccomp, enter, writer, mask)
        os.close(writer)
        report = os.read(reader, _PIPE_SIZE)
        os.close(reader)
        if report:
            os.waitpid(pid, 0)
            raise StartError.decode(report)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
