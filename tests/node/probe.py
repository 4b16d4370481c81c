"""A client for containers, the peer that it talks to, and policies that allow one port of this host.

with peer() as door:
    site.write("closed", closed("closed", door.port))
    kubelet.container(pod, "main", IMAGE, beat(door.port))
"""

from __future__ import annotations

import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers import SO_RCVBUFFORCE

IMAGE = "weir.test/probe:1"
"""Busybox and the client; the fixture `probe` has containerd load it."""

DATAGRAM = 20 + 8 + 10
"""IP bytes of one datagram of the client's."""

SOURCE = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* probe udp|tcp|beat|echo|knock PORT [COUNT]: exits with 0 or the errno of the first failure. */
int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
	int count = argc > 3 ? atoi(argv[3]) : 1, n;
	int udp = !strcmp(argv[1], "udp") || !strcmp(argv[1], "beat");
	int fd = socket(AF_INET, udp ? SOCK_DGRAM : SOCK_STREAM, 0);
	char data[64];

	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	signal(SIGPIPE, SIG_IGN);
	if (!strcmp(argv[1], "knock")) { /* so many sockets, one after the other: 0 when each was refused the connection */
		while (count-- > 0) {
			close(fd);
			fd = socket(AF_INET, SOCK_DGRAM, 0);
			if (fd < 0 || !connect(fd, (struct sockaddr *)&to, sizeof(to)) || errno != EACCES)
				return errno ? errno : EINVAL;
		}
		return 0;
	}
	if (fd < 0)
		return errno;
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
		return errno;
	if (!strcmp(argv[1], "udp")) /* so many datagrams of 10 bytes */
		while (count-- > 0)
			if (send(fd, "123456789", 10, 0) < 0 && errno != ECONNREFUSED)
				return errno;
	if (!strcmp(argv[1], "beat")) /* one after the other for ever, whatever comes of them */
		for (;; usleep(20000))
			send(fd, "123456789", 10, 0);
	if (!strcmp(argv[1], "echo")) /* sends back what comes */
		while ((n = read(fd, data, sizeof(data))) > 0)
			if (write(fd, data, n) < 0)
				return errno;
	return 0;
}
"""

CLOSED = """\
apiVersion: weir.dev/v1
kind: SocketPolicy
metadata: {name: NAME}
spec:
  mode: MODE
  sockets: {families: [inet, inet6, unix], protocols: [tcp, udp], listen: deny, bind: deny, transfer: deny}
  SELECTOR
  egress:
    - {name: RULE, action: allow, to: [127.0.0.0/8], ports: [PORT]}
  default: deny
"""


def closed(name: str, port: int, selector: str = "", rule: str = "door", mode: str = "enforce") -> str:
    """A policy that allows one port of this host. ``selector`` is YAML in braces."""
    text = CLOSED.replace("NAME", name).replace("PORT", str(port)).replace("RULE", rule).replace("MODE", mode)
    return text.replace("  SELECTOR\n", f"  selector: {selector}\n" if selector else "")


def run_in(cgroup: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a cgroup, where it is from before its first instruction."""
    return subprocess.run(_joined(cgroup, *command), capture_output=True, text=True, check=False)


@contextmanager
def started_in(cgroup: Path, *command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """The same for as long as the `with` lasts."""
    process = subprocess.Popen(_joined(cgroup, *command))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _joined(cgroup: Path, *command: str | Path) -> list[str]:
    return ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(cgroup), *map(str, command)]


@dataclass
class Peer:
    """A port of this host where datagrams and connections arrive."""

    port: int
    udp: socket.socket
    tcp: socket.socket

    def drained(self) -> int:
        """How many datagrams have come since the last look."""
        count = 0
        while select.select([self.udp], [], [], 0)[0]:
            self.udp.recv(64)
            count += 1
        return count

    def hears(self, seconds: float = 60) -> bool:
        """Wait for a datagram that is sent from now on."""
        self.drained()
        return bool(select.select([self.udp], [], [], seconds)[0])

    def accept(self) -> socket.socket:
        """The next connection."""
        self.tcp.settimeout(60)
        return self.tcp.accept()[0]


@contextmanager
def peer() -> Iterator[Peer]:
    """A peer with a port that nobody else has."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        port = tcp.getsockname()[1]
        udp.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)  # 50 a second may wait for minutes
        udp.bind(("127.0.0.1", port))
        yield Peer(port, udp, tcp)


def answers(connection: socket.socket, seconds: float = 60) -> bool:
    """Whether a container's `probe echo` sends back a byte in that time."""
    connection.settimeout(seconds)
    try:
        connection.sendall(b"x")
        return connection.recv(1) == b"x"
    except OSError:
        return False
