"""Rules that hide one another: found when it is so on every host, and only then."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.policy.decide import decide
from agent.policy.document import RulePart
from agent.policy.model import Action, Flow, Policy, PortRange, Prefix
from agent.policy.overlap import port_set, repeated_destinations, repeated_ports
from agent.policy.parse import PolicyInvalid, parse
from tests.policies import as_yaml, flows, policies, port_ranges, prefixes

HEAD = "apiVersion: weir.dev/v1\nkind: SocketPolicy\nmetadata: {name: test}\nspec:\n  egress:\n"


def hidden(*rules: str) -> list[str]:
    """Return the names of the rules that can never match."""
    text = HEAD + "".join(f"    - {{name: r{index}, action: deny, {rule}}}\n" for index, rule in enumerate(rules))
    try:
        parse(text, "p.yaml", (Prefix.parse("8.8.8.8"),))
    except PolicyInvalid as error:
        assert all(" can never match: " in problem.message for problem in error.problems), error
        return [problem.message.split(" ")[0] for problem in error.problems]
    return []


@pytest.mark.parametrize(
    "rules",
    [
        ("", "ports: [25]"),
        ("protocol: tcp", "protocol: tcp, to: [8.8.8.8]"),
        ("to: [10.0.0.0/8]", "to: [10.1.0.0/16, 10.9.9.9]"),
        ("to: [{set: private}]", "to: [10.0.0.0/8]"),
        ("to: [{set: private}, {set: loopback}]", "to: [{set: loopback}]"),
        ("to: [10.0.0.0/8, {name: a.org}]", "to: [{name: a.org}, 10.0.0.1]"),
        ("ports: [20-30]", "ports: [25]"),
        ("ports: [20-30, 31-40]", "ports: [25-35]"),
        ("to: [{set: resolvers}]", "to: [{set: resolvers}], ports: [53]"),
    ],
)
def test_hidden(rules: tuple[str, str]) -> None:
    assert hidden(*rules) == ["r1"]


@pytest.mark.parametrize(
    "rules",
    [
        ("ports: [25]", ""),
        ("protocol: tcp", "to: [8.8.8.8]"),
        ("to: [10.1.0.0/16]", "to: [10.0.0.0/8]"),
        ("to: [10.0.0.0/8]", "to: [10.0.0.0/8, {name: a.org}]"),
        ("to: [10.0.0.0/9]", "to: [10.0.0.0/8]"),
        ("to: [10.0.0.0/8]", "ports: [25]"),
        ("ports: [20-30, 32-40]", "ports: [25-35]"),
        ("ports: [1-100]", "to: [8.8.8.8]"),  # port 0 is left
        ("to: [{set: resolvers}]", "to: [8.8.8.8]"),  # a resolver here, not on the next host
        ("to: [8.8.8.8]", "to: [{set: resolvers}]"),
        ("to: [{name: a.org}]", "to: [8.8.8.8]"),
    ],
)
def test_not_hidden(rules: tuple[str, str]) -> None:
    assert hidden(*rules) == []


@settings(max_examples=300, deadline=None)
@given(policies().flatmap(lambda policy: st.tuples(st.just(policy), st.lists(flows(policy, names=True), min_size=1))))
def test_a_rule_called_hidden_decides_nothing(drawn: tuple[Policy, list[Flow]]) -> None:
    policy, tried = drawn
    try:
        parse(as_yaml(policy), "p.yaml", ())
    except PolicyInvalid as error:
        found = [problem.message for problem in error.problems if " can never match: " in problem.message]
        never = {int(message.split(" ")[0].removeprefix("rule-")) for message in found}
        assert never.isdisjoint(decide(policy, flow).rule for flow in tried)


@settings(max_examples=300, deadline=None)
@given(policies(max_rules=3))
def test_a_policy_without_problems_reads_back(policy: Policy) -> None:
    try:
        read = parse(as_yaml(policy), "p.yaml", ())
    except PolicyInvalid:
        return
    assert [rule.name for rule in read.egress] == [rule.name for rule in policy.egress]
    for one, other in zip(read.egress, policy.egress, strict=True):
        mine, theirs = ((r.action, set(r.prefixes or ()), r.names, r.ports, r.protocols) for r in (one, other))
        assert mine == theirs
        assert (one.prefixes is None) == (other.prefixes is None)
    assert (read.default, read.sockets) == (policy.default, policy.sockets)


def rule(to: list[Prefix], ports: list[PortRange]) -> RulePart:
    return RulePart.model_construct(name="a", action=Action.DENY, to=tuple(to), ports=tuple(ports), protocol=None)


@given(st.lists(prefixes(), max_size=8))
def test_a_repeated_destination_is_in_a_member_of_the_list(to: list[Prefix]) -> None:
    wanted = []
    for index, prefix in enumerate(to):
        around = [other for other in to if other.length < prefix.length and other.contains(prefix.address)]
        widest = min(around, key=lambda other: other.length, default=None)
        if prefix in to[:index]:
            wanted.append((("to", index), "the same destination is in this list already; take one out"))
        elif widest:
            wanted.append((("to", index), f"{prefix} is inside {widest} of the same list; take it out"))
    assert list(repeated_destinations(rule(to, []), ())) == wanted


@given(st.lists(port_ranges(), max_size=12))
def test_a_repeated_port_is_in_the_first_range_that_has_it(ports: list[PortRange]) -> None:
    wanted = []
    for index, mine in enumerate(ports):
        before = [other for other in ports[:index] if other.first <= mine.last and mine.first <= other.last]
        if before:
            message = f"{mine} overlaps {before[0]} of the same list; join or remove one"
            wanted.append((("ports", index), message))
    assert list(repeated_ports(rule([], ports), ())) == wanted


@given(st.lists(port_ranges(), max_size=4).map(tuple))
def test_a_set_of_ports_has_those_of_the_ranges(ranges: tuple[PortRange, ...]) -> None:
    every = {port for ports in ranges for port in range(ports.first, ports.last + 1)} if ranges else set(range(65536))
    assert {port for port, bit in enumerate(reversed(f"{port_set(ranges):b}")) if bit == "1"} == every
