"""A client that never stops: in its cgroup it tries a door that is shut, and says whenever it was open.

Two ways to it: a fresh TCP connection each time, and datagrams from one UDP socket that was there before any policy.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

HOST = "127.0.0.1"


@dataclass
class Doors:
    """Three listeners of this test: what a policy shuts, and two of which it leaves one open."""

    shut: socket.socket
    first: socket.socket
    second: socket.socket
    datagrams: socket.socket

    @property
    def ports(self) -> tuple[int, int, int]:
        """Their ports: shut, first, second."""
        return (port_of(self.shut), port_of(self.first), port_of(self.second))


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


@contextmanager
def doors() -> Iterator[Doors]:
    """Listen, outside every policy; a process of its own accepts and hangs up."""
    with socket.socket() as shut, socket.socket() as first, socket.socket() as second:
        for listener in (shut, first, second):
            listener.bind((HOST, 0))
            listener.listen(128)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            datagrams.bind((HOST, port_of(shut)))
            with child(lambda: hang_up((shut, first, second))):
                yield Doors(shut, first, second, datagrams)


def hang_up(listeners: Iterable[socket.socket]) -> None:
    """Accept and close, for ever: without it the queue of a listener fills and new clients wait."""
    with selectors.DefaultSelector() as ready:
        for listener in listeners:
            ready.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
                connection.close()


@contextmanager
def child(job: Callable[[], None]) -> Iterator[None]:
    """Run a job that does not end in a child; killed at the end."""
    pid = os.fork()
    if pid == 0:
        try:
            job()
        except BaseException:  # noqa: BLE001 - a forked child must not unwind into the parent's code
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def opens(port: int) -> bool:
    """Whether a fresh connection to the port succeeds."""
    with socket.socket() as client:
        client.settimeout(60)
        # No TIME_WAIT, of which thousands would use up the ports: RST instead of FIN.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            client.connect((HOST, port))
        except OSError:
            return False
        return True


def sends(client: socket.socket, port: int) -> bool:
    """Whether an old UDP socket may send to the port."""
    try:
        client.sendto(b"knock", (HOST, port))
    except OSError:
        return False
    return True


def knock(link: Connection, ports: tuple[int, int, int]) -> None:
    """Knock until killed. Answers each question with what Knocker.ask returns."""
    shut, first, second = ports
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as old:
        sends(old, shut)
        link.send("ready")
        attempts = successes = 0
        while True:
            successes += opens(shut) + sends(old, shut)
            attempts += 2
            if link.poll(0.002):
                link.recv()
                link.send((attempts, successes, (opens(first), opens(second))))
                attempts = successes = 0


class Knocker:
    """The test's side of the client."""

    def __init__(self, link: Connection) -> None:
        self._link = link

    def ask(self) -> tuple[int, int, tuple[bool, bool]]:
        """(Attempts, successes) at the shut door since the last question, and which of the other two are open now."""
        self._link.send("report")
        assert self._link.poll(300), "the client is stuck"
        attempts, successes, others = self._link.recv()
        return attempts, successes, others


@contextmanager
def knocker(cgroup: Path, made: Doors) -> Iterator[Knocker]:
    """The client, at work in a cgroup; killed at the end."""
    ours, theirs = Pipe()

    def work() -> None:
        (cgroup / "cgroup.procs").write_text("0")
        knock(theirs, made.ports)

    with ours, theirs, child(work):
        assert ours.recv() == "ready"
        yield Knocker(ours)


def forbidden_command(port: int, witness: Path) -> list[str]:
    """A command whose first act is a connection to the port; it leaves a file when that succeeds."""
    code = "if (exec 3<>/dev/tcp/127.0.0.1/$0) 2>/dev/null; then : > $1; fi; exec sleep 0.05"
    return ["bash", "-c", code, str(port), os.fspath(witness)]
