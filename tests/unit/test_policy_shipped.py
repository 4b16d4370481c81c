"""The shipped policies, flow by flow: which rule decides. A row that changes changes what people rely on."""

from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import WeirError
from agent.policy.compile import compile_policy
from agent.policy.decide import decide
from agent.policy.explain import rule_name
from agent.policy.find import find, load, shipped
from agent.policy.model import Bind, Family, Flow, Mode, Policy, Prefix, Protocol, parse_address
from tests.tables import evaluate

RESOLVERS = (Prefix.parse("10.96.0.10"),)
NAMES = ("appengine", "appengine-ephemeral", "audit", "untrusted")

APPENGINE = [
    ("tcp 93.184.216.34 80", "allow default"),
    ("tcp 2606:2800:220:1::1 443", "allow default"),
    ("udp 93.184.216.34 123", "allow default"),
    ("tcp 93.184.216.34 25", "deny smtp"),
    ("tcp 10.0.0.1 25", "deny smtp"),
    ("tcp 93.184.216.34 587", "allow default"),
    ("tcp 93.184.216.34 465", "allow default"),
    ("tcp 93.184.216.34 21", "deny ftp"),
    ("tcp 93.184.216.34 20", "deny ftp"),
    ("tcp 93.184.216.34 22", "allow default"),
    ("tcp 93.184.216.34 989", "deny ftp"),
    ("tcp 93.184.216.34 990", "deny ftp"),
    ("udp 93.184.216.34 21", "allow default"),
    ("udp 10.96.0.10 53", "allow resolvers"),
    ("tcp 10.96.0.10 53", "allow resolvers"),
    ("udp 10.96.0.10 54", "deny private"),
    ("udp 10.96.0.11 53", "deny private"),
    ("udp 8.8.8.8 53", "allow google-dns"),
    ("tcp 8.8.4.4 53", "allow google-dns"),
    ("udp 2001:4860:4860::8888 53", "allow google-dns"),
    ("udp 2001:4860:4860::8844 53", "allow google-dns"),
    ("udp 8.8.8.8 443", "deny google"),
    ("udp 8.8.8.9 53", "deny google"),
    ("tcp 142.250.0.1 465", "deny google"),
    ("tcp 142.250.0.1 465 smtp.gmail.com", "allow gmail-smtps"),
    ("tcp 142.250.0.1 587 smtp.gmail.com", "allow gmail-smtps"),
    ("tcp 142.250.0.1 995 pop.gmail.com", "allow gmail-pop"),
    ("tcp 142.250.0.1 993 imap.gmail.com", "allow gmail-imap"),
    ("tcp 142.250.0.1 993 pop.gmail.com", "deny google"),
    ("udp 142.250.0.1 465 smtp.gmail.com", "deny google"),
    ("tcp 34.64.64.1 443", "allow default"),  # Compute Engine
    ("tcp 10.0.0.1 443", "deny private"),
    ("tcp 172.16.0.1 443", "deny private"),
    ("tcp 192.168.1.1 443", "deny private"),
    ("tcp 100.64.0.1 443", "deny private"),
    ("tcp 127.0.0.1 80", "deny private"),
    ("tcp 0.0.0.0 80", "deny private"),
    ("tcp ::1 80", "deny private"),
    ("tcp :: 80", "deny private"),
    ("tcp 169.254.169.254 80", "deny private"),
    ("tcp fd00:ec2::254 80", "deny private"),
    ("tcp fe80::1 80", "deny private"),
    ("udp 224.0.0.251 5353", "deny private"),
    ("udp ff02::fb 5353", "deny private"),
    ("udp 255.255.255.255 67", "deny private"),
    ("tcp 240.0.0.1 80", "deny private"),
    ("tcp ::ffff:10.0.0.1 443", "deny private"),
    ("tcp 64:ff9b::10.0.0.1 443", "deny private"),
    ("tcp 64:ff9b::8.8.8.8 443", "deny google"),
    ("tcp 64:ff9b::93.184.216.34 443", "allow default"),
    ("tcp 2002:a00:1::1 443", "deny private"),
    ("tcp ::10.0.0.1 443", "deny private"),
    ("tcp ::ffff:0:10.0.0.1 443", "deny private"),
    ("tcp 64:ff9b:1::10.0.0.1 443", "deny private"),
    ("tcp 2001::1 443", "deny private"),  # Teredo
    ("tcp 2001:4860::1 443", "deny google"),
]
AUDIT = [
    ("tcp 93.184.216.34 443", "allow default"),
    ("tcp 93.184.216.34 80", "deny plain-http"),
    ("tcp 93.184.216.34 25", "deny smtp"),
    ("tcp 93.184.216.34 990", "deny ftp"),
    ("udp 10.96.0.10 53", "allow resolvers"),
    ("tcp 169.254.169.254 80", "deny metadata"),
    ("tcp 168.63.129.16 80", "deny metadata"),
    ("tcp 127.0.0.1 5432", "deny loopback"),
    ("tcp 10.0.0.1 443", "deny private"),
    ("tcp fe80::1 443", "deny private"),
    ("udp 224.0.0.251 5353", "deny not-unicast"),
    ("tcp 8.8.8.8 443", "deny google"),
]
UNTRUSTED = [
    ("udp 10.96.0.10 53", "allow resolvers"),
    ("udp 8.8.8.8 53", "deny other-dns"),
    ("tcp 1.1.1.1 853", "deny other-dns"),
    ("tcp 93.184.216.34 443", "allow https"),
    ("tcp 2606:2800:220:1::1 443", "allow https"),
    ("udp 93.184.216.34 443", "deny default"),
    ("tcp 93.184.216.34 80", "deny default"),
    ("tcp 93.184.216.34 22", "deny default"),
    ("tcp 93.184.216.34 0", "deny default"),
    ("tcp 93.184.216.34 587", "deny mail"),
    ("tcp 169.254.169.254 443", "deny metadata"),
    ("tcp 168.63.129.16 443", "deny metadata"),
    ("tcp fd00:ec2::254 443", "deny metadata"),
    ("tcp 127.0.0.1 443", "deny loopback"),
    ("tcp 0.0.0.0 443", "deny loopback"),
    ("tcp 10.0.0.1 443", "deny private"),
    ("tcp 169.254.0.1 443", "deny private"),
    ("tcp 255.255.255.255 443", "deny not-unicast"),
    ("tcp 64:ff9b::10.0.0.1 443", "deny private"),
    ("tcp 64:ff9b::169.254.169.254 443", "deny metadata"),
    ("tcp ::127.0.0.1 443", "deny loopback"),
]
VERDICTS = [
    (name, *row) for name, rows in zip(NAMES, (APPENGINE, APPENGINE, AUDIT, UNTRUSTED), strict=True) for row in rows
]


