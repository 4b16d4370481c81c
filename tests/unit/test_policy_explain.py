"""Explanations: the rule, its line, every earlier rule with its reason, and the address that was judged."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.policy.decide import decide
from agent.policy.explain import Explanation, as_json, as_text, explain
from agent.policy.model import Action, Flow, Policy, Prefix, Protocol, parse_address
from agent.policy.parse import parse
from tests.policies import flows, policies

TEXT = """\
apiVersion: weir.dev/v1
kind: SocketPolicy
metadata: {name: test}
spec:
  egress:
    - {name: tcp-only, action: deny, protocol: tcp, ports: [25]}
    - {name: web, action: deny, ports: [80, 8000-8099]}
    - {name: one, action: allow, to: [9.9.9.9, {name: a.org}]}
    - {name: many, action: deny, to: [10.0.0.0/8, 192.168.0.0/16, 172.16.0.0/12, 100.64.0.0/10, 127.0.0.0/8]}
    - {name: mine, action: deny, to: [{set: resolvers}]}
  default: allow
"""


def explained(flow: str, text: str = TEXT) -> Explanation:
    protocol, address, port, *names = flow.split(" ")
    policy = parse(text, "p.yaml", ())
    return explain(policy, Flow(Protocol(protocol), parse_address(address), int(port), frozenset(names)))


def test_every_earlier_rule_and_why() -> None:
    assert as_text(explained("udp 10.1.2.3 443")).splitlines() == [
        "deny: udp 10.1.2.3 port 443, by rule many (p.yaml:9)",
        "  judged as 10.1.2.3: deny by rule many (p.yaml:9)",
        "    no  tcp-only  line 6    is for tcp only",
        "    no  web       line 7    is for ports 80, 8000-8099",
        "    no  one       line 8    is for a.org, 9.9.9.9",
        "    yes many      line 9    10.1.2.3 is in 10.0.0.0/8",
        "bytes to it count as private",
    ]


def test_the_default_after_every_rule() -> None:
    lines = as_text(explained("tcp 93.184.216.34 443")).splitlines()
    assert lines[0] == "allow: tcp 93.184.216.34 port 443, by spec.default (p.yaml)"
    assert lines[2] == "    no  tcp-only  line 6    is for port 25"
    assert lines[5] == "    no  many      line 9    is for 5 prefixes"
    assert lines[6] == "    no  mine      line 10   is for no address on this host"


def test_the_address_inside() -> None:
    found = explained("tcp 64:ff9b::a01:203 443")
    assert [(one.embedded, one.verdict.action, one.verdict.rule) for one in found.judgements] == [
        (False, Action.ALLOW, None),
        (True, Action.DENY, 3),
    ]
    text = as_text(found)
    assert text.startswith("deny: tcp 64:ff9b::a01:203 port 443, by rule many (p.yaml:9)\n")
    assert "  judged as 64:ff9b::a01:203: allow by spec.default (p.yaml)\n" in text
    assert "  judged again as 10.1.2.3, the IPv4 address inside it: deny by rule many (p.yaml:9)\n" in text


def test_the_zero_address() -> None:
    text = as_text(explained("tcp 0.0.0.0 443"))
    assert "judged as 127.0.0.1, which is where Linux connects 0.0.0.0: deny by rule many" in text
    assert "127.0.0.1 is in 127.0.0.0/8" in text
    assert text.endswith("bytes to it count as loopback")


def test_a_name_is_explained_and_said_not_to_be_in_force() -> None:
    text = as_text(explained("tcp 10.0.0.1 443 a.org"))
    assert text.startswith("allow: tcp 10.0.0.1 port 443, by rule one (p.yaml:8)")
    assert "yes one       line 8    the program resolved a.org" in text
    assert "destination names are not in force yet: the kernel decides by address alone, deny by rule many" in text
    assert "not in force" not in as_text(explained("tcp 9.9.9.9 443 a.org"))


def test_an_unconditional_rule() -> None:
    text = TEXT.replace("  default: allow", "    - {name: rest, action: deny}\n  default: allow")
    assert "yes rest      line 11   matches every destination" in as_text(explained("tcp 93.184.216.34 443", text))


@pytest.mark.parametrize(
    ("sockets", "flow", "reason"),
    [
        ("protocols: [tcp]", "udp 93.184.216.34 443", "spec.sockets.protocols lacks udp"),
        ("families: [inet, unix]", "tcp 2606:2800:220:1::1 443", "spec.sockets.families lacks inet6"),
        ("families: [unix]", "tcp 93.184.216.34 443", "spec.sockets.families lacks inet and inet6"),
    ],
)
def test_a_socket_that_cannot_be(sockets: str, flow: str, reason: str) -> None:
    found = explained(flow, TEXT.replace("spec:\n", f"spec:\n  sockets: {{{sockets}}}\n"))
    assert found.action is Action.DENY
    assert as_text(found).splitlines()[0].endswith(f", by socket(): {reason}")
    assert as_json(found)["socket"] == reason


@pytest.mark.parametrize("families", ["[inet]", "[inet6]"])
def test_ipv4_needs_one_of_two_families(families: str) -> None:
    found = explained("tcp 93.184.216.34 443", TEXT.replace("spec:\n", f"spec:\n  sockets: {{families: {families}}}\n"))
    assert found.action is Action.ALLOW


def test_audit_says_that_nothing_is_refused() -> None:
    text = TEXT.replace("spec:\n", "spec:\n  mode: audit\n")
    assert "counted and reported, and not refused" in as_text(explained("tcp 10.0.0.1 443", text))
    assert "not refused" not in as_text(explained("tcp 93.184.216.34 443", text))


def test_json() -> None:
    printed = json.loads(json.dumps(as_json(explained("udp ::10.1.2.3 443 a.org"))))
    judgements = printed.pop("judgements")
    assert printed == {
        "policy": "test",
        "file": "p.yaml",
        "mode": "enforce",
        "flow": {"protocol": "udp", "address": "::a01:203", "port": 443, "names": ["a.org"]},
        "action": "allow",
        "rule": "one",
        "socket": None,
        "byAddress": {"action": "deny", "rule": "many"},
        "destination": "public",
    }
    assert [one["address"] for one in judgements] == ["::a01:203", "10.1.2.3"]
    assert judgements[1]["steps"][:2] == [
        {"rule": "tcp-only", "line": 6, "mismatch": "protocol", "why": "is for tcp only"},
        {"rule": "web", "line": 7, "mismatch": "port", "why": "is for ports 80, 8000-8099"},
    ]
    assert judgements[1]["steps"][2]["mismatch"] is None


@settings(max_examples=200, deadline=None)
@given(policies().flatmap(lambda policy: st.tuples(st.just(policy), flows(policy, names=True))))
def test_explanations_agree_with_the_specification(drawn: tuple[Policy, Flow]) -> None:
    policy, flow = drawn
    found = explain(policy, flow)
    assert found.verdict == decide(policy, flow)
    for one in found.judgements:
        assert [step.index for step in one.steps] == list(range(len(one.steps)))
        assert all(step.mismatch for step in one.steps[:-1])
        matched = bool(one.steps) and one.steps[-1].mismatch is None
        assert one.verdict.rule == (one.steps[-1].index if matched else None)
        assert len(one.steps) == (len(policy.egress) if one.verdict.rule is None else one.verdict.rule + 1)
    refused = [one.verdict for one in found.judgements if one.verdict.action is Action.DENY]
    assert found.verdict == (refused[-1] if refused else found.judgements[0].verdict)
    assert as_text(found).startswith(found.verdict.action.value)


def test_a_prefix_is_the_longest_that_holds_the_address() -> None:
    text = TEXT.replace("10.0.0.0/8, 192", "10.0.0.0/8, 192").replace("[9.9.9.9, {name", "[9.0.0.0/8, {name")
    assert Prefix.parse("9.0.0.0/8") in (parse(text, "p.yaml", ()).egress[2].prefixes or ())
    assert "yes one       line 8    9.9.9.9 is in 9.0.0.0/8" in as_text(explained("tcp 9.9.9.9 443", text))
