"""Bytes: what weir counts is what a wire would carry, to the byte, from the IP header on.

The peer's device counts, on a link that is made to segment like a wire (World(offloads=False)): the programs see
super-packets of up to 64 KiB and more, the device sees what is left of them. Linux's own exceptions, which no program on
a cgroup's egress hook sees, are the tests at the end: fragments, and what the kernel sends without a socket (the reset
that refuses a stray segment, the last acknowledgement of a connection in TIME_WAIT).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.kernel.abi import Hook, Reason
from tests import addresses, need
from tests.kernel.cage import Box, Cage, Link, Refusal, errno_of
from tests.kernel.network import UNLIMITED, family_of, from_peer, quiet, set_gso_max_size
from tests.kernel.rules import OPEN, deny, policy
from tests.servers import SINK_PORT
from tests.world import CLIENT, CLIENT6, Count, Side, World

_ROOT = Path(__file__).resolve().parents[2]
PUBLIC = (addresses.PUBLIC, addresses.PUBLIC6)
STREAM = 5_000_000
TCP_HEADERS = {socket.AF_INET: 52, socket.AF_INET6: 72}  # with the timestamps option, as every segment of ours has it
UDP_HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}
UDP_SEGMENT = 103  # linux/udp.h


@pytest.fixture(scope="module")
def wire() -> Iterator[World]:
    """A World whose link carries one segment in a packet."""
    need.root()
    with World(offloads=False) as made:
        yield made


@pytest.fixture
def sender(cage: Cage, wire: World) -> Iterator[Box]:
    """A box on the wire that may send everywhere."""
    with cage.box(wire) as made:
        made.enrol(policy())
        yield made


def stream(address: str, size: int = STREAM, write: int = 1 << 20, pause: float = 0) -> None:
    """Send a stream to the sink and wait until it has been read: then every acknowledgement is a full socket's."""
    with socket.create_connection((address, SINK_PORT)) as tcp:
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, size, write):
            tcp.sendall(b"x" * min(write, size - start))
            time.sleep(pause)
        tcp.shutdown(socket.SHUT_WR)
        assert tcp.recv(1) == b""


def datagrams(address: str, size: int, count: int, segment: int = 0) -> None:
    """Send datagrams to the sink; with ``segment`` each call is cut into datagrams of that size."""
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as udp:
        if segment:
            udp.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
        for _ in range(count):
            udp.sendto(b"x" * size, (address, SINK_PORT))


def counted(box: Box, world: World, job: Callable[[], object]) -> tuple[Count, Count]:
    """Run a job; what weir and what the peer's device have counted for it."""
    before = quiet(world.counters)
    box.forget()
    box.run(job)
    device = quiet(world.counters) - before
    counters = box.counters()
    outside = [kind for kind in counters.bytes if kind != "loopback"]
    weir = Count(sum(counters.packets[kind] for kind in outside), sum(counters.bytes[kind] for kind in outside))
    return weir, device


@pytest.mark.parametrize("address", PUBLIC)
def test_tcp_super_packets(sender: Box, wire: World, address: str) -> None:
    name = f"stream{family_of(address)}"
    wire.add_counter(name, f"ip saddr {CLIENT}" if family_of(address) == socket.AF_INET else f"ip6 saddr {CLIENT6}")
    weir, device = counted(sender, wire, lambda: stream(address))
    assert weir == device == wire.counter(name)
    assert device.packets > STREAM / 1500


@pytest.mark.parametrize("address", PUBLIC)
def test_tcp_without_super_packets(sender: Box, wire: World, address: str) -> None:
    weir, device = counted(sender, wire, lambda: stream(address, size=20_000, write=400, pause=0.002))
    assert weir == device
    assert device.packets >= 50


@pytest.mark.parametrize("address", PUBLIC)
def test_tcp_retransmissions_count_again(sender: Box, wire: World, address: str) -> None:
    """Every seventh data packet is lost behind the device that counts."""
    rule = [
        "add",
        "rule",
        "inet",
        "weir",
        "count",
        "meta",
        "length",
        ">",
        "1000",
        "numgen",
        "inc",
        "mod",
        "7",
        "0",
        "drop",
    ]
    wire.run(["nft", *rule], Side.PEER)
    try:
        weir, device = counted(sender, wire, lambda: stream(address, 300_000))
    finally:
        wire.run(["nft", "flush", "chain", "inet", "weir", "count"], Side.PEER)
    assert weir == device
    assert device.bytes > 300_000 * 1.1


