"""The specification, example by example: what each sentence of it means."""

import pytest

from agent.policy.decide import decide, destination, embedded, normalise
from agent.policy.model import (
    BOTH_PROTOCOLS,
    Action,
    Flow,
    Mode,
    Policy,
    PortRange,
    Prefix,
    Protocol,
    Rule,
    Verdict,
    format_address,
    parse_address,
)
from tests.policies import OPEN_SOCKETS

ALLOW, DENY = Action.ALLOW, Action.DENY


def make_rule(
    action: Action,
    to: list[str] | None = None,
    *,
    names: tuple[str, ...] = (),
    ports: tuple[PortRange, ...] = (),
    protocols: frozenset[Protocol] = BOTH_PROTOCOLS,
) -> Rule:
    prefixes = None if to is None else tuple(map(Prefix.parse, to))
    return Rule("rule", action, prefixes, names, ports, protocols, 1)


def verdict(rules: list[Rule], address: str, port: int = 443, **more: object) -> Verdict:
    default = DENY if more.get("default") == "deny" else ALLOW
    policy = Policy("test", Mode.ENFORCE, OPEN_SOCKETS, tuple(rules), default, "test.yaml", "0" * 64, "")
    protocol = Protocol.UDP if more.get("protocol") == "udp" else Protocol.TCP
    names = frozenset([str(more["name"])]) if "name" in more else frozenset()
    return decide(policy, Flow(protocol, parse_address(address), port, names))


def test_the_first_rule_that_matches_decides() -> None:
    rules = [make_rule(ALLOW, ["10.1.0.0/16"]), make_rule(DENY, ["10.0.0.0/8"]), make_rule(ALLOW)]
    assert verdict(rules, "10.1.2.3") == Verdict(ALLOW, 0)
    assert verdict(rules, "10.2.0.1") == Verdict(DENY, 1)
    assert verdict(rules, "11.0.0.1") == Verdict(ALLOW, 2)
    assert verdict(list(reversed(rules)), "10.2.0.1") == Verdict(ALLOW, 0)


@pytest.mark.parametrize(("default", "action"), [("allow", ALLOW), ("deny", DENY)])
def test_without_a_match_the_default_decides(default: str, action: Action) -> None:
    assert verdict([make_rule(DENY, ["10.0.0.0/8"])], "8.8.8.8", default=default) == Verdict(action, None)


def test_a_rule_matches_when_all_that_it_lists_match() -> None:
    rules = [
        make_rule(
            DENY, ["10.0.0.0/8"], ports=(PortRange(20, 21), PortRange(25, 25)), protocols=frozenset([Protocol.TCP])
        )
    ]
    assert verdict(rules, "10.0.0.1", 20).action is DENY
    assert verdict(rules, "10.0.0.1", 21).action is DENY
    assert verdict(rules, "10.0.0.1", 25).action is DENY
    assert verdict(rules, "10.0.0.1", 22).action is ALLOW
    assert verdict(rules, "10.0.0.1", 19).action is ALLOW
    assert verdict(rules, "10.0.0.1", 25, protocol="udp").action is ALLOW
    assert verdict(rules, "11.0.0.1", 25).action is ALLOW


def test_a_rule_without_ports_covers_port_0() -> None:
    assert verdict([make_rule(DENY, ["10.0.0.0/8"])], "10.0.0.1", 0).action is DENY
    assert verdict([make_rule(DENY, ports=(PortRange(1, 65535),))], "10.0.0.1", 0).action is ALLOW


def test_ipv4_and_its_mapped_form_are_one_address() -> None:
    assert verdict([make_rule(DENY, ["10.0.0.0/8"])], "::ffff:10.0.0.1").action is DENY
    assert verdict([make_rule(DENY, ["::ffff:10.0.0.0/104"])], "10.0.0.1").action is DENY


def test_a_rule_of_names_matches_by_name_or_by_address() -> None:
    rules = [make_rule(ALLOW, ["9.9.9.9"], names=("smtp.gmail.com",)), make_rule(DENY)]
    assert verdict(rules, "142.250.0.1", name="smtp.gmail.com") == Verdict(ALLOW, 0)
    assert verdict(rules, "142.250.0.1", name="example.org") == Verdict(DENY, 1)
    assert verdict(rules, "142.250.0.1") == Verdict(DENY, 1)
    assert verdict(rules, "9.9.9.9") == Verdict(ALLOW, 0)


