"""The programs against the specification: random policies and flows, by every way of naming a destination.

One attempt is one real call on a new socket inside a box. What it answers must be what decide() says, and the kernel's
refusal counters must name decide()'s rules. What reaches the peer must be what was allowed, datagram for datagram.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from agent.kernel.abi import Hook, Reason
from agent.policy.decide import decide
from agent.policy.model import Action, Flow, Mode, Policy, Prefix, Protocol, format_address, parse_address
from tests.kernel.cage import Box, Cage, Link, Refusal
from tests.kernel.network import PATIENCE
from tests.policies import flows, policies
from tests.servers import HTTP_PORTS, SINK_PORT
from tests.world import CLIENT, CLIENT6, CLIENT_LINK_LOCAL6, LINK, World

FLOWS_PER_POLICY = 25
POLICIES = max(2, int(100 * float(os.environ.get("WEIR_TEST_SCALE", "1"))))
QUICK: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}

_UNANSWERED = [
    Prefix.parse(text)
    for text in ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255", "::", "::1", "ff00::/8")
]
_OWN = {parse_address(text) for text in (CLIENT, CLIENT6, CLIENT_LINK_LOCAL6)}


class Way(str, Enum):
    """How a destination is given to the kernel: the call, and the family of socket and address."""

    CONNECT = "connect"
    CONNECT_MAPPED = "connect, mapped"
    SENDTO = "sendto"
    SENDTO_MAPPED = "sendto, mapped"

    @property
    def is_mapped(self) -> bool:
        return self in (Way.CONNECT_MAPPED, Way.SENDTO_MAPPED)

    @property
    def is_sendto(self) -> bool:
        return self in (Way.SENDTO, Way.SENDTO_MAPPED)


@dataclass(frozen=True)
class Attempt:
    """One call. ``answered``: the peer of a World answers at this destination."""

    way: Way
    protocol: Protocol
    address: int
    port: int
    answered: bool

    def __call__(self) -> str:
        """Make it; what went wrong although the call succeeded, or "". Raises OSError as the call did."""
        is_ipv4 = self.address >> 32 == 0xFFFF
        family = socket.AF_INET if is_ipv4 and not self.way.is_mapped else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM if self.protocol is Protocol.TCP else socket.SOCK_DGRAM) as made:
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)  # without it the kernel itself answers EACCES
            if self.protocol is Protocol.TCP:
                # A reset instead of a FIN: nothing is left to be sent when the policy has been switched.
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return self._connect(made, self._endpoint(family))
            if self.way.is_sendto:
                made.sendto(b"x", self._endpoint(family))
            else:
                made.connect(self._endpoint(family))
                if not self.answered:
                    return ""
                made.send(b"x")
            if not self.answered or self.port == SINK_PORT:
                return ""
            readable, _, _ = select.select([made], [], [], PATIENCE)
            return "" if readable and made.recv(10) == b"x" else "no answer to the datagram"

    def _endpoint(self, family: socket.AddressFamily) -> tuple[str, int] | tuple[str, int, int, int]:
        text = format_address(self.address)
        if family == socket.AF_INET:
            return text, self.port
        scope = socket.if_nametoindex(LINK) if self.address >> 118 in (0xFE80 >> 6, 0xFF00 >> 6) else 0
        return f"::ffff:{text}" if self.way.is_mapped else text, self.port, 0, scope

    def _connect(self, made: socket.socket, endpoint: tuple[str, int] | tuple[str, int, int, int]) -> str:
        error = made.connect_ex(endpoint)
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))
        if not self.answered:
            return ""
        select.select([], [made], [], PATIENCE)
        error = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error or self.port in HTTP_PORTS or self.port == SINK_PORT:
            return os.strerror(error) if error else ""
        readable, _, _ = select.select([made], [], [], PATIENCE)
        return "" if readable and made.recv(1) else "connected, but the server said nothing"


def is_answered(flow: Flow) -> bool:
    """Whether the World's peer answers: not the zero port, this host, or more than one host."""
    elsewhere = flow.address not in _OWN and not any(prefix.contains(flow.address) for prefix in _UNANSWERED)
    return flow.port != 0 and elsewhere


def attempts(flow: Flow) -> list[Attempt]:
    """Every way of reaching a flow's destination."""
    ways = [Way.CONNECT]
    if flow.protocol is Protocol.UDP and flow.port:  # sendto() refuses port 0 before any hook: EINVAL
        ways.append(Way.SENDTO)
    if flow.address >> 32 == 0xFFFF:
        ways += [Way.CONNECT_MAPPED, *([Way.SENDTO_MAPPED] if Way.SENDTO in ways else [])]
    return [Attempt(way, flow.protocol, flow.address, flow.port, is_answered(flow)) for way in ways]


def work(link: Link) -> None:
    """Make the attempts of each list that comes; answer with (errno, complaint) for each."""
    while True:
        answers = []
        for attempt in link.receive():
            try:
                answers.append((0, attempt()))
            except OSError as error:
                answers.append((error.errno or -1, ""))
        link.send(answers)


