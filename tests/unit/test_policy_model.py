"""Addresses and prefixes as people write them, and what a policy says about itself."""

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.policy.model import (
    Action,
    Mode,
    Policy,
    Prefix,
    Protocol,
    Rule,
    Unenforced,
    format_address,
    nested,
    parse_address,
)
from tests.policies import OPEN_SOCKETS, addresses, prefixes


@given(prefixes())
def test_a_prefix_reads_back_as_it_prints(prefix: Prefix) -> None:
    assert Prefix.parse(str(prefix)) == prefix


@given(addresses)
def test_an_address_reads_back_as_it_prints(address: int) -> None:
    assert parse_address(format_address(address)) == address


@given(prefixes(), addresses)
def test_contains_is_that_of_ipaddress(prefix: Prefix, address: int) -> None:
    network = ipaddress.IPv6Network((prefix.address, prefix.length))
    assert prefix.contains(address) == (ipaddress.IPv6Address(address) in network)


@given(st.lists(prefixes(), max_size=8))
def test_nested_finds_the_narrowest_around_each(members: list[Prefix]) -> None:
    found = list(nested(members))
    assert [prefix for prefix, _ in found] == sorted(set(members))
    for prefix, around in found:
        wider = [other for other in members if other.length < prefix.length and other.contains(prefix.address)]
        assert around == max(wider, key=lambda other: other.length, default=None)


@given(st.ip_addresses(v=4))
def test_ipv4_lives_in_the_mapped_range(address: ipaddress.IPv4Address) -> None:
    assert parse_address(str(address)) == int(ipaddress.IPv6Address(f"::ffff:{address}"))


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("10.0.0.0/8", (0xFFFF0A000000, 104)),
        ("0.0.0.0/0", (0xFFFF00000000, 96)),
        ("10.1.2.3", (0xFFFF0A010203, 128)),
        ("::ffff:10.0.0.0/104", (0xFFFF0A000000, 104)),
        ("::/0", (0, 0)),
        ("2001:DB8::/32", (0x20010DB8 << 96, 32)),
    ],
)
def test_parse(text: str, prefix: tuple[int, int]) -> None:
    assert Prefix.parse(text) == prefix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.0.0.1/8", "the network is 10.0.0.0/8, the single address is 10.0.0.1"),
        ("2001:db8::1/32", "the network is 2001:db8::/32"),
        ("10.0.0.0/33", "a number from 0 to 32"),
        ("2001:db8::/129", "a number from 0 to 128"),
        ("10.0.0.0/", "a number from 0 to 32"),
        ("10.0.0.0/-1", "a number from 0 to 32"),
        ("10.0.0.0/08", "a number from 0 to 32"),
        ("10.0.0.0/255.0.0.0", "a number from 0 to 32"),
        ("10.0.0.0/" + "1" * 5000, "a number from 0 to 32"),
        ("10.0.0", "is no IPv4 or IPv6 address"),
        ("010.0.0.1", "is no IPv4 or IPv6 address"),
        ("", "is no IPv4 or IPv6 address"),
        ("example.org", "is no IPv4 or IPv6 address"),
        ("fe80::1%eth0", "has a scope id"),
        ("٣.0.0.1", "is no IPv4 or IPv6 address"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^'") as caught:
        Prefix.parse(text)
    assert message in str(caught.value)


def test_protocol_numbers() -> None:
    assert (Protocol.TCP.number, Protocol.UDP.number) == (6, 17)


def test_everything_is_in_force_in_an_open_policy() -> None:
    assert Policy("p", Mode.ENFORCE, OPEN_SOCKETS, (), Action.ALLOW, "p.yaml", "", "").unenforced() == ()


def test_what_is_not_in_force_is_said() -> None:
    gmail = Rule("gmail", Action.ALLOW, (), ("smtp.gmail.com",), (), frozenset(Protocol), 1)
    options = replace(OPEN_SOCKETS.options, others=Action.DENY)
    sockets = replace(OPEN_SOCKETS, idle_timeout=600, options=options, transfer=Action.DENY)
    wanted = Policy("p", Mode.ENFORCE, sockets, (gmail,), Action.ALLOW, "p.yaml", "", "").unenforced()
    assert wanted == tuple(Unenforced)
    assert all("not in force" in part.value for part in wanted)
