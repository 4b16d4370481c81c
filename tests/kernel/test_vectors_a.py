"""Table A of the known ways round: tricks with the address. Each attack on a real socket, and the innocent use beside it."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from agent.kernel.abi import Hook, Reason
from agent.policy.find import load
from tests import addresses
from tests.kernel import attempts
from tests.kernel.attempts import EVERY_WAY, SHORT, Prepare, become_nobody, endpoint, raw_connect, raw_sendto, sockaddr
from tests.kernel.cage import Box, Cage, Refusal, errno_of
from tests.kernel.network import heard, silence
from tests.kernel.rules import OPEN, allow, deny, policy
from tests.servers import SINK_PORT
from tests.world import CLIENT, LINK, World

DENIED, ALLOWED = "10.1.2.3", addresses.PUBLIC
NO_TEN = policy(deny("10.0.0.0/8"))
Way = Callable[..., None]

IP_RETOPTS, IP_TRANSPARENT, IP_FREEBIND, IP_PKTINFO = 7, 19, 15, 8  # linux/in.h
IPV6_RTHDR, IPV6_PKTINFO, IPV6_HOPLIMIT = 57, 50, 52  # linux/in6.h


def inet6_datagram() -> socket.socket:
    return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)


def test_A1_tcp_connect_to_mapped(box: Box, cage: Cage, world: World) -> None:
    """connect() on an AF_INET6 socket to ::ffff:a.b.c.d comes to connect6 only."""
    box.enrol(NO_TEN)
    with silence(world):
        assert box.errno(lambda: attempts.tcp(f"::ffff:{DENIED}", 80)) == cage.errno(errno.EACCES)
    assert box.refusals() == {Refusal(Hook.CONNECT, Reason.RULE, 0): 1}
    box.run(lambda: attempts.tcp(f"::ffff:{ALLOWED}", 443))


def test_A2_udp_connect_to_mapped(box: Box, cage: Cage, world: World) -> None:
    """connect6, and then every send() without an address comes to sendmsg4."""
    box.enrol(NO_TEN)
    with silence(world):
        assert box.errno(lambda: attempts.udp_connected(f"::ffff:{DENIED}", 53)) == cage.errno(errno.EACCES)
    assert box.refusals() == {Refusal(Hook.CONNECT, Reason.RULE, 0): 1}

    def several() -> None:
        with inet6_datagram() as made:
            made.settimeout(attempts.LONG)
            made.connect((f"::ffff:{ALLOWED}", 53))
            for word in (b"one", b"two", b"three"):
                made.send(word)
                assert made.recv(10) == word

    box.run(several)


def test_A3_udp_sendto_mapped(box: Box, cage: Cage, world: World) -> None:
    """sendmsg4 runs for it, not sendmsg6."""
    box.enrol(NO_TEN)
    with silence(world):
        assert box.errno(lambda: attempts.udp_sendto(f"::ffff:{DENIED}", 53)) == cage.errno(errno.EACCES)
    assert box.refusals() == {Refusal(Hook.SENDMSG, Reason.RULE, 0): 1}
    box.run(lambda: attempts.udp_sendto(f"::ffff:{ALLOWED}", 53))


@pytest.mark.parametrize("call", [raw_connect, lambda made, to: raw_sendto(made, b"x", to)], ids=["connect", "sendto"])
def test_A4_inet_address_on_inet6_socket(box: Box, cage: Cage, world: World, call: Callable[..., None]) -> None:
    """connect4 and sendmsg4 run for an AF_INET6 socket; TCP refuses such an address before any hook."""

    def job(address: str, kind: socket.SocketKind) -> int:
        with socket.socket(socket.AF_INET6, kind) as made:
            return errno_of(lambda: call(made, sockaddr(socket.AF_INET, address, 5304)))

    box.enrol(NO_TEN)
    with silence(world):
        assert box.run(lambda: job(DENIED, socket.SOCK_DGRAM)) == cage.errno(errno.EACCES)
        assert box.run(lambda: job(DENIED, socket.SOCK_STREAM)) in (errno.EINVAL, errno.EAFNOSUPPORT, errno.EPIPE)
    assert box.run(lambda: job(ALLOWED, socket.SOCK_DGRAM)) == 0


def test_A5_unspecified_family_with_an_address(box: Box, cage: Cage, world: World) -> None:
    """sendto() with sin_family AF_UNSPEC is sent like AF_INET; the hook sees family 0."""

    def job(address: str) -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            return errno_of(lambda: raw_sendto(made, b"x", sockaddr(socket.AF_UNSPEC, address, 5305)))

    box.enrol(NO_TEN)
    with silence(world):
        assert box.run(lambda: job(DENIED)) == cage.errno(errno.EACCES)
    assert box.refusals() == {Refusal(Hook.SENDMSG, Reason.RULE, 0): 1}
    assert box.run(lambda: job(ALLOWED)) == 0
    assert heard(world, ALLOWED, 5305) == 1


def test_A6_unspecified_family_on_inet6(box: Box, world: World) -> None:
    """It means "no address": refused unconnected, and sent to the connected peer otherwise."""

    def job(connect_to: str | None) -> int:
        with inet6_datagram() as made:
            if connect_to:
                made.connect((connect_to, 5306))
            return errno_of(lambda: raw_sendto(made, b"x", sockaddr(socket.AF_UNSPEC, addresses.PRIVATE6, 5307)))

    box.enrol(policy(deny(addresses.PRIVATE6)))
    with silence(world):
        assert box.run(lambda: job(None)) == errno.EDESTADDRREQ
    assert box.run(lambda: job(addresses.PUBLIC6)) == 0
    assert heard(world, addresses.PUBLIC6, 5306) == 1
    assert heard(world, addresses.PRIVATE6, 5307) == 0


MESSAGES = {
    socket.AF_INET: [
        (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4s", 0, bytes(4), bytes(4))),
        (socket.IPPROTO_IP, socket.IP_TOS, struct.pack("=i", 0x10)),
    ],
    socket.AF_INET6: [
        (socket.IPPROTO_IPV6, IPV6_PKTINFO, bytes(20)),
        (socket.IPPROTO_IPV6, IPV6_HOPLIMIT, struct.pack("=i", 7)),
    ],
}


@pytest.mark.parametrize("peer", [addresses.PUBLIC, addresses.PUBLIC6, f"::ffff:{addresses.PUBLIC}"])
def test_A7_control_message_on_a_connected_socket(box: Box, cage: Cage, world: World, peer: str) -> None:
    """The hook sees family, address and port 0: no bypass, and not to be refused. With an address it is judged."""
    messages = MESSAGES[socket.AF_INET6 if ":" in peer and "ffff" not in peer else socket.AF_INET]

    def job() -> list[int]:
        with socket.socket(socket.AF_INET6 if ":" in peer else socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.settimeout(attempts.LONG)
            made.connect((peer, 53))
            for message in messages:
                made.sendmsg([b"x"], [message])
                assert made.recv(10) == b"x"
            elsewhere = DENIED if made.family == socket.AF_INET else addresses.PRIVATE6
            to = (elsewhere, 53)
            return [errno_of(lambda m=m: made.sendmsg([b"x"], [m], 0, to)) for m in messages if "ffff" not in peer]  # type: ignore[misc]

    box.enrol(policy(allow(addresses.PUBLIC, addresses.PUBLIC6), default=deny().action))
    got = box.run(job)
    assert got == [cage.errno(errno.EACCES)] * len(got)
    assert sum(box.refusals().values()) == len(got)


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("zero", ["0.0.0.0", "::", "::ffff:0.0.0.0"])
def test_A8_zero_address(box: Box, cage: Cage, zero: str, way: Way) -> None:
    """It means loopback, and is judged as such."""
    box.enrol(policy(deny("127.0.0.0/8", "::1")))
    assert box.errno(lambda: way(zero, 4308)) == cage.errno(errno.EACCES)
    assert sum(box.refusals().values()) == 1
    box.enrol(policy(allow("127.0.0.1", "::1"), default=deny().action))
    assert box.errno(lambda: way(zero, 4308, timeout=SHORT)) in (errno.ECONNREFUSED, errno.ETIMEDOUT)
    assert sum(box.refusals().values()) == 1


def test_A9_zero_address_from_a_chosen_source(box: Box, world: World) -> None:
    """bind(own address) or IP_PKTINFO, then 0.0.0.0: the packet goes to that own address, as only egress sees."""
    own = (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4s", 0, socket.inet_aton(CLIENT), bytes(4)))

    def bound(made: socket.socket) -> None:
        made.bind((CLIENT, 0))

    def by_message() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.sendmsg([b"x"], [own], 0, ("0.0.0.0", 4309))

    def listens(kind: socket.SocketKind) -> socket.socket:
        with world.client():
            made = socket.socket(socket.AF_INET, kind)
        made.bind((CLIENT, 4309))
        made.settimeout(SHORT)
        return made

    with listens(socket.SOCK_STREAM) as listener, listens(socket.SOCK_DGRAM) as receiver:
        listener.listen()
        box.enrol(policy(deny(CLIENT), allow("127.0.0.1"), **OPEN))
        assert box.errno(lambda: attempts.tcp("0.0.0.0", 4309, bound, SHORT)) == errno.ETIMEDOUT
        assert box.errno(lambda: attempts.udp_connected("0.0.0.0", 4309, bound)) == errno.EPERM
        assert box.errno(lambda: attempts.udp_sendto("0.0.0.0", 4309, bound)) == errno.EPERM
        assert box.errno(by_message) == errno.EPERM
        assert box.refusals()[Refusal(Hook.EGRESS, Reason.RULE, 0)] >= 4
        assert errno_of(listener.accept) == errno_of(lambda: receiver.recv(9)) == errno.ETIMEDOUT
        box.enrol(policy(deny("10.0.0.0/8"), **OPEN))
        box.run(by_message)
        receiver.settimeout(attempts.LONG)
        assert receiver.recv(9) == b"x"
        with box.start(lambda _: attempts.tcp("0.0.0.0", 4309, bound)):
            listener.settimeout(attempts.LONG)
            listener.accept()[0].close()


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize(
    "address",
    [
        addresses.NAT64_PRIVATE,
        addresses.SIX_TO_FOUR_PRIVATE,
        addresses.COMPATIBLE_PRIVATE,
        "::127.0.0.1",
        "2002:7f00:1::",
    ],
)
def test_A10_addresses_that_carry_an_ipv4_address(box: Box, cage: Cage, world: World, address: str, way: Way) -> None:
    """NAT64, 6to4, IPv4-compatible: judged as the address that they carry, too."""
    box.enrol(policy(deny("10.0.0.0/8", "127.0.0.0/8")))
    with silence(world):
        assert box.errno(lambda: way(address, 443)) == cage.errno(errno.EACCES)
    assert sum(box.refusals().values()) == 1


@pytest.mark.parametrize("address", ["2001::1", "::ffff:0:10.1.2.3", "64:ff9b:1::10.1.2.3"])
def test_A10_other_translators(box: Box, cage: Cage, world: World, address: str) -> None:
    """Teredo, SIIT (RFC 2765), local NAT64 (RFC 8215): plain IPv6 to the kernel; the App Engine policy has them in a set."""
    box.enrol(load("appengine"))
    with silence(world):
        assert box.errno(lambda: attempts.udp_sendto(address, 443)) == cage.errno(errno.EACCES)


@pytest.mark.parametrize("way", EVERY_WAY)
def test_A10_innocent(box: Box, way: Way) -> None:
    """NAT64 of a public address is used by IPv6-only hosts."""
    box.enrol(policy(deny("10.0.0.0/8")))
    box.run(lambda: way("64:ff9b::93.184.216.34", 443))


@pytest.mark.parametrize("way", EVERY_WAY)
def test_A11_link_local_with_a_scope(box: Box, cage: Cage, world: World, way: Way) -> None:
    """The hooks do not see the scope: a rule covers the address on every link."""
    box.enrol(policy(deny("fe80::/10")))
    with silence(world):
        assert box.errno(lambda: way(addresses.LINK_LOCAL6, 80)) == cage.errno(errno.EACCES)
    box.enrol(NO_TEN)
    box.run(lambda: way(addresses.LINK_LOCAL6, 443))


def by_segment(first: str, final: str) -> bytes:
    """A segment-routing header (RFC 8754): from here to ``first``, and to ``final`` from there."""
    segments = socket.inet_pton(socket.AF_INET6, final) + socket.inet_pton(socket.AF_INET6, first)
    return struct.pack("!BBBBBBH", 0, 4, 4, 1, 1, 0, 0) + segments


def after_connect(address: str, port: int, prepare: Prepare, timeout: float) -> None:
    """Prepare an established connection, and send on it."""
    with socket.create_connection(endpoint(address, port)[:2], timeout) as made:
        attempts.abort(made)
        prepare(made)
        made.sendall(b"x")


def test_A12_segment_routing_header(box: Box, cage: Cage, world: World) -> None:
    """connect() and sendto() see the final address, the packet goes to the first segment. No capability needed."""
    header = by_segment(addresses.PRIVATE6, addresses.PUBLIC6)

    def prepare(made: socket.socket) -> None:
        made.setsockopt(socket.IPPROTO_IPV6, IPV6_RTHDR, header)

    def every_way() -> list[int]:
        become_nobody()
        return [errno_of(lambda way=way: way(addresses.PUBLIC6, 443, prepare, SHORT)) for way in EVERY_WAY]  # type: ignore[misc]

    world.add_counter("segment", f"ip6 daddr {addresses.PRIVATE6}")
    with cage.box(world) as free:
        free.run(every_way)
    assert world.counter("segment").packets >= len(EVERY_WAY), "the attack itself does not work here"
    box.enrol(policy(deny(addresses.PRIVATE6)))
    with silence(world):
        assert box.run(every_way) == [errno.ETIMEDOUT, errno.EPERM, errno.EPERM]
    assert box.refusals()[Refusal(Hook.EGRESS, Reason.HEADER)] >= len(EVERY_WAY)
    before = world.counter("segment")
    box.errno(lambda: after_connect(addresses.PUBLIC6, SINK_PORT, prepare, SHORT))
    assert world.counter("segment") == before


def test_A13_mobile_ipv6_header_by_message(box: Box, world: World) -> None:
    """A type 2 routing header in a control message: the kernel (without CONFIG_IPV6_MIP6) or egress refuses it."""
    header = struct.pack("!BBBBI", 0, 2, 2, 1, 0) + socket.inet_pton(socket.AF_INET6, addresses.PRIVATE6)

    def job() -> None:
        with inet6_datagram() as made:
            made.sendmsg([b"x"], [(socket.IPPROTO_IPV6, IPV6_RTHDR, header)], 0, (addresses.PUBLIC6, 443))

    box.enrol(policy(deny(addresses.PRIVATE6)))
    with silence(world):
        assert box.errno(job) in (errno.EINVAL, errno.EPERM)


@pytest.mark.parametrize("kind", [131, 137], ids=["LSRR", "SSRR"])
@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
def test_A14_source_route(box: Box, cage: Cage, world: World, kind: int, nobody: bool) -> None:
    """IP_OPTIONS or a message with IP_RETOPTS: the packet goes to the first hop, connect() sees the last."""
    option = bytes([kind, 7, 4]) + socket.inet_aton(DENIED) + b"\0"

    def prepare(made: socket.socket) -> None:
        made.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, option)

    def by_message() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.sendmsg([b"x"], [(socket.IPPROTO_IP, IP_RETOPTS, option)], 0, (ALLOWED, 443))

    def every_way() -> list[int]:
        if nobody:
            become_nobody()
        got = [errno_of(lambda way=way: way(ALLOWED, 443, prepare, SHORT)) for way in EVERY_WAY]  # type: ignore[misc]
        return [*got, errno_of(by_message)]

    with cage.box(world) as free:
        works = free.run(every_way)
    assert nobody or errno.EPERM not in works, "the attack itself does not work here"
    box.enrol(NO_TEN)
    with silence(world):
        assert set(box.run(every_way)) <= {errno.ETIMEDOUT, errno.EPERM}
    if not nobody:
        assert box.refusals()[Refusal(Hook.EGRESS, Reason.HEADER)] >= 4
    name = f"hop{kind}{nobody:d}"
    world.add_counter(name, f"ip daddr {DENIED}")
    box.errno(lambda: after_connect(ALLOWED, SINK_PORT, prepare, SHORT))
    assert world.counter(name).packets == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_A15_loopback_out_of_another_device(box: Box, cage: Cage, world: World, address: str) -> None:
    """SO_BINDTODEVICE needs no privilege; "loopback, allowed" must not mean the link."""

    def prepare(made: socket.socket) -> None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, LINK.encode())

    def every_way() -> list[int]:
        become_nobody()
        return [errno_of(lambda way=way: way(address, 4315, prepare, SHORT)) for way in EVERY_WAY]  # type: ignore[misc]

    world.add_counter(f"loopback{len(address)}", f"{'ip6' if ':' in address else 'ip'} daddr {address}")
    box.enrol(policy())
    with silence(world):
        got = box.run(every_way)
    assert 0 not in got
    if ":" not in address:
        assert got == [errno.ETIMEDOUT, errno.EPERM, errno.EPERM]
        assert box.refusals()[Refusal(Hook.EGRESS, Reason.LOOPBACK_DEVICE)] >= 3
    assert box.errno(lambda: attempts.tcp(address, 4315)) == errno.ECONNREFUSED


def test_A16_choice_of_the_source(box: Box, cage: Cage, world: World) -> None:
    """IP_PKTINFO, IP_FREEBIND, IP_TRANSPARENT, SO_MARK: whatever the source, the destination decides."""

    def marked(made: socket.socket) -> None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)

    def foreign(option: int) -> Prepare:
        def prepare(made: socket.socket) -> None:
            made.setsockopt(socket.IPPROTO_IP, option, 1)
            made.bind((ALLOWED, 0))

        return prepare

    def by_message() -> None:
        own = struct.pack("=i4s4s", 0, socket.inet_aton(CLIENT), bytes(4))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.sendmsg([b"x"], [(socket.IPPROTO_IP, IP_PKTINFO, own)], 0, (DENIED, 53))

    box.enrol(policy(deny("10.0.0.0/8"), **OPEN))
    refused = cage.errno(errno.EACCES)
    with silence(world):
        for prepare in (marked, foreign(IP_FREEBIND), foreign(IP_TRANSPARENT)):
            for way in EVERY_WAY:
                assert box.errno(lambda w=way, p=prepare: w(DENIED, 443, p)) == refused  # type: ignore[misc]
        assert box.errno(by_message) == refused
    box.run(lambda: attempts.tcp(ALLOWED, 443, marked))


@contextmanager
def translated(world: World, address: str, to: str) -> Iterator[None]:
    """The client's own namespace sends what is for one address to another."""
    world.run(
        ["nft", "-f", "-"],
        text=f"""
        table ip turn {{
            chain out {{
                type nat hook output priority -100
                ip daddr {address} dnat to {to}
            }}
        }}""",
    )
    try:
        yield
    finally:
        world.run(["nft", "delete", "table", "ip", "turn"])


def test_A17_nat_in_the_container(box: Box, world: World) -> None:
    """connect() sees the address before translation, egress the real one. Translation to an allowed one works."""
    box.enrol(NO_TEN)
    with translated(world, ALLOWED, DENIED), silence(world):
        assert box.errno(lambda: attempts.tcp(ALLOWED, 443, timeout=SHORT)) == errno.ETIMEDOUT
        assert box.errno(lambda: attempts.udp_connected(ALLOWED, 443, timeout=SHORT)) == errno.EPERM
        assert box.errno(lambda: attempts.udp_sendto(ALLOWED, 443, timeout=SHORT)) == errno.EPERM
    assert box.refusals()[Refusal(Hook.EGRESS, Reason.RULE, 0)] >= 3
    with translated(world, ALLOWED, addresses.GOOGLE):
        for way in EVERY_WAY:
            box.run(lambda way=way: way(ALLOWED, 443))  # type: ignore[misc]