@pytest.mark.parametrize("zero", ["0.0.0.0", "::", "::ffff:0.0.0.0"])
def test_the_zero_address_is_judged_as_loopback(zero: str) -> None:
    """Linux connects 0.0.0.0 to 127.0.0.1 (kernel.md A8)."""
    loopback = ["127.0.0.0/8", "::1"]
    assert verdict([make_rule(DENY, loopback)], zero).action is DENY
    assert verdict([make_rule(DENY, ["0.0.0.0", "::"])], zero).action is ALLOW
    assert destination(parse_address(zero)).value == "loopback"


@pytest.mark.parametrize(
    "address", ["64:ff9b::10.0.0.1", "2002:a00:1::1", "2002:a00:1:ffff:ffff:ffff:ffff:ffff", "::10.0.0.1"]
)
def test_an_ipv4_address_inside_is_judged_too(address: str) -> None:
    rules = [make_rule(DENY, ["192.168.0.0/16"]), make_rule(DENY, ["10.0.0.0/8"], ports=(PortRange(443, 443),))]
    assert verdict(rules, address, 443) == Verdict(DENY, 1)
    assert verdict(rules, address, 80) == Verdict(ALLOW, None)
    assert verdict([make_rule(ALLOW, ["2000::/3"]), *rules], address, 443).action is DENY


def test_the_address_inside_can_only_refuse() -> None:
    rules = [make_rule(ALLOW, ["10.0.0.0/8"])]
    assert verdict(rules, "64:ff9b::10.0.0.1", default="deny") == Verdict(DENY, None)
    allowed = [make_rule(ALLOW, ["64:ff9b::/96"]), make_rule(ALLOW, ["10.0.0.0/8"])]
    assert verdict(allowed, "64:ff9b::10.0.0.1", default="deny") == Verdict(ALLOW, 0)
    assert verdict(allowed[:1], "64:ff9b::10.0.0.1", default="deny") == Verdict(DENY, None)


def test_the_zero_address_inside_is_loopback_too() -> None:
    rules = [make_rule(DENY, ["127.0.0.0/8"])]
    assert verdict(rules, "64:ff9b::0.0.0.0") == Verdict(DENY, 0)
    assert verdict(rules, "2002::1") == Verdict(DENY, 0)


@pytest.mark.parametrize(
    ("address", "inner"),
    [
        ("64:ff9b::8.8.8.8", "8.8.8.8"),
        ("64:ff9b::", "127.0.0.1"),
        ("64:ff9b::1:808:808", None),  # outside the /96
        ("2002:808:808::", "8.8.8.8"),
        ("2003:808:808::", None),
        ("::8.8.8.8", "8.8.8.8"),
        ("::2", "0.0.0.2"),
        ("::1", None),
        ("::", None),  # normalised to ::1
        ("::1:8.8.8.8", None),
        ("8.8.8.8", None),
        ("2001:db8::8.8.8.8", None),
    ],
)
def test_embedded(address: str, inner: str | None) -> None:
    found = embedded(normalise(parse_address(address)))
    assert (None if found is None else format_address(found)) == inner


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("8.8.8.8", "public"), ("2001:4860:4860::8888", "public"), ("64:ff9b::10.0.0.1", "public"),
        ("2002:a00:1::", "public"), ("172.15.255.255", "public"), ("172.32.0.0", "public"), ("128.0.0.0", "public"),
        ("126.255.255.255", "public"), ("100.128.0.0", "public"),
        ("127.0.0.1", "loopback"), ("127.255.255.255", "loopback"), ("::1", "loopback"), ("0.0.0.0", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("10.0.0.0", "private"), ("172.16.0.0", "private"), ("172.31.255.255", "private"), ("192.168.0.1", "private"),
        ("100.64.0.1", "private"), ("169.254.169.254", "private"), ("fe80::1", "private"), ("fd00:ec2::254", "private"),
        ("fec0::1", "private"), ("224.0.0.251", "private"), ("ff02::1", "private"), ("255.255.255.255", "private"),
        ("240.0.0.1", "private"), ("0.0.0.1", "private"), ("2001::1", "private"), ("2001:db8::1", "private"),
        ("64:ff9b:1::1", "private"), ("::ffff:0:10.0.0.1", "private"), ("100::1", "private"), ("200::1", "private"),
        ("3fff::1", "private"), ("5f00::1", "private"), ("198.18.0.1", "private"), ("192.0.0.192", "private"),
    ],
)  # fmt: skip
def test_destination(address: str, kind: str) -> None:
    assert destination(parse_address(address)).value == kind