def loaded(name: str) -> Policy:
    return load(name, RESOLVERS)


def test_every_shipped_policy_has_its_verdicts_here() -> None:
    assert shipped() == NAMES


@pytest.mark.parametrize(("name", "flow", "expected"), VERDICTS)
def test_verdict(name: str, flow: str, expected: str) -> None:
    protocol, address, port, *names = flow.split(" ")
    policy = loaded(name)
    asked = Flow(Protocol(protocol), parse_address(address), int(port), frozenset(names))
    verdict = decide(policy, asked)
    assert f"{verdict.action.value} {rule_name(policy, verdict)}" == expected
    if not names:
        assert evaluate(compile_policy(policy), asked)[0] == verdict


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_called_as_its_file(name: str) -> None:
    assert loaded(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_of_a_shipped_policy_decides_something(name: str) -> None:
    expected = {verdict.split(" ")[1] for policy, _, verdict in VERDICTS if policy == name}
    assert {rule.name for rule in loaded(name).egress} <= expected


def test_sockets() -> None:
    plain, ephemeral, audit, untrusted = map(loaded, NAMES)
    assert (plain.sockets.bind, ephemeral.sockets.bind) == (Bind.DENY, Bind.EPHEMERAL)
    assert [policy.mode for policy in (plain, ephemeral, audit, untrusted)] == [Mode.ENFORCE] * 2 + [
        Mode.AUDIT,
        Mode.ENFORCE,
    ]
    assert plain.sockets.families == {Family.INET, Family.INET6, Family.UNIX}
    assert plain.sockets.idle_timeout == 600
    assert len(plain.sockets.options.mock) == 8
    assert (plain.egress, plain.default) == (tuple_with_lines_of(plain, ephemeral), ephemeral.default)


def tuple_with_lines_of(lines: Policy, rules: Policy) -> tuple[object, ...]:
    """Return the rules of one policy with the line numbers of another, to compare all but those."""
    return tuple(replace(rule, line=other.line) for rule, other in zip(rules.egress, lines.egress, strict=True))


def test_a_policy_argument_is_a_name_or_a_path() -> None:
    assert find("appengine").name == "appengine.yaml"
    assert str(find("./appengine")) == "appengine"
    assert str(find("mine.yaml")) == "mine.yaml"
    with pytest.raises(WeirError, match="there is no policy called 'apengine'") as caught:
        find("apengine")
    assert "appengine, appengine-ephemeral, audit, untrusted" in caught.value.hint
    with pytest.raises(WeirError, match="there is no policy called 'appengine'") as caught:
        find("appengine", Path("/nowhere"))
    assert caught.value.hint == "No policy is in /nowhere: use the path of a file, such as ./appengine.yaml."
    with pytest.raises(WeirError, match=r"/nowhere/mine.yaml cannot be read: No such file"):
        load("/nowhere/mine.yaml")
    with pytest.raises(WeirError, match=r"cannot be read: Is a directory"):
        load("/")


def test_resolvers_are_the_hosts_unless_given() -> None:
    named = next(rule for rule in load("appengine").egress if rule.name == "resolvers")
    assert named.prefixes
    assert next(rule for rule in loaded("appengine").egress if rule.name == "resolvers").prefixes == RESOLVERS
