"""Single attempts to reach a destination, for jobs in a box: each raises OSError as the call that failed."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable

from tests.kernel.network import PATIENCE, Endpoint, family_of
from tests.servers import BANNER, HTTP_PORTS
from tests.world import LINK

LONG = PATIENCE
"""Seconds that an attempt may take which must succeed."""
SHORT = 0.3 if float(os.environ.get("WEIR_TEST_SCALE", "1")) >= 1 else 2.0
"""Seconds that an attempt is given which must not: what its packets would do shows in the peer's counters."""

NOBODY = 65534
IP_BIND_ADDRESS_NO_PORT, IP_LOCAL_PORT_RANGE = 24, 51  # linux/in.h

_LIBC = ctypes.CDLL(None, use_errno=True)

Prepare = Callable[[socket.socket], object]


def nothing(_: socket.socket) -> None:
    """Prepare nothing."""


def endpoint(address: str, port: int) -> Endpoint:
    """The address as Python's socket calls take it, on the link where it is link-local."""
    if family_of(address) == socket.AF_INET:
        return address, port
    return address, port, 0, socket.if_nametoindex(LINK) if address.lower().startswith("fe8") else 0


def abort(made: socket.socket) -> None:
    """Let close() reset the connection: what could not be sent is not tried again behind the test's back."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))


def tcp(address: str, port: int, prepare: Prepare = nothing, timeout: float = LONG) -> None:
    """Connect and wait for the server's word; TimeoutError when nothing answers."""
    with socket.socket(family_of(address), socket.SOCK_STREAM) as made:
        made.settimeout(timeout)
        abort(made)
        prepare(made)
        made.connect(endpoint(address, port))
        if port not in HTTP_PORTS:
            assert made.recv(1) == BANNER


def udp_connected(address: str, port: int, prepare: Prepare = nothing, timeout: float = LONG) -> None:
    """Connect a datagram socket, send, and wait for the echo."""
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as made:
        made.settimeout(timeout)
        prepare(made)
        made.connect(endpoint(address, port))
        made.send(b"hello")
        assert made.recv(100) == b"hello"


def udp_sendto(address: str, port: int, prepare: Prepare = nothing, timeout: float = LONG) -> None:
    """Send a datagram from an unconnected socket, and wait for the echo."""
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as made:
        made.settimeout(timeout)
        prepare(made)
        made.sendto(b"hello", endpoint(address, port))
        assert made.recv(100) == b"hello"


EVERY_WAY = (tcp, udp_connected, udp_sendto)


def sockaddr(family: int, address: str, port: int) -> bytes:
    """A sockaddr_in or sockaddr_in6, by the form of the address, whose family says what it likes."""
    if ":" in address:
        return struct.pack(
            "=H2sI16sI", family, port.to_bytes(2, "big"), 0, socket.inet_pton(socket.AF_INET6, address), 0
        )
    return struct.pack("=H2s4s8x", family, port.to_bytes(2, "big"), socket.inet_aton(address))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def raw_connect(made: socket.socket, to: bytes) -> None:
    """connect() with any bytes as the address."""
    _checked(_LIBC.connect(made.fileno(), to, len(to)))


def raw_bind(made: socket.socket, to: bytes) -> None:
    """bind() with any bytes as the address."""
    _checked(_LIBC.bind(made.fileno(), to, len(to)))


def raw_sendto(made: socket.socket, data: bytes, to: bytes, flags: int = 0) -> None:
    """sendto() with any bytes as the address."""
    _checked(_LIBC.sendto(made.fileno(), data, len(data), flags, to, len(to)))


def disconnect(made: socket.socket) -> None:
    """connect() to AF_UNSPEC."""
    raw_connect(made, struct.pack("=H14x", socket.AF_UNSPEC))


def become_nobody() -> None:
    """Give up root, for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
