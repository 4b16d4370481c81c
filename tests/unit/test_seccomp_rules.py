"""The rules of a policy's sockets section, against the same policy in a few plain lines."""

from __future__ import annotations

import socket
from dataclasses import replace
from errno import EACCES, EAFNOSUPPORT, EINVAL, ENOSYS

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.policy.model import Action, Bind, Family, Protocol, Sockets
from agent.seccomp.rules import Deny, rules
from tests.seccomp_expected import APPENGINE, expected

TCP, UDP, MPTCP = 6, 17, 262

policies = st.builds(
    replace,
    st.just(APPENGINE),
    families=st.frozensets(st.sampled_from(Family)),
    protocols=st.frozensets(st.sampled_from(Protocol)),
    listen=st.sampled_from(Action),
    bind=st.sampled_from(Bind),
)
# Values near those that matter, and anything that fits the 64-bit register behind an int.
families = st.sampled_from([0, 1, 2, 3, 9, 10, 11, 16, 17, 40]) | st.integers(0, 2**64 - 1)
types = st.sampled_from([*range(12)]) | st.integers(0, 2**64 - 1)
protocols = st.sampled_from([0, 1, TCP, 7, UDP, 33, 58, 115, 132, 136, 255, 256, MPTCP]) | st.integers(0, 2**64 - 1)


def refusals(denied: tuple[Deny, ...], call: str, *arguments: int) -> list[int]:
    """Return the errno of every rule that matches the call, as the kernel would compare 64-bit arguments."""
    return [
        rule.errno
        for rule in denied
        if rule.call == call and all(arguments[c.argument] & c.mask == c.value for c in rule.comparisons)
    ]


@given(policies, families, types, protocols)
@example(APPENGINE, socket.AF_INET, socket.SOCK_STREAM, 0)
@example(APPENGINE, socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, UDP)
@example(APPENGINE, 1 << 32 | socket.AF_NETLINK, socket.SOCK_RAW, 0)
@example(APPENGINE, socket.AF_INET, socket.SOCK_STREAM, 1 << 32 | MPTCP)
def test_socket_is_an_allow_list(sockets: Sockets, family: int, type_: int, protocol: int) -> None:
    errno = expected(sockets, family, type_, protocol)
    assert refusals(rules(sockets), "socket", family, type_, protocol) == ([errno] if errno else [])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_every_type_and_protocol_of_inet(family: int) -> None:
    """Up to the last protocol that the kernel has (IPPROTO_MPTCP, linux/in.h)."""
    denied = tuple(rule for rule in rules(APPENGINE) if rule.call == "socket")
    allowed = [
        (type_, protocol)
        for type_ in range(16)
        for protocol in range(MPTCP + 1)
        if not refusals(denied, "socket", family, type_, protocol)
    ]
    assert allowed == [
        (socket.SOCK_STREAM, 0),
        (socket.SOCK_STREAM, TCP),
        (socket.SOCK_DGRAM, 0),
        (socket.SOCK_DGRAM, UDP),
    ]


@given(policies, families)
@example(APPENGINE, socket.AF_UNIX)
@example(APPENGINE, 1 << 32 | socket.AF_INET)
def test_socketpair_is_for_unix_only(sockets: Sockets, family: int) -> None:
    is_unix = family & 0xFFFFFFFF == socket.AF_UNIX
    allowed = is_unix and Family.UNIX in sockets.families
    assert refusals(rules(sockets), "socketpair", family, 1, 0) == ([] if allowed else [EAFNOSUPPORT])


def test_a_server_is_refused_as_the_sandbox_refuses_it() -> None:
    denied = rules(APPENGINE)
    assert refusals(denied, "listen", 3, 16) == [EACCES]
    assert refusals(denied, "bind", 3, 0, 16) == [EACCES]
    assert refusals(denied, "accept", 3, 0, 0) == [EINVAL]
    assert refusals(denied, "accept4", 3, 0, 0, 0) == [EINVAL]


@pytest.mark.parametrize("call", ["listen", "accept", "accept4"])
def test_listen_allow(call: str) -> None:
    assert refusals(rules(replace(APPENGINE, listen=Action.ALLOW)), call, 3, 0, 0, 0) == []


@pytest.mark.parametrize("bind", [Bind.EPHEMERAL, Bind.ALLOW])
def test_bind_is_left_to_the_cgroup_hooks_unless_denied(bind: Bind) -> None:
    assert refusals(rules(replace(APPENGINE, bind=bind)), "bind", 3, 0, 16) == []


def test_bind_is_left_to_the_cgroup_hooks_where_netlink_must_bind() -> None:
    with_netlink = replace(APPENGINE, families=APPENGINE.families | {Family.NETLINK})
    assert refusals(rules(with_netlink), "bind", 3, 0, 16) == []


@given(policies)
def test_back_doors_are_shut_under_every_policy(sockets: Sockets) -> None:
    answers = {rule.call: rule.errno for rule in rules(sockets) if not rule.comparisons}
    absent = {"io_uring_setup", "io_uring_enter", "io_uring_register", "request_key", "add_key", "keyctl"}
    assert {call for call, errno in answers.items() if errno == ENOSYS} == absent
    assert answers["ptrace"] == answers["pidfd_getfd"] == EACCES


@given(policies)
def test_a_rule_compares_an_argument_once(sockets: Sockets) -> None:
    """libseccomp 2.5 refuses a second comparison of the same argument with EINVAL."""
    for rule in rules(sockets):
        compared = [c.argument for c in rule.comparisons]
        assert len(compared) == len(set(compared))
        assert all(c.mask and c.value & c.mask == c.value for c in rule.comparisons)
