"""The test network itself, without weir: any address answers, nothing leaves, and the counters agree."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests import addresses, need
from tests.kernel.network import PATIENCE, quiet
from tests.servers import BANNER, SINK_PORT, Received
from tests.world import CLIENT, CLIENT6, LINK, Count, Side, World, remove_leftovers

_UDP_SEGMENT = 103  # linux/udp.h
_EVERYWHERE = (
    addresses.PUBLIC,
    addresses.PUBLIC6,
    addresses.GOOGLE,
    addresses.GOOGLE6,
    addresses.GMAIL_SMTP,
    *addresses.GOOGLE_DNS,
    *addresses.PRIVATE,
    addresses.PRIVATE6,
    addresses.METADATA,
    addresses.LINK_LOCAL6,
    addresses.NAT64_PRIVATE,
    addresses.SIX_TO_FOUR_PRIVATE,
    addresses.COMPATIBLE_PRIVATE,
    "fe80::abcd:1",
    "240.1.2.3",
    "::ffff:93.184.216.34",
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    need.root()
    with World(offloads=False) as made:
        yield made


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def endpoint(address: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """A sockaddr in the client's namespace, with the link as the zone of link-local addresses."""
    if family(address) == socket.AF_INET:
        return (address, port)
    return (address, port, 0, socket.if_nametoindex(LINK) if address.startswith("fe80") else 0)


def client_socket(world: World, address: str, kind: socket.SocketKind) -> socket.socket:
    made = socket.socket(family(address), kind)
    made.settimeout(PATIENCE)
    return made


def bytes_received(world: World, protocol: str, address: str, port: int, at_least: int) -> int:
    """Payload bytes that the servers have read; waits until they are at least so many, for a while."""
    deadline = time.monotonic() + PATIENCE
    while True:
        total = sum(r.bytes for r in world.received() if (r.protocol, r.address, r.port) == (protocol, address, port))
        if total >= at_least or time.monotonic() > deadline:
            return total
        time.sleep(0.02)


@pytest.mark.parametrize("address", _EVERYWHERE)
def test_tcp_is_echoed_on_any_port(world: World, address: str) -> None:
    with world.client(), client_socket(world, address, socket.SOCK_STREAM) as tcp:
        tcp.connect(endpoint(address, 50123))
        tcp.sendall(b"hello")
        answer = b""
        while len(answer) < 6:
            answer += tcp.recv(100)
        assert answer == BANNER + b"hello"


@pytest.mark.parametrize("address", _EVERYWHERE)
def test_udp_is_echoed_from_the_address_it_was_sent_to(world: World, address: str) -> None:
    with world.client(), client_socket(world, address, socket.SOCK_DGRAM) as udp:
        udp.sendto(b"hello", endpoint(address, 53))
        answer, source = udp.recvfrom(100)
        assert answer == b"hello"
        assert source[1] == 53
        assert ip_address(source[0].partition("%")[0]) == ip_address(address)


def test_one_udp_socket_gets_every_answer(world: World) -> None:
    with world.client(), client_socket(world, "1.1.1.1", socket.SOCK_DGRAM) as udp:
        for port in range(1000, 1200):
            udp.sendto(str(port).encode(), ("1.1.1.1", port))
            answer, source = udp.recvfrom(100)
            assert (answer, source) == (str(port).encode(), ("1.1.1.1", port))


def test_http(world: World) -> None:
    with world.client(), client_socket(world, addresses.PUBLIC, socket.SOCK_STREAM) as tcp:
        tcp.connect((addresses.PUBLIC, 80))
        tcp.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
        assert tcp.recv(1000).startswith(b"HTTP/1.0 200 OK\r\n")
        assert tcp.recv(1000) == b""


def test_servers_count_by_destination(world: World) -> None:
    with world.client(), client_socket(world, addresses.PUBLIC6, socket.SOCK_STREAM) as tcp:
        tcp.connect((addresses.PUBLIC6, SINK_PORT))
        tcp.sendall(b"x" * 100_000)
    assert bytes_received(world, "tcp", addresses.PUBLIC6, SINK_PORT, 100_000) == 100_000
    assert Received("tcp", CLIENT6, addresses.PUBLIC6, SINK_PORT, 1, 100_000) in world.received()


@pytest.mark.parametrize(("address", "headers"), [(addresses.PUBLIC, 28), (addresses.PUBLIC6, 48)])
def test_counters_are_wire_exact_for_udp(world: World, address: str, headers: int) -> None:
    """One call makes 20 packets by UDP_SEGMENT: with offloads off the link carries, and counts, each of them."""
    before = world.counters()
    with world.client(), client_socket(world, address, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 1000)
        udp.sendto(b"x" * 20_000, (address, SINK_PORT))
        assert bytes_received(world, "udp", address, SINK_PORT, 20_000) == 20_000
    assert world.counters() - before == Count(20, 20 * (1000 + headers))


@pytest.mark.parametrize("address", [addresses.PUBLIC, addresses.PUBLIC6])
def test_device_and_nftables_agree_on_a_tcp_stream(world: World, address: str) -> None:
    name = f"from{family(address)}"
    world.add_counter(name, f"ip saddr {CLIENT}" if family(address) == socket.AF_INET else f"ip6 saddr {CLIENT6}")
    before = world.counters()
    with world.client(), client_socket(world, address, socket.SOCK_STREAM) as tcp:
        tcp.connect((address, SINK_PORT))
        tcp.sendall(b"x" * 5_000_000)
        tcp.shutdown(socket.SHUT_WR)
        assert tcp.recv(1) == b""
    device = quiet(world.counters) - before  # the last acknowledgement too
    assert device == world.counter(name)
    assert device.packets > 5_000_000 / 1460
    assert device.bytes > 5_000_000


def test_nothing_leaves_the_machine(world: World) -> None:
    """Each namespace has lo and the link, and no forwarding: the default routes end in the other namespace."""
    for side in Side:
        links = json.loads(world.run(["ip", "-json", "link"], side))
        assert [link["ifname"] for link in links] == ["lo", LINK]
    assert world.run(["cat", "/proc/sys/net/ipv4/ip_forward"], Side.PEER).strip() == "0"


def test_thousands_of_connects_are_quick(world: World) -> None:
    """None, or next to none, waits for the second after which a lost SYN is sent again."""
    with world.client():
        before = syns_sent_again()
        for number in range(2000):
            address = f"{1 + number % 9}.{number % 251}.7.7"
            with client_socket(world, address, socket.SOCK_STREAM) as tcp:
                tcp.connect((address, 1 + number * 31 % 65535))
        assert syns_sent_again() - before < 20


def syns_sent_again() -> int:
    """Of this thread's network namespace (TCPSynRetrans of snmp_counter.rst)."""
    lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
    return int(values[names.index("TCPSynRetrans")])


def test_leftovers_of_a_dead_process_are_removed() -> None:
    need.root()
    dead = subprocess.Popen(["true"])
    dead.wait()
    name = f"weir-c-{dead.pid}-0000"
    subprocess.run(["ip", "netns", "add", name], check=True)
    remove_leftovers()
    assert name not in subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout


def test_world_leaves_nothing_behind() -> None:
    need.root()
    with World() as made:
        name = made.name(Side.PEER)
        assert name in subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout
    assert name not in subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout
