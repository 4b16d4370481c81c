"""Table B of the known ways round: other calls, other protocols. What seccomp alone can refuse is in test_seccomp.py."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import tempfile
from collections.abc import Callable

import pytest

from agent.kernel.abi import Hook, Reason
from agent.policy.model import Family
from tests import addresses, need
from tests.kernel.attempts import LONG, SHORT, abort, disconnect
from tests.kernel.cage import Box, Cage, Link, Refusal, errno_of
from tests.kernel.network import family_of, heard, quiet, silence
from tests.kernel.rules import deny, policy
from tests.servers import SINK_PORT
from tests.world import Side, World

DENIED, ALLOWED = "10.1.2.3", addresses.PUBLIC
NO_TEN = policy(deny("10.0.0.0/8", "fd00::/8"))
BOTH = {"10.1.2.3": addresses.PUBLIC, addresses.PRIVATE6: addresses.PUBLIC6, "::ffff:10.1.2.3": "::ffff:93.184.216.34"}

IPPROTO_MPTCP, IPPROTO_UDPLITE = 262, 136
MSG_FASTOPEN, MSG_ZEROCOPY, SO_ZEROCOPY = 0x20000000, 0x4000000, 60  # linux/socket.h, asm-generic/socket.h
TCP_REPAIR, TCP_FASTOPEN_CONNECT = 19, 30  # linux/tcp.h
IP_HDRINCL, IPV6_ADDRFORM = 3, 1  # linux/in.h, linux/in6.h


def stream(address: str, protocol: int = 0) -> socket.socket:
    made = socket.socket(family_of(address), socket.SOCK_STREAM, protocol)
    made.settimeout(LONG)
    abort(made)
    return made


def datagram(address: str = ALLOWED, protocol: int = 0) -> socket.socket:
    made = socket.socket(family_of(address), socket.SOCK_DGRAM, protocol)
    made.settimeout(LONG)
    return made


@pytest.mark.parametrize("denied", BOTH)
def test_B1_fast_open(box: Box, cage: Cage, world: World, denied: str) -> None:
    """sendto() with MSG_FASTOPEN connects: the connect hook runs, whatever the kernel knows of the server."""
    world.sysctl(Side.CLIENT, "net.ipv4.tcp_fastopen", "5")  # client; data in the SYN without a cookie

    def job(address: str) -> None:
        with stream(address) as made:
            made.sendto(b"early", MSG_FASTOPEN, (address, 4201))
            assert made.recv(1) == b"!"

    box.enrol(NO_TEN)
    with silence(world):
        assert box.errno(lambda: job(denied)) == cage.errno(errno.EACCES)
    assert box.refusals() == {Refusal(Hook.CONNECT, Reason.RULE, 0): 1}
    box.run(lambda: job(BOTH[denied]))


def test_B2_fast_open_connect(box: Box, cage: Cage, world: World) -> None:
    """TCP_FASTOPEN_CONNECT: judged at connect(); a later MSG_FASTOPEN cannot go elsewhere."""

    def first(address: str) -> None:
        with stream(address) as made:
            made.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
            made.connect((address, 4202))
            errno_of(lambda: made.sendto(b"x", MSG_FASTOPEN, (DENIED, 4202)))
            made.recv(1)

    box.enrol(NO_TEN)
    with silence(world):
        assert box.errno(lambda: first(DENIED)) == cage.errno(errno.EACCES)
    box.run(lambda: first(ALLOWED))
    assert heard(world, DENIED, 4202, "tcp") == 0


def test_B3_second_connect(box: Box, cage: Cage, world: World) -> None:
    """Every connect() of a datagram socket is judged; after a refused one it stays where it was."""

    def job() -> list[int]:
        with datagram() as made:
            made.connect((ALLOWED, 4203))
            got = [errno_of(lambda: made.connect((DENIED, 4203)))]
            made.send(b"x")
            disconnect(made)
            got.append(errno_of(lambda: made.connect((DENIED, 4203))))
            return [*got, errno_of(lambda: made.send(b"x"))]

    box.enrol(NO_TEN)
    refused = cage.errno(errno.EACCES)
    assert box.run(job) == [refused, refused, errno.EDESTADDRREQ]
    assert (heard(world, ALLOWED, 4203), heard(world, DENIED, 4203)) == (1, 0)


@pytest.mark.parametrize("denied", BOTH)
def test_B4_connected_and_sent_elsewhere(box: Box, cage: Cage, world: World, denied: str) -> None:
    """sendto() on a connected socket is judged by its own address."""

    def job() -> list[int]:
        with datagram(denied) as made:
            made.connect((BOTH[denied], 4204))
            return [errno_of(lambda to=to: made.sendto(b"x", (to, 4204))) for to in (denied, BOTH[denied])]  # type: ignore[misc]

    box.enrol(NO_TEN)
    assert box.run(job) == [cage.errno(errno.EACCES), 0]
    assert heard(world, denied.removeprefix("::ffff:"), 4204) == 0


class _Message(ctypes.Structure):
    """struct mmsghdr on 64-bit machines."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("name_length", ctypes.c_uint32),
        ("vector", ctypes.c_void_p),
        ("vector_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_size_t),
        ("sent", ctypes.c_size_t),
    ]


def test_B5_sendmmsg(box: Box, world: World) -> None:
    """Several datagrams in one call are judged one by one: it stops at the first that is refused."""

    def job() -> int:
        data = ctypes.create_string_buffer(b"x")
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(data), 1)
        names = [
            struct.pack("=HH4s8x", 2, socket.htons(4205), socket.inet_aton(to)) for to in (ALLOWED, DENIED, ALLOWED)
        ]
        messages = (_Message * 3)(*(_Message(name, 16, ctypes.addressof(vector), 1) for name in names))
        with datagram() as made:
            return int(ctypes.CDLL(None).sendmmsg(made.fileno(), messages, 3, 0))

    box.enrol(NO_TEN)
    assert box.run(job) == 1
    assert (heard(world, ALLOWED, 4205), heard(world, DENIED, 4205)) == (1, 0)
    assert box.refusals() == {Refusal(Hook.SENDMSG, Reason.RULE, 0): 1}


def test_B6_corked_datagram(box: Box, world: World) -> None:
    """MSG_MORE with another address: all of it goes to the first, and is counted so."""

    def job() -> None:
        with datagram() as made:
            made.sendto(b"one", socket.MSG_MORE, (ALLOWED, 4206))
            errno_of(lambda: made.sendto(b"two", socket.MSG_MORE, (DENIED, 4206)))
            made.sendto(b"three", (ALLOWED, 4206))

    box.enrol(NO_TEN)
    box.run(job)
    assert (heard(world, ALLOWED, 4206), heard(world, DENIED, 4206)) == (1, 0)
    assert box.counters().packets == {"public": 1, "private": 0, "loopback": 0}


def older(box: Box, make: Callable[[], socket.socket], use: Callable[[socket.socket], object]) -> int:
    """Make a socket before the box is enrolled, since socket() would refuse it afterwards; what its use answers then."""

    def job(link: Link) -> int:
        with make() as made:
            link.send()
            link.receive()
            made.settimeout(SHORT)
            return errno_of(lambda: use(made))

    with box.start(job) as link:
        link.receive()
        box.enrol(NO_TEN)
        link.send()
        answer: int = link.receive()
        return answer


@pytest.mark.parametrize("to", BOTH)
def test_B7_udplite_older_than_the_policy(box: Box, cage: Cage, world: World, to: str) -> None:
    """connect() and send() come to no hook but egress (a mapped send(): sendmsg4). A new one: test_sockets.py."""
    if box.errno(lambda: datagram(to, IPPROTO_UDPLITE).close()):
        need.skip("needs a kernel with UDP-Lite (before 7.1)")

    def use(made: socket.socket) -> None:
        made.connect((BOTH[to], 4207))
        made.send(b"x")

    with silence(world):
        assert older(box, lambda: datagram(to, IPPROTO_UDPLITE), use) in (errno.EPERM, cage.errno(errno.EACCES))
        (refusal,) = box.refusals()
        assert (refusal.hook, refusal.reason) == (Hook.SENDMSG if "ffff" in to else Hook.EGRESS, Reason.PROTOCOL)
        box.withdraw()
        assert older(box, lambda: datagram(to, IPPROTO_UDPLITE), lambda made: made.sendto(b"x", (to, 4207))) != 0


@pytest.mark.parametrize("to", [ALLOWED, addresses.PUBLIC6])
def test_B8_ping_older_than_the_policy(box: Box, world: World, to: str) -> None:
    """sendto() of an echo request comes to no hook but egress. A new one: test_vectors_c.py, C7."""
    world.sysctl(Side.CLIENT, "net.ipv4.ping_group_range", "0 2147483647")
    protocol, kind = (58, 128) if ":" in to else (1, 8)
    request = bytes([kind, 0, 0, 0, 0, 0, 0, 1]) + b"secret"
    with silence(world):
        got = older(box, lambda: datagram(to, protocol), lambda made: made.sendto(request, (to, 0)))
        assert got == errno.EPERM or (got == 0 and ":" in to), "only IPv6's sendto() does not say that nothing was sent"
    assert box.refusals()[Refusal(Hook.EGRESS, Reason.PROTOCOL)] == 1


def test_B9_raw_older_than_the_policy(box: Box, world: World) -> None:
    """A forged UDP header is judged as what it says; another protocol is refused."""

    def raw() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def forge(to: str, protocol: int = 17) -> Callable[[socket.socket], object]:
        udp = struct.pack("!HHHH", 4209, 4209, 9, 0) + b"x"
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 29, 1, 0, 64, protocol, 0, bytes(4), socket.inet_aton(to))
        return lambda made: made.sendto(header + udp, (ALLOWED, 0))

    with silence(world):
        assert older(box, raw, forge(DENIED)) == errno.EPERM
        assert box.refusals() == {Refusal(Hook.EGRESS, Reason.RULE, 0): 1}
        box.withdraw()
        assert older(box, raw, forge(ALLOWED, 132)) == errno.EPERM
        assert box.refusals()[Refusal(Hook.EGRESS, Reason.PROTOCOL)] == 1
    box.withdraw()
    assert older(box, raw, forge(ALLOWED)) == 0
    assert heard(world, ALLOWED, 4209) == 1


@pytest.mark.parametrize("how", ["connect", "fast open"])
@pytest.mark.parametrize("denied", BOTH)
def test_B10_mptcp_older_than_the_policy(box: Box, world: World, denied: str, how: str) -> None:
    """Its subflow is a TCP socket of the kernel's: the connect hook runs for that. A new one: test_sockets.py."""
    if box.errno(lambda: stream(denied, IPPROTO_MPTCP).close()):
        need.skip("needs a kernel with MPTCP, net.mptcp.enabled=1")
    world.sysctl(Side.CLIENT, "net.ipv4.tcp_fastopen", "5")

    def use(made: socket.socket) -> None:
        if how == "connect":
            made.connect((denied, 4210))
        else:
            made.sendto(b"early", MSG_FASTOPEN, (denied, 4210))

    with silence(world):
        got = older(box, lambda: stream(denied, IPPROTO_MPTCP), use)
        if got == errno.EOPNOTSUPP:
            need.skip("needs a kernel whose MPTCP has fast open (6.2)")
        assert got != 0
    assert sum(box.refusals().values()) >= 1
    assert heard(world, denied.removeprefix("::ffff:"), 4210, "tcp") == 0


def test_B15_packet_sockets_are_for_seccomp(box: Box, world: World) -> None:
    """Neither AF_PACKET nor AF_INET with SOCK_PACKET comes to a hook of ours; what they send is not counted either.

    This test says so, so that nobody thinks otherwise: the seccomp filter refuses both (test_seccomp.py).
    """

    def job() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as made:
            made.sendto(b"x", ("eth0", 0x88B5, 0, 0, bytes(6)))
        socket.socket(socket.AF_INET, 10, 0).close()

    box.enrol(NO_TEN)
    before = world.counters()
    box.run(job)
    assert (quiet(world.counters) - before).packets == 1
    assert sum(box.counters().bytes.values()) == 0


def test_B19_socketpair(box: Box, cage: Cage) -> None:
    """socketpair() makes two sockets, judged, before the kernel finds that it cannot pair them."""
    box.enrol(policy(families=frozenset({Family.UNIX})))
    assert box.errno(lambda: socket.socketpair(socket.AF_INET)) == cage.errno(errno.EAFNOSUPPORT)
    assert box.errno(lambda: socket.socketpair(socket.AF_UNIX)) == 0


def test_B20_sendfile_zerocopy_splice(box: Box, world: World) -> None:
    """Other ways to hand over data: on a connection that was judged, counted like any other, and stopped with it."""
    size = 200_000

    def job(link: Link) -> None:
        with stream(ALLOWED) as made, tempfile.TemporaryFile() as file, datagram() as loose:
            file.write(b"x" * size)
            file.seek(0)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 0, 0))
            made.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
            made.connect((ALLOWED, SINK_PORT))
            assert made.sendfile(file) == size
            made.send(b"x" * 1000, MSG_ZEROCOPY)
            reader, writer = os.pipe()
            os.write(writer, b"x" * 100)
            splice(reader, made)
            os.write(writer, b"x" * 100)
            link.send(errno_of(lambda: splice(reader, loose)))
            link.receive()

    box.enrol(NO_TEN)

    def read() -> int:
        return sum(r.bytes for r in world.received() if (r.address, r.port) == (ALLOWED, SINK_PORT))

    before = read()
    with box.start(job) as link:
        assert link.receive() in (errno.EDESTADDRREQ, errno.ENOTCONN, errno.EINVAL)
        assert quiet(read) - before == size + 1100
        assert box.counters().bytes["public"] > size + 1100


def splice(pipe: int, made: socket.socket) -> None:
    """splice(2): os.splice came with Python 3.10, but refuses nothing the system call would."""
    os.splice(pipe, made.fileno(), 100)


def test_B21_tcp_repair(box: Box, cage: Cage) -> None:
    """A connection that is declared to exist is judged when it is declared."""

    def job(address: str) -> int:
        with stream(address) as made:
            made.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            return errno_of(lambda: made.connect((address, 443)))

    box.enrol(NO_TEN)
    assert box.run(lambda: job(DENIED)) == cage.errno(errno.EACCES)
    assert box.run(lambda: job(ALLOWED)) == 0


def test_B22_address_form(box: Box, cage: Cage, world: World) -> None:
    """IPV6_ADDRFORM turns the socket into an AF_INET one; connected again it comes to connect4."""

    def job() -> int:
        with stream("::ffff:93.184.216.34") as made:
            made.connect((f"::ffff:{ALLOWED}", 443))
            made.setsockopt(socket.IPPROTO_IPV6, IPV6_ADDRFORM, socket.AF_INET)
            disconnect(made)
            with socket.socket(socket.AF_INET, fileno=os.dup(made.fileno())) as turned:
                assert turned.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_INET
                return errno_of(lambda: turned.connect((DENIED, 443)))

    box.enrol(NO_TEN)
    assert box.run(job) == cage.errno(errno.EACCES)
    assert box.refusals() == {Refusal(Hook.CONNECT, Reason.RULE, 0): 1}
