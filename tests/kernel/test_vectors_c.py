"""Table C of the known ways round: things that come in. Under `listen: deny` without seccomp, so that the hooks stand alone."""

from __future__ import annotations

import errno
import socket
import struct
import time
from contextlib import suppress

import pytest

from agent.kernel.abi import Hook, Reason
from tests import addresses, need
from tests.kernel import attempts
from tests.kernel.attempts import (
    IP_BIND_ADDRESS_NO_PORT,
    IP_LOCAL_PORT_RANGE,
    LONG,
    SHORT,
    disconnect,
    raw_bind,
    sockaddr,
)
from tests.kernel.cage import Box, Cage, Link, Refusal, errno_of
from tests.kernel.network import family_of, from_peer, heard
from tests.kernel.rules import OPEN, deny, policy
from tests.world import CLIENT, CLIENT6, LINK, Side, World

IPPROTO_MPTCP = 262
OUTBOUND = policy()  # listen: deny, bind: deny, every destination allowed
SERVER = policy(deny("10.0.0.0/8", "fd00::/8"), **OPEN)
Peers = list[tuple[str, str]]
PEERS: Peers = [(addresses.PUBLIC, CLIENT), (addresses.PUBLIC6, CLIENT6)]


def own(peer: str) -> str:
    """The client's address of the peer's family."""
    return CLIENT6 if ":" in peer else CLIENT


def knock(world: World, peer: str, port: int, timeout: float = SHORT) -> int:
    """Connect from the peer's namespace to the client; 0 or an errno."""
    with from_peer(world, peer, socket.SOCK_STREAM) as made:
        made.settimeout(timeout)
        return errno_of(lambda: made.connect((own(peer), port)))


def listen(link: Link, made: socket.socket) -> None:
    """Listen without bind(), say where, and wait to be killed."""
    made.listen()
    link.send(made.getsockname()[1])
    link.receive()


@pytest.mark.parametrize("protocol", [0, IPPROTO_MPTCP], ids=["tcp", "mptcp"])
@pytest.mark.parametrize("peer", [addresses.PUBLIC, addresses.PUBLIC6])
def test_C1_listen_without_bind(box: Box, world: World, peer: str, protocol: int) -> None:
    """No hook can refuse listen(). Its SYNs are dropped; an MPTCP socket is refused at birth, unless older than the policy."""

    def job(link: Link) -> None:
        with socket.socket(family_of(peer), socket.SOCK_STREAM, protocol) as made:
            listen(link, made)

    if protocol and box.errno(lambda: socket.socket(family_of(peer), socket.SOCK_STREAM, protocol).close()):
        need.skip("needs a kernel with MPTCP, net.mptcp.enabled=1")
    if protocol:
        with box.start(job) as link:
            port = link.receive()
            assert knock(world, peer, port, LONG) == 0
            box.enrol(OUTBOUND)
            assert knock(world, peer, port) == errno.ETIMEDOUT
    else:
        box.enrol(OUTBOUND)
        with box.start(job) as link:
            port = link.receive()
            assert knock(world, peer, port) == errno.ETIMEDOUT
            box.enrol(SERVER)
            assert knock(world, peer, port, LONG) == 0
    assert box.refusals()[Refusal(Hook.INGRESS, Reason.LISTEN)] >= 1


def in_range(made: socket.socket, port: int) -> None:
    """Let the kernel choose one port."""
    try:
        made.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=I", port << 16 | port))
    except OSError:
        need.skip("needs a kernel with IP_LOCAL_PORT_RANGE (6.1.32, 6.3)")


@pytest.fixture
def port_range() -> None:
    with socket.socket() as made:
        in_range(made, 40123)


@pytest.mark.usefixtures("port_range")
def test_C2_choice_of_the_port_without_bind(box: Box, world: World) -> None:
    """IP_LOCAL_PORT_RANGE of one port, then listen(): a server on a known port with no bind hook."""

    def job(link: Link) -> None:
        with socket.socket() as made:
            in_range(made, 40123)
            listen(link, made)

    box.enrol(OUTBOUND)
    with box.start(job) as link:
        assert link.receive() == 40123
        assert knock(world, addresses.PUBLIC, 40123) == errno.ETIMEDOUT