@pytest.mark.parametrize("address", PUBLIC)
def test_udp(sender: Box, wire: World, address: str) -> None:
    def job() -> None:
        for size in (0, 1, 100, 1400):
            datagrams(address, size, 20)

    weir, device = counted(sender, wire, job)
    assert weir == device == Count(80, 20 * 1501 + 80 * UDP_HEADERS[family_of(address)])


@pytest.mark.parametrize("address", PUBLIC)
@pytest.mark.parametrize(("size", "packets"), [(1000, 1), (2000, 2), (20_000, 20), (20_001, 21), (999, 1)])
def test_udp_segment(sender: Box, wire: World, address: str, size: int, packets: int) -> None:
    weir, device = counted(sender, wire, lambda: datagrams(address, size, 3, segment=1000))
    assert weir == device == Count(3 * packets, 3 * (size + packets * UDP_HEADERS[family_of(address)]))


@pytest.mark.parametrize("address", PUBLIC)
def test_device_with_segmentation_of_its_own(cage: Cage, world: World, address: str) -> None:
    """With offloads the link carries super-packets whole; weir counts them as the wire behind a real card would."""
    with cage.box(world) as box:
        box.enrol(policy())
        weir, device = counted(box, world, lambda: stream(address))
    assert weir.packets > 2 * device.packets
    assert weir.bytes - device.bytes == (weir.packets - device.packets) * TCP_HEADERS[family_of(address)]


@pytest.mark.parametrize("address", PUBLIC)
def test_big_tcp(sender: Box, wire: World, address: str) -> None:
    """Super-packets over 64 KiB: IPv6 has them since Linux 5.19, with a header that the wire never sees; IPv4 since 6.3."""
    table = "ip" if family_of(address) == socket.AF_INET else "ip6"
    try:
        set_gso_max_size(wire, family_of(address), 180_000)
    except OSError as error:  # before 5.19 the limit is 64 KiB: EINVAL
        need.skip(f"needs a kernel with BIG TCP for {family_of(address).name}: {error}")
    wire.run(
        ["nft", "-f", "-"],
        text=f"""\
        table {table} big {{
            counter big {{ }}
            chain out {{ type filter hook output priority 0; meta length > 66000 counter name big; }}
        }}""",
    )
    try:
        weir, device = counted(sender, wire, lambda: stream(address, 4 * STREAM, write=4 * STREAM))
        listed = json.loads(wire.run(["nft", "-json", "list", "counters", "table", table, "big"]))["nftables"]
    finally:
        set_gso_max_size(wire, family_of(address), UNLIMITED)
        wire.run(["nft", "delete", "table", table, "big"])
    assert weir == device
    if not next(entry["counter"]["packets"] for entry in listed if "counter" in entry):
        need.skip(f"needs a kernel with BIG TCP for {family_of(address).name}")


def test_destination_classes(sender: Box) -> None:
    def job() -> None:
        for address, size in ((addresses.PUBLIC, 10), (addresses.PUBLIC6, 20), (addresses.GOOGLE, 30)):
            datagrams(address, size, 1)
        for address in (*addresses.PRIVATE, addresses.PRIVATE6, addresses.METADATA):
            datagrams(address, 100, 1)
        for address in ("127.0.0.1", "::1", "0.0.0.0", "::ffff:127.0.0.9", CLIENT, CLIENT6):
            datagrams(address, 1000, 1)

    sender.run(job)
    counters = sender.counters()
    assert counters.bytes == {
        "public": 60 + 28 + 48 + 28,
        "private": 600 + 5 * 28 + 48,
        "loopback": 6000 + 3 * 28 + 28 + 2 * 48,
    }
    assert counters.packets == {"public": 3, "private": 6, "loopback": 6}


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_refused_is_not_counted(sender: Box, wire: World, address: str) -> None:
    """In connect(), in sendto(), and in the packet program: a policy switched under a socket that is connected."""
    sender.enrol(policy(deny(address)))
    weir, device = counted(
        sender, wire, lambda: [errno_of(lambda: datagrams(address, 10, 1)), errno_of(lambda: stream(address))]
    )
    assert weir == device == Count(0, 0)
    sender.enrol(policy())
    with sender.start(lambda link: connected(link, address)) as link:
        link.receive()
        sender.enrol(policy(deny(address)))
        sender.forget()
        before = wire.counters()
        link.send()
        link.receive()
        assert wire.counters() - before == Count(0, 0)
    assert sum(sender.counters().bytes.values()) == 0
    assert sender.refusals() == {Refusal(Hook.EGRESS, Reason.RULE, 0): 10}