def expected_refusals(policy: Policy, tried: list[Attempt]) -> Counter[Refusal]:
    """What connect() and sendto() must have counted."""
    found: Counter[Refusal] = Counter()
    for attempt in tried:
        verdict = decide(policy, Flow(attempt.protocol, attempt.address, attempt.port))
        if verdict.action is Action.DENY:
            hook = Hook.SENDMSG if attempt.way.is_sendto else Hook.CONNECT
            found[Refusal(hook, Reason.RULE, verdict.rule)] += 1
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[Policy, list[Flow]]:
    """A policy, and flows near its edges; half of the policies let nothing in."""
    policy = draw(policies())
    listen = draw(st.sampled_from(Action))
    policy = replace(policy, sockets=replace(policy.sockets, listen=listen))
    return policy, draw(st.lists(flows(policy), min_size=FLOWS_PER_POLICY, max_size=FLOWS_PER_POLICY, unique=True))


def test_random_flows_are_judged_as_decide_says(box: Box, cage: Cage, world: World) -> None:
    """At least 2,000 pairs of policy and flow, with the policy of one living process switched between them."""
    judged: Counter[Action] = Counter()
    arrived: Counter[tuple[str, int, int]] = Counter()
    refused = cage.errno(errno.EACCES)
    before = received(world)
    with box.start(work) as link:

        @settings(max_examples=POLICIES, phases=[Phase.reuse, Phase.generate], **QUICK)
        @given(cases())
        def check(case: tuple[Policy, list[Flow]]) -> None:
            policy, wanted = case
            tried = [attempt for flow in wanted for attempt in attempts(flow)]
            box.enrol(policy)
            box.forget()
            link.send(tried)
            for attempt, (got, complaint) in zip(tried, link.receive(), strict=True):
                verdict = decide(policy, Flow(attempt.protocol, attempt.address, attempt.port))
                if verdict.action is Action.DENY:
                    assert got == refused, (attempt, verdict)
                elif attempt.answered:
                    assert (got, complaint) == (0, ""), (attempt, verdict)
                    arrived[attempt.protocol.value, attempt.address, attempt.port] += 1
                else:
                    assert got != refused, (attempt, verdict)
            assert judged_refusals(box) == expected_refusals(policy, tried)
            judged.update(decide(policy, flow).action for flow in wanted)

        check()
    assert sum(judged.values()) >= POLICIES * FLOWS_PER_POLICY * 0.8
    if POLICIES >= 50:  # a smaller sample may be one-sided
        assert min(judged[action] for action in Action) > POLICIES * 2, judged
    assert_arrived(world, before, arrived)


def test_audit_refuses_nothing_and_counts_the_same(box: Box, cage: Cage) -> None:
    """Every call works as if there were no policy; a packet that is sent all the same is counted once more, at egress."""
    with box.start(work) as link, cage.box(box.world) as free, free.start(work) as bare:

        @settings(max_examples=max(2, POLICIES // 5), phases=[Phase.reuse, Phase.generate], **QUICK)
        @given(cases())
        def check(case: tuple[Policy, list[Flow]]) -> None:
            policy, wanted = case
            tried = [attempt for flow in wanted for attempt in attempts(flow)]
            box.enrol(replace(policy, mode=Mode.AUDIT))
            box.forget()
            link.send(tried)
            bare.send(tried)
            assert link.receive() == bare.receive()
            counted = {
                refusal: n for refusal, n in box.audited().items() if refusal.hook in (Hook.CONNECT, Hook.SENDMSG)
            }
            assert counted == expected_refusals(policy, tried + sent_after(tried))
            assert not box.refusals()

        check()


def sent_after(tried: list[Attempt]) -> list[Attempt]:
    """The judgements that follow an audited connect(): send() on a mapped destination comes to sendmsg4 once more."""
    again = [a for a in tried if a.way is Way.CONNECT_MAPPED and a.protocol is Protocol.UDP and a.answered]
    return [replace(attempt, way=Way.SENDTO_MAPPED) for attempt in again]


def judged_refusals(box: Box) -> Counter[Refusal]:
    """What the kernel has counted; but a datagram to many hosts is answered from another address, unsolicited."""
    found = box.refusals()
    del found[Refusal(Hook.INGRESS, Reason.UNSOLICITED)]
    return found


def received(world: World) -> Counter[tuple[str, int, int]]:
    """How many connections and datagrams reached each destination."""
    found: Counter[tuple[str, int, int]] = Counter()
    for record in world.received():
        found[record.protocol, parse_address(record.address), record.port] += record.count
    return found


def assert_arrived(world: World, before: Counter[tuple[str, int, int]], wanted: Counter[tuple[str, int, int]]) -> None:
    """What reached the peer is what was allowed to, and nothing else; where it need not answer it may have heard."""
    deadline = time.monotonic() + PATIENCE
    while True:
        came = received(world) - before
        for key in [key for key in came if not is_answered(Flow(Protocol(key[0]), key[1], key[2]))]:
            del came[key]
        if came == wanted or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert came == wanted