def test_C3_listen_after_disconnect(box: Box, world: World) -> None:
    """connect(), connect() to AF_UNSPEC, listen()."""

    def job(link: Link) -> None:
        with socket.socket() as made:
            made.connect((addresses.PUBLIC, 443))
            disconnect(made)
            listen(link, made)

    box.enrol(OUTBOUND)
    with box.start(job) as link:
        assert knock(world, addresses.PUBLIC, link.receive()) == errno.ETIMEDOUT
    assert box.refusals()[Refusal(Hook.INGRESS, Reason.LISTEN)] >= 1


@pytest.mark.usefixtures("port_range")
@pytest.mark.parametrize(("address", "port"), [("127.0.0.1", 40130), (CLIENT, 40140)])
def test_C4_connection_to_itself(box: Box, address: str, port: int) -> None:
    """A connecting socket that meets its own SYN becomes connected, with no listen() and no bind()."""

    def job(port: int, timeout: float) -> int:
        with socket.socket() as made:
            in_range(made, port)
            made.settimeout(timeout)
            return errno_of(lambda: made.connect((address, port)))

    assert box.run(lambda: job(port, LONG)) == 0, "the attack itself does not work here"
    box.enrol(OUTBOUND)
    assert box.run(lambda: job(port + 1, SHORT)) == errno.ETIMEDOUT
    assert box.refusals()[Refusal(Hook.INGRESS, Reason.SIMULTANEOUS)] >= 1
    box.enrol(policy(**OPEN))
    assert box.run(lambda: job(port + 2, LONG)) == 0


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def syn_packet(source: str, sport: int, to: str, dport: int, options: bytes = b"") -> bytes:
    """A SYN over IPv6, with the destination options before it that are given (a whole extension header)."""
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, to)
    tcp = struct.pack("!HHIIBBHHH", sport, dport, 7, 0, 5 << 4, 2, 64000, 0, 0)
    check = checksum(ends + struct.pack("!IHBB", len(tcp), 0, 0, 6) + tcp)
    tcp = tcp[:16] + struct.pack("!H", check) + tcp[18:]
    after = 60 if options else 6
    return struct.pack("!IHBB", 6 << 28, len(options) + len(tcp), after, 64) + ends + options + tcp


NO_OPTIONS = bytes([6, 0, 1, 4, 0, 0, 0, 0])  # destination options of padding only; then TCP


def send_frame(world: World, packet: bytes) -> None:
    """Put an IPv6 packet on the link, from the peer."""
    with world.peer(), socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as made:
        made.sendto(packet, (LINK, 0x86DD, 0, 0, bytes.fromhex("020000000001")))


def came(world: World, counter: str, before: int, timeout: float) -> int:
    """By how much a counter of packets has grown, once it has, or when the time is over."""
    deadline = time.monotonic() + timeout
    while True:
        late, grown = time.monotonic() > deadline, world.counter(counter).packets - before
        if grown or late:
            return grown
        time.sleep(0.02)


@pytest.mark.parametrize("options", [b"", NO_OPTIONS], ids=["plain", "dstopts"])
def test_C5_syn_behind_destination_options(box: Box, world: World, options: bytes) -> None:
    """A filter that looks for TCP in the first header misses it. The answer of a listener would be a SYN-ACK."""

    def answers(port: int, timeout: float) -> int:
        """SYN-ACKs until there is one, or the time is over."""
        before = world.counter(name).packets
        for _ in range(3):
            send_frame(world, syn_packet(addresses.PUBLIC6, 4005, CLIENT6, port, options))
        return came(world, name, before, timeout)

    def job(link: Link) -> None:
        with socket.socket(socket.AF_INET6) as made:
            listen(link, made)

    name = f"synack{len(options)}"
    world.add_counter(name, "tcp dport 4005 tcp flags & (syn | ack) == syn | ack")
    with box.start(job) as link:
        port = link.receive()
        assert answers(port, LONG) > 0, "the attack itself does not work here"
    box.enrol(OUTBOUND)
    with box.start(job) as link:
        port = link.receive()
        assert answers(port, SHORT) == 0
    assert box.refusals()[Refusal(Hook.INGRESS, Reason.LISTEN)] >= 3