def connected(link: Link, address: str) -> None:
    """Connect a UDP socket, wait for a word, and try to send ten datagrams."""
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as udp:
        udp.connect((address, SINK_PORT))
        link.send()
        link.receive()
        assert all(errno_of(lambda: udp.send(b"x")) for _ in range(10))


PROGRAM = """
    import socket
    for address in {addresses}:
        with socket.create_connection((address, 9)) as tcp:
            tcp.sendall(b"x" * 3_000_000)
            tcp.shutdown(socket.SHUT_WR)
            tcp.recv(1)
"""


def test_summary_of_weir_run(cage: Cage, box: Box, wire: World, tmp_path: Path) -> None:
    """The box stands for weir's slice here: `weir run` makes its own cgroup below it."""
    file = tmp_path / "open.yaml"
    file.write_text(
        "apiVersion: weir.dev/v1\nkind: SocketPolicy\nmetadata: {name: open}\n"
        "spec: {mode: enforce, sockets: {families: [inet, inet6, unix], protocols: [tcp, udp], listen: deny, bind: deny,"
        " transfer: deny}, default: allow}\n"
    )
    below = str(box.path.relative_to(cage.place.root))
    environment = {**os.environ, "WEIR_PINS": str(cage.place.pins.root), "WEIR_SLICE": below}
    code = textwrap.dedent(PROGRAM.format(addresses=PUBLIC))
    weir = [sys.executable, "-m", "agent", "run", "--json", "-p", str(file), "--", sys.executable, "-c", code]
    before = quiet(wire.counters)
    with wire.popen(weir, stderr=-1, env=environment, cwd=_ROOT) as running:
        said = running.communicate()[1]
    device = quiet(wire.counters) - before
    assert running.returncode == 0, said
    egress = json.loads(said.splitlines()[-1])["egress"]
    assert Count(**egress["public"]) == device
    assert egress["private"]["bytes"] == egress["loopback"]["bytes"] == 0


@pytest.mark.parametrize(("address", "fragments", "header"), [(addresses.PUBLIC, 6, 20), (addresses.PUBLIC6, 6, 48)])
def test_exception_fragments(sender: Box, wire: World, address: str, fragments: int, header: int) -> None:
    """The kernel cuts a datagram after the hook: weir counts the headers of one packet, in IPv6 without the extension."""
    weir, device = counted(sender, wire, lambda: datagrams(address, 8000, 1))
    assert weir == Count(1, 8000 + UDP_HEADERS[family_of(address)])
    extension = 8 if family_of(address) == socket.AF_INET6 else 0
    assert device == Count(fragments, weir.bytes + (fragments - 1) * header + extension)


def test_exception_last_acknowledgement(sender: Box, wire: World) -> None:
    """Its own close() first, then the peer's: what acknowledges that is no socket any more (TIME_WAIT)."""
    sender.enrol(policy(**OPEN))
    with sender.start(serve_one) as link, from_peer(wire, addresses.PUBLIC, socket.SOCK_STREAM) as client:
        client.connect((CLIENT, link.receive()))
        assert client.recv(1) == b""
        before = quiet(wire.counters)
        sender.forget()
        link.receive()
        client.close()
        device = quiet(wire.counters) - before
    assert device == Count(1, TCP_HEADERS[socket.AF_INET])
    assert sum(sender.counters().bytes.values()) == 0


@pytest.mark.parametrize("source", PUBLIC)
def test_exception_syn_ack_of_older_kernels(sender: Box, wire: World, source: str) -> None:
    """A server's packets are counted, its SYN-ACK too on 6.18; older ones may lose that one (kernel: sk == skb->sk)."""
    sender.enrol(policy(**OPEN))
    syn_ack = 60 if family_of(source) == socket.AF_INET else 80

    def job(link: Link) -> None:
        with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
            link.send(server.getsockname()[1])
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(b"x" * 1_000_000)
                accepted.shutdown(socket.SHUT_WR)
                assert accepted.recv(1) == b""

    before = quiet(wire.counters)
    with sender.start(job) as link, from_peer(wire, source, socket.SOCK_STREAM) as client:
        client.connect((CLIENT if family_of(source) == socket.AF_INET else CLIENT6, link.receive()))
        while client.recv(1 << 20):
            pass
        client.close()
        link.receive()
        device = quiet(wire.counters) - before
    missed = device.bytes - sum(sender.counters().bytes.values())
    assert missed in (0, syn_ack)


def serve_one(link: Link) -> None:
    """Accept one connection, close it, and say so."""
    with socket.create_server(("", 0)) as server:
        link.send(server.getsockname()[1])
        server.accept()[0].close()
