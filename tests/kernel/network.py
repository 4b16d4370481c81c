"""What tests do with a World's network beyond its own methods: clients in the peer's namespace, silence, the link's limits."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tests.servers import transparent
from tests.world import LINK, World

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds that something may take which must come; an emulated or busy machine is slow."""

GSO_MAX_SIZE = {socket.AF_INET: 63, socket.AF_INET6: 41}  # IFLA_GSO_IPV4_MAX_SIZE, IFLA_GSO_MAX_SIZE: linux/if_link.h
UNLIMITED = 65536
_RTM_NEWLINK, _REQUEST_ACK = 16, 5  # linux/rtnetlink.h, linux/netlink.h

Endpoint = tuple[str, int] | tuple[str, int, int, int]


def family_of(address: str) -> socket.AddressFamily:
    """The family of a textual address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def from_peer(world: World, source: str, kind: socket.SocketKind, port: int = 0) -> socket.socket:
    """A socket in the peer's namespace, bound to any address but the client's; answers find it once it is connected."""
    with world.peer():
        made = transparent(family_of(source), kind)
    made.setblocking(True)
    made.settimeout(PATIENCE)
    made.bind((source, port))
    return made


def quiet(read: Callable[[], T]) -> T:
    """Read until nothing changes: late acknowledgements are on their way."""
    last = read()
    while True:
        time.sleep(0.1)
        now = read()
        if now == last:
            return now
        last = now


@contextmanager
def silence(world: World) -> Iterator[None]:
    """Assert that no packet at all leaves the client meanwhile."""
    before = quiet(world.counters)
    yield
    assert quiet(world.counters) == before, "packets left the client"


def heard(world: World, address: str, port: int, protocol: str = "udp") -> int:
    """How many datagrams or connections have reached the servers at one destination."""
    wanted = (protocol, address, port)
    return quiet(lambda: sum(r.count for r in world.received() if (r.protocol, r.address, r.port) == wanted))


def set_gso_max_size(world: World, family: socket.AddressFamily, size: int) -> None:
    """Allow super-packets up to a size. A kernel that does not know the limit ignores it; `ip` knows both since 6.3 only."""
    with world.client():
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        index = socket.if_nametoindex(LINK)
    attribute = struct.pack("=HHI", 8, GSO_MAX_SIZE[family], size)
    body = struct.pack("=BxHiII", 0, 0, index, 0, 0) + attribute
    with netlink:
        netlink.send(struct.pack("=IHHII", 16 + len(body), _RTM_NEWLINK, _REQUEST_ACK, 1, 0) + body)
        (error,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if error:
        raise OSError(-error, f"gso_max_size {size}")