@pytest.mark.usefixtures("port_range")
@pytest.mark.parametrize("options", [b"", NO_OPTIONS], ids=["plain", "dstopts"])
def test_C4_C5_simultaneous_open(box: Box, world: World, options: bytes) -> None:
    """The peer answers a SYN with a SYN of its own: the connecting socket would accept that as a server does."""

    def job(link: Link) -> None:
        with socket.socket(socket.AF_INET6) as made:
            attempts.abort(made)
            in_range(made, 40125)
            made.setblocking(False)
            made.connect_ex((addresses.PUBLIC6, 4006))
            link.send()
            link.receive()

    def syn_acks(timeout: float) -> int:
        before = world.counter(name).packets
        with box.start(job) as link:
            link.receive()
            send_frame(world, syn_packet(addresses.PUBLIC6, 4006, CLIENT6, 40125, options))
            return came(world, name, before, timeout)

    name = f"simultaneous{len(options)}"
    world.add_counter(name, "tcp dport 4006 tcp flags & (syn | ack) == syn | ack")
    world.run(["nft", *["add", "rule", "inet", "weir", "count", "tcp", "dport", "4006", "drop"]], Side.PEER)
    try:
        assert syn_acks(LONG) > 0, "the attack itself does not work here"
        box.enrol(OUTBOUND)
        assert syn_acks(SHORT) == 0
    finally:
        world.run(["nft", "flush", "chain", "inet", "weir", "count"], Side.PEER)
    assert box.refusals()[Refusal(Hook.INGRESS, Reason.SIMULTANEOUS)] >= 1


# No IPv6 socket that was connected: it goes on refusing other addresses itself (sk_v6_daddr stays).
@pytest.mark.parametrize(
    ("peer", "how"),
    [
        (addresses.PUBLIC, "sendto"),
        (addresses.PUBLIC, "disconnected"),
        (addresses.PUBLIC6, "sendto"),
        (f"::ffff:{addresses.PUBLIC}", "sendto"),
        (f"::ffff:{addresses.PUBLIC}", "disconnected"),
    ],
)
def test_C6_unsolicited_datagram(box: Box, world: World, peer: str, how: str) -> None:
    """A port chosen by the kernel is open to all; only those that were spoken to may answer."""
    ipv4 = "." in peer
    stranger = addresses.GOOGLE if ipv4 else addresses.GOOGLE6
    asked = addresses.PUBLIC if ipv4 else addresses.PUBLIC6

    def job(link: Link) -> None:
        with socket.socket(family_of(peer), socket.SOCK_DGRAM) as made:
            made.settimeout(LONG)
            if how == "disconnected":
                made.connect((peer, 9999))
                disconnect(made)
            made.sendto(b"asked", (peer, 4007))
            assert made.recv(100) == b"asked"
            link.send(made.getsockname()[1])
            made.settimeout(link.receive())
            link.send(errno_of(lambda: made.recv(100)))

    def datagram_of(address: str, port: int, timeout: float) -> int:
        with box.start(job) as link, from_peer(world, address, socket.SOCK_DGRAM, port) as sender:
            sender.sendto(b"x", (own(stranger), link.receive()))
            link.send(timeout)
            got: int = link.receive()
            return got

    box.enrol(OUTBOUND)
    assert datagram_of(stranger, 4007, SHORT) == errno.ETIMEDOUT
    assert datagram_of(asked, 4008, SHORT) == errno.ETIMEDOUT
    assert box.refusals() == {Refusal(Hook.INGRESS, Reason.UNSOLICITED): 2}
    assert datagram_of(asked, 4007, LONG) == 0
    box.enrol(policy(**OPEN))
    assert datagram_of(stranger, 4007, LONG) == 0


