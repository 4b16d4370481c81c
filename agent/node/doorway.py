"""Where the agent's Unix socket is: a directory for root alone, and one agent at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.errors import WeirError


def own_directory(path: Path) -> bool:
    """Make the socket's directory, mode 0700; True when it was not there.

    Raises WeirError when it is another user's, or holds what is not the agent's and others may look into it.
    """
    directory = path.parent
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        found = directory.stat()
    else:
        return True
    hint = "Give the socket a directory of its own: --socket /run/weir/agent.sock"
    if found.st_uid != os.geteuid():
        raise WeirError(f"{directory} belongs to user {found.st_uid}, who could put another socket there", hint)
    if stat.S_IMODE(found.st_mode) & 0o077:
        if any(entry.name != path.name for entry in directory.iterdir()):
            raise WeirError(f"{directory} is open to other users and holds other things", hint)
        directory.chmod(0o700)  # as the kubelet makes a hostPath
    return False


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Two agents that start at once must not both find the socket stale."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_taken(path: Path) -> bool:
    """Whether an agent listens at a path, answering or not; never waits. Raises OSError for what can be no socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as question:
        question.setblocking(False)
        try:
            question.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:
            return True  # it is there, and busy
        return True


def listen(path: Path, clients: int) -> socket.socket:
    """Listen at a path, in place of an agent that was killed. Raises WeirError when one is there."""
    if is_taken(path):
        raise WeirError(f"another agent listens at {path}", "One agent is enough for a node: stop that one first.")
    path.unlink(missing_ok=True)  # of an agent that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    listener.bind(os.fspath(path))
    path.chmod(0o600)
    listener.listen(clients)
    return listener
