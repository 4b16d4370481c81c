"""One-shot containers: a static program whose first act is to send, a listener that would take it, and many at a time.

with door() as opened:
    crowd = Crowd(runc, lambda number: attempt(KINDS[number % 2], opened.port))
    crowd.run(1000)
    assert not opened.arrived()
"""

from __future__ import annotations

import itertools
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.node import remains
from tests.node.runc import Runc

PROGRAM = "/once"
"""Where the program is in a container."""

KINDS = ("tcp", "udp")
THROUGH, REFUSED = 40, 41
"""Exit codes of the program; any other says that something else went wrong."""

IP_UDP = 28
"""Bytes of the headers of a datagram, from the IP header on."""

SOURCE = """
#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

/* once tcp|udp PORT [DATAGRAMS [BYTES [stay]]] */
int main(int argc, char **argv)
{
	static char data[65536];
	int tcp = argv[1][0] == 't', count = argc > 3 ? atoi(argv[3]) : 1, size = argc > 4 ? atoi(argv[4]) : 1;
	struct sockaddr_in to = {AF_INET, htons(atoi(argv[2])), {htonl(INADDR_LOOPBACK)}};
	int s = socket(AF_INET, tcp ? SOCK_STREAM : SOCK_DGRAM, 0), done = s;

	if (tcp && s >= 0)
		done = connect(s, (void *)&to, sizeof(to));
	while (!tcp && done >= 0 && count--)
		done = sendto(s, data, size, 0, (void *)&to, sizeof(to));
	if (done < 0)
		return errno == EACCES || errno == EPERM ? 41 : errno;
	if (argc > 5)
		for (;;)
			pause();
	return 40;
}
"""


def attempt(kind: str, port: int, *more: str | int) -> list[str]:
    """The command of a container that tries a door once; ``more``: datagrams, bytes of each, and "stay"."""
    return [PROGRAM, kind, str(port), *map(str, more)]


@dataclass(frozen=True)
class Door:
    """A TCP and a UDP socket on one port of 127.0.0.1, under no policy. ``arrived`` empties their queues."""

    tcp: socket.socket
    udp: socket.socket
    port: int

    def arrived(self) -> Counter[str]:
        """How many connections and datagrams have come since the last question."""
        found: Counter[str] = Counter()
        while _takes(self.tcp.accept):
            found["tcp"] += 1
        while _takes(lambda: self.udp.recv(1)):
            found["udp"] += 1
        return found


def _takes(take: Callable[[], object]) -> bool:
    try:
        taken = take()
    except BlockingIOError:
        return False
    if isinstance(taken, tuple):
        taken[0].close()
    return True


@contextmanager
def door() -> Iterator[Door]:
    """Listen on a port of this host."""
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        tcp.listen(128)
        for one in (tcp, udp):
            one.setblocking(False)
        yield Door(tcp, udp, port)


@dataclass
class Crowd:
    """Containers one after the other, ``at_once`` at a time; each has a name and a cgroup of its own.

    ``command`` gives the command of the container of that number. ``ends`` are the exit codes of those that have ended,
    ``complaints`` what there is to read of those that ended in an unexpected way.
    """

    runc: Runc
    command: Callable[[int], Sequence[str]]
    name: str = "once"
    at_once: int = 3
    ends: list[int] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @contextmanager
    def running(self, count: int) -> Iterator[threading.Event]:
        """Run so many beside the body of the `with`, and on until it ends; afterwards none is running.

        The event is set when ``count`` have been started.
        """
        numbers, enough, over, given_up = itertools.count(), threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            for number in numbers:
                if number >= count:
                    enough.set()
                if given_up.is_set() or (enough.is_set() and over.is_set()):
                    return
                self._one(number)

        workers = [threading.Thread(target=work) for _ in range(self.at_once)]
        for worker in workers:
            worker.start()
        try:
            yield enough
        except BaseException:
            given_up.set()
            raise
        finally:
            over.set()
            for worker in workers:
                worker.join()

    def run(self, count: int) -> None:
        """Run so many, or a few more, to their end."""
        with self.running(count):
            pass

    def await_more(self) -> None:
        """Wait until a container has lived its whole life from now on."""
        wanted = len(self.ends) + self.at_once + 1
        remains.wait("containers to end", lambda: len(self.ends) >= wanted)

    def _one(self, number: int) -> None:
        command = self.runc.command(f"{self.name}-{number}", self.command(number))
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode not in (THROUGH, REFUSED):
            self.complaints.append(f"{done.returncode}: {done.stderr[-300:]}")
        self.ends.append(done.returncode)