def test_C7_bind_of_raw_and_ping(box: Box, cage: Cage, world: World) -> None:
    """They have no bind hook: socket() refuses them."""
    world.sysctl(Side.CLIENT, "net.ipv4.ping_group_range", "0 2147483647")
    kinds = [(socket.AF_INET, 2, 1), (socket.AF_INET6, 2, 58), (socket.AF_INET, 3, 255), (socket.AF_INET6, 3, 17)]

    def bind(family: socket.AddressFamily, kind: int, protocol: int) -> None:
        with socket.socket(family, kind, protocol) as made:
            made.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))

    assert [box.errno(lambda kind=kind: bind(*kind)) for kind in kinds] == [0] * 4  # type: ignore[misc]
    box.enrol(OUTBOUND)
    refused = cage.errno(errno.EPROTONOSUPPORT)
    assert [box.errno(lambda kind=kind: bind(*kind)) for kind in kinds] == [refused] * 4  # type: ignore[misc]


def test_C8_other_spellings_of_bind(box: Box, cage: Cage) -> None:
    """AF_UNSPEC with the wildcard address, IP_BIND_ADDRESS_NO_PORT. The mapped addresses are in test_sockets.py."""

    def unspecified() -> None:
        with socket.socket() as made:
            raw_bind(made, sockaddr(socket.AF_UNSPEC, "0.0.0.0", 4009))

    def without_port() -> None:
        with socket.socket() as made:
            made.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            made.bind((CLIENT, 0))

    ways = (unspecified, without_port)
    assert [box.errno(way) for way in ways] == [0, 0]
    box.enrol(OUTBOUND)
    assert [box.errno(way) for way in ways] == [cage.errno(errno.EACCES)] * 2
    assert box.refusals() == {Refusal(Hook.BIND, Reason.BIND): 2}


def test_C8_udplite_and_mptcp_older_than_the_policy(box: Box, cage: Cage) -> None:
    """Their bind hook runs, too."""

    def job(link: Link) -> list[int]:
        kinds = [(socket.SOCK_DGRAM, 136), (socket.SOCK_STREAM, IPPROTO_MPTCP)]
        made = []
        for kind in kinds:
            with suppress(OSError):  # a kernel without it
                made.append(socket.socket(socket.AF_INET, *kind))
        link.send()
        link.receive()
        return [errno_of(lambda s=s: s.bind((CLIENT, 0))) for s in made]  # type: ignore[misc]

    with box.start(job) as link:
        link.receive()
        box.enrol(OUTBOUND)
        link.send()
        assert set(link.receive()) <= {cage.errno(errno.EACCES)}


def test_the_server_of_an_open_policy_answers_whoever_comes(box: Box, cage: Cage, world: World) -> None:
    """Listening is allowed, and 10.0.0.0/8 denied as a destination: a peer there may come, and is answered; no more."""

    def serve(link: Link) -> None:
        with socket.create_server((CLIENT, 0)) as server:
            link.send(server.getsockname()[1])
            accepted, peer = server.accept()
            with accepted:
                accepted.sendall(accepted.recv(100) * 2)
                link.send(errno_of(lambda: attempts.tcp(peer[0], 4010)))
                link.receive()

    def answer(link: Link) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.bind((CLIENT, 0))
            link.send(made.getsockname()[1])
            data, peer = made.recvfrom(100)
            made.sendto(data * 2, peer)
            others = (("10.9.9.9", 53), (peer[0], 4011))
            link.send([errno_of(lambda to=to: made.sendto(b"x", to)) for to in others])  # type: ignore[misc]

    denied = "10.1.2.3"
    box.enrol(SERVER)
    with box.start(serve) as link, from_peer(world, denied, socket.SOCK_STREAM) as client:
        client.settimeout(LONG)
        client.connect((CLIENT, link.receive()))
        client.sendall(b"hello")
        assert client.recv(100) == b"hellohello"
        assert link.receive() == cage.errno(errno.EACCES)
    with box.start(answer) as link, from_peer(world, denied, socket.SOCK_DGRAM) as client:
        client.connect((CLIENT, link.receive()))
        client.settimeout(LONG)
        client.send(b"hello")
        assert client.recv(100) == b"hellohello"
        assert link.receive() == [cage.errno(errno.EACCES)] * 2
    assert heard(world, denied, 4011) == 0
