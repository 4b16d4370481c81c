"""The unmodified program of the demo: does each attempt that it reads, one JSON object a line, and says what it saw.

It knows nothing of weir. A reply is one JSON object a line: {"saw": word or errno's name, "bytes": received}. It
ends when its standard input ends.
"""

from __future__ import annotations

import ctypes
import errno
import json
import socket
import sys
from collections.abc import Callable
from typing import Any

PATIENCE = 3.0  # seconds for an answer that comes at once or not at all
HTTP = b"HEAD / HTTP/1.0\r\n\r\n"
DATAGRAM = 1200  # bytes; below every MTU, so nothing is fragmented

_IO_URING_SETUP = 425  # the same on every architecture
_IPV6_RTHDR = 57  # linux/in6.h
_VIA = "fd00:1::1"

Job = dict[str, Any]


def made(job: Job, kind: socket.SocketKind) -> socket.socket:
    """A socket of the address's family."""
    made = socket.socket(socket.AF_INET6 if ":" in job["address"] else socket.AF_INET, kind)
    made.settimeout(PATIENCE)
    return made


def target(job: Job) -> tuple[str, int]:
    return job["address"], job["port"]


def read_all(connection: socket.socket) -> int:
    """Bytes until the other side closes. Ours closes last: then no reset and no TIME_WAIT packet goes uncounted."""
    size = 0
    while data := connection.recv(65536):
        size += len(data)
    return size


def tcp(job: Job) -> tuple[str, int]:
    """Connect; on port 80 ask for a page."""
    with made(job, socket.SOCK_STREAM) as connection:
        connection.connect(target(job))
        if job["port"] == 80:
            connection.sendall(HTTP)
        connection.shutdown(socket.SHUT_WR)
        return "connected", read_all(connection)


def udp(job: Job) -> tuple[str, int]:
    """Send a datagram and wait for the answer."""
    with made(job, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"question", target(job))
        try:
            return "answered", len(sender.recv(2048))
        except TimeoutError:
            return "sent", 0


def route(job: Job) -> tuple[str, int]:
    """A datagram to a public address, by way of a private one: an IPv6 segment routing header (RFC 8754)."""
    hops = b"".join(socket.inet_pton(socket.AF_INET6, address) for address in ("::", _VIA))
    header = bytes([0, len(hops) // 8, 4, 1, 1, 0, 0, 0]) + hops
    with made(job, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IPV6, _IPV6_RTHDR, header)
        sender.sendto(b"question", target(job))
        return "sent", 0


def stranger(job: Job) -> tuple[str, int]:
    """Ask one peer, tell our own port on standard output, and see what another sends to it."""
    with made(job, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"question", target(job))
        sender.recv(2048)
        print(json.dumps({"port": sender.getsockname()[1]}), flush=True)
        try:
            return "received", len(sender.recv(2048))
        except TimeoutError:
            return "nothing", 0


def socket_(job: Job) -> tuple[str, int]:
    socket.socket(*job["socket"]).close()
    return "made", 0


def bind(job: Job) -> tuple[str, int]:
    with socket.socket(*job["socket"]) as made:
        made.bind(target(job))
        return "bound", 0


def listen(job: Job) -> tuple[str, int]:
    with socket.socket(*job["socket"]) as made:
        made.listen()
        return "listening", 0


def io_uring_setup(_: Job) -> tuple[str, int]:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_IO_URING_SETUP, 1, ctypes.create_string_buffer(256)) < 0:
        raise OSError(ctypes.get_errno(), "")
    return "made", 0


def upload_tcp(job: Job) -> tuple[str, int]:
    with made(job, socket.SOCK_STREAM) as connection:
        connection.settimeout(None)
        connection.connect(target(job))
        connection.sendall(bytes(job["size"]))
        connection.shutdown(socket.SHUT_WR)
        return "connected", read_all(connection)


def upload_udp(job: Job) -> tuple[str, int]:
    with made(job, socket.SOCK_DGRAM) as sender:
        for _ in range(job["size"]):
            sender.sendto(bytes(DATAGRAM), target(job))
        return "sent", 0


JOBS: dict[str, Callable[[Job], tuple[str, int]]] = {
    "tcp": tcp,
    "udp": udp,
    "route": route,
    "stranger": stranger,
    "socket": socket_,
    "bind": bind,
    "listen": listen,
    "io_uring_setup": io_uring_setup,
    "upload_tcp": upload_tcp,
    "upload_udp": upload_udp,
}


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        size = 0
        try:
            saw, size = JOBS[job["kind"]](job)
        except TimeoutError:
            saw = "timed out"
        except OSError as error:
            saw = errno.errorcode.get(error.errno or 0, str(error))
        print(json.dumps({"saw": saw, "bytes": size}), flush=True)


if __name__ == "__main__":
    main()
