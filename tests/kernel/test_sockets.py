"""socket() and bind(), every combination: what the policy leaves out is refused, and the rest is as without weir."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from errno import EACCES, EAFNOSUPPORT, EPROTONOSUPPORT
from itertools import product

import pytest

from agent.kernel.abi import Hook, Reason
from agent.policy.model import Bind, Family, Mode, Protocol
from tests.kernel.cage import Box, Cage, Refusal, errno_of
from tests.kernel.rules import policy
from tests.world import CLIENT, CLIENT6

FAMILIES = {socket.AF_INET: Family.INET, socket.AF_INET6: Family.INET6}
NUMBERS = {6: Protocol.TCP, 17: Protocol.UDP}
KINDS = {socket.SOCK_STREAM: 6, socket.SOCK_DGRAM: 17}
SUBSETS: list[tuple[Protocol, ...]] = [(Protocol.TCP,), (Protocol.UDP,), (Protocol.TCP, Protocol.UDP)]
# ICMP, IGMP, TCP, UDP, DCCP, IPv6, GRE, ESP, ICMPv6, L2TP, SCTP, UDP-Lite, raw, SMC, MPTCP
CREATED = list(product(FAMILIES, [1, 2, 3, 5, 6], [0, 1, 2, 6, 17, 33, 41, 47, 50, 58, 115, 132, 136, 255, 256, 262]))


def create(calls: Sequence[tuple[int, int, int]]) -> list[int]:
    """The errno of each socket(family, type, protocol)."""
    return [errno_of(lambda call=call: socket.socket(*call).close()) for call in calls]  # type: ignore[misc]


@pytest.mark.parametrize("protocols", SUBSETS)
@pytest.mark.parametrize("families", [(), (Family.INET,), (Family.INET6,), (Family.INET, Family.INET6)])
def test_every_socket(box: Box, cage: Cage, families: tuple[Family, ...], protocols: tuple[Protocol, ...]) -> None:
    bare = box.run(lambda: create(CREATED))
    box.enrol(policy(families=frozenset(families), protocols=frozenset(protocols)))
    for call, without, got in zip(CREATED, bare, box.run(lambda: create(CREATED)), strict=True):
        family, kind, protocol = call
        resolved = protocol or KINDS.get(socket.SocketKind(kind), 0) if kind in KINDS else protocol
        if without:
            wanted = without  # the kernel has refused it before the hook
        elif FAMILIES[socket.AddressFamily(family)] not in families:
            wanted = cage.errno(EAFNOSUPPORT)
        elif kind in KINDS and KINDS[socket.SocketKind(kind)] == resolved and NUMBERS[resolved] in protocols:
            wanted = 0
        else:
            wanted = cage.errno(EPROTONOSUPPORT)
        assert got == wanted, call
    refused = {refusal.reason for refusal in box.refusals() if refusal.hook is Hook.SOCK_CREATE}
    assert refused == (
        {Reason.PROTOCOL} if len(families) == 2 else {Reason.FAMILY, Reason.PROTOCOL} if families else {Reason.FAMILY}
    )


def test_every_socket_in_audit_mode(box: Box) -> None:
    bare = box.run(lambda: create(CREATED))
    box.enrol(policy(families=frozenset(), protocols=frozenset(), mode=Mode.AUDIT))
    assert box.run(lambda: create(CREATED)) == bare
    assert box.audited() == {Refusal(Hook.SOCK_CREATE, Reason.FAMILY): bare.count(0)}


def test_other_families_never_come_to_the_hook(box: Box) -> None:
    """B16, B18: AF_UNIX, netlink, packet. Only the seccomp filter refuses these: test_seccomp.py."""
    box.enrol(policy(families=frozenset(), protocols=frozenset()))
    assert box.run(lambda: create([(1, 1, 0), (1, 2, 0), (16, 3, 0), (17, 3, 0), (2, 10, 0)])) == [0] * 5
    assert not box.refusals()


WILDCARD, LOOPBACK = ("0.0.0.0", "::", "::ffff:0.0.0.0"), ("127.0.0.1", "127.5.5.5", "::1", "::ffff:127.0.0.1")
SPECIFIC = (CLIENT, CLIENT6, f"::ffff:{CLIENT}")
BOUND = list(product([*WILDCARD, *LOOPBACK, *SPECIFIC], [0, 1, 1023, 8080, 49152, 65535], KINDS))


def bind_all(calls: Sequence[tuple[str, int, socket.SocketKind]]) -> list[int]:
    """The errno of each bind(), one after the other on fresh sockets."""

    def bind(address: str, port: int, kind: socket.SocketKind) -> None:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as made:
            made.bind((address, port))

    return [errno_of(lambda call=call: bind(*call)) for call in calls]  # type: ignore[misc]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("bind", Bind)
def test_every_bind(box: Box, cage: Cage, bind: Bind, mode: Mode) -> None:
    box.enrol(policy(bind=bind, mode=mode))
    got = box.run(lambda: bind_all(BOUND))
    allowed = [
        bind is Bind.ALLOW or (bind is Bind.EPHEMERAL and port == 0 and address in WILDCARD + LOOPBACK)
        for address, port, _ in BOUND
    ]
    refused = 0 if mode is Mode.AUDIT else cage.errno(EACCES)
    assert got == [0 if may else refused for may in allowed]
    counted = box.audited() if mode is Mode.AUDIT else box.refusals()
    assert counted[Refusal(Hook.BIND, Reason.BIND)] == allowed.count(False)


@pytest.mark.parametrize("bind", [Bind.DENY, Bind.EPHEMERAL])
def test_a_refused_bind_leaves_the_socket_unbound(box: Box, bind: Bind) -> None:
    def job() -> int:
        with ExitStack() as stack:
            made = stack.enter_context(socket.socket())
            assert errno_of(lambda: made.bind(("0.0.0.0", 8080)))
            port: int = made.getsockname()[1]
            return port

    box.enrol(policy(bind=bind))
    assert box.run(job) == 0
