"""The compiled tables decide as the specification does, and keep the promises that the kernel programs rely on."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import WeirError
from agent.policy.compile import (
    DEFAULT_RULE,
    MAX_CLAUSES,
    MAX_LIST,
    MAX_RULES,
    Tables,
    compile_policy,
    narrower,
)
from agent.policy.decide import decide, destination
from agent.policy.model import (
    BOTH_PROTOCOLS,
    IPV4_MAPPED,
    Action,
    Destination,
    Flow,
    Mode,
    Policy,
    PortRange,
    Prefix,
    Protocol,
    Rule,
)
from tests.policies import OPEN_SOCKETS, addresses, flows, policies
from tests.tables import evaluate


def policy(*egress: Rule, default: Action = Action.ALLOW) -> Policy:
    return Policy("test", Mode.ENFORCE, OPEN_SOCKETS, egress, default, "test.yaml", "0" * 64, "")


def rule(
    action: Action, *to: str, ports: tuple[PortRange, ...] = (), protocols: frozenset[Protocol] = BOTH_PROTOCOLS
) -> Rule:
    return Rule("rule", action, tuple(map(Prefix.parse, to)) if to else None, (), ports, protocols, 1)


def printed(tables: Tables) -> list[str]:
    """Return the entries as text, those that hold only the default left out."""
    lines = []
    for entry in tables.entries:
        clauses = " ".join(
            f"{clause.protocols}:{clause.first_port}-{clause.last_port}:{clause.action.value}:"
            f"{'default' if clause.rule == DEFAULT_RULE else clause.rule}"
            for clause in tables.clauses_of(entry)
        )
        if clauses != "3:0-65535:allow:default":
            lines.append(f"{entry.prefix} {entry.destination.value} {clauses}")
    return lines


@settings(max_examples=400, deadline=None)
@given(policies().flatmap(lambda policy: st.tuples(st.just(policy), st.lists(flows(policy), min_size=1, max_size=12))))
def test_tables_decide_as_the_specification(drawn: tuple[Policy, list[Flow]]) -> None:
    chosen, tried = drawn
    tables = compile_policy(chosen)
    for flow in tried:
        assert evaluate(tables, flow) == (decide(chosen, flow), destination(flow.address))


@settings(max_examples=200, deadline=None)
@given(policies().flatmap(lambda policy: st.tuples(st.just(policy), flows(policy, names=True))))
def test_names_never_open_what_the_tables_refuse_by_another_rule(drawn: tuple[Policy, Flow]) -> None:
    """The kernel ignores names: its verdict is that of the policy with the names taken out."""
    chosen, flow = drawn
    nameless = replace(chosen, egress=tuple(replace(rule, names=()) for rule in chosen.egress))
    assert evaluate(compile_policy(chosen), flow)[0] == decide(nameless, flow)


@settings(max_examples=200, deadline=None)
@given(policies())
def test_entries_keep_their_promises(chosen: Policy) -> None:
    tables = compile_policy(chosen)
    assert tables.entries[0].prefix == Prefix(0, 0)
    found = [entry.prefix for entry in tables.entries]
    assert found == sorted(set(found))
    for entry in tables.entries:
        mine = tables.clauses_of(entry)
        assert len(mine) == entry.count > 0
        assert [clause.unconditional for clause in mine] == [False] * (len(mine) - 1) + [True]
        real = [clause.rule for clause in mine if clause.rule != DEFAULT_RULE]
        assert real == sorted(real)
        assert all(clause.rule != DEFAULT_RULE for clause in mine[:-1])
        around = [
            other for other in tables.entries if other is not entry and other.prefix.contains(entry.prefix.address)
        ]
        around = [other for other in around if other.prefix.length < entry.prefix.length]
        if around:
            nearest = max(around, key=lambda other: other.prefix.length)
            assert (nearest.destination, tables.clauses_of(nearest)) != (entry.destination, mine)
    lists = [tables.clauses_of(entry) for entry in tables.entries]
    assert len({(entry.first, entry.count) for entry in tables.entries}) == len(set(lists))


@given(addresses)
def test_destination_class_does_not_depend_on_the_policy(address: int) -> None:
    flow = Flow(Protocol.TCP, address, 443)
    assert evaluate(compile_policy(policy()), flow)[1] is destination(address)


@pytest.mark.parametrize(
    ("outer", "own", "kind"),
    [
        ("public", None, "public"),
        ("public", "private", "private"),
        ("private", None, "private"),
        ("private", "loopback", "loopback"),
        ("loopback", "private", "loopback"),
    ],
)
def test_a_class_inside_another(outer: str, own: str | None, kind: str) -> None:
    """As `destination` has it: an address in both sets is loopback, whichever prefix is longer."""
    assert narrower(Destination(outer), None if own is None else Destination(own)) is Destination(kind)


def test_printed_tables() -> None:
    """An allowed host inside a denied network inside an allowed range, with a rule for one port in front."""
    tables = compile_policy(
        policy(
            rule(Action.DENY, ports=(PortRange(25, 25),)),
            rule(Action.ALLOW, "93.184.216.34", ports=(PortRange(53, 53),), protocols=frozenset([Protocol.UDP])),
            rule(Action.DENY, "93.184.0.0/16"),
            rule(Action.ALLOW, "93.184.216.0/24"),
        )
    )
    smtp = "3:25-25:deny:0"
    assert [line for line in printed(tables) if line.startswith(("93.", "::/0"))] == [
        f"::/0 public {smtp} 3:0-65535:allow:default",
        f"93.184.0.0/16 public {smtp} 3:0-65535:deny:2",  # the /24 inside it says the same, so it has no entry
        f"93.184.216.34 public {smtp} 2:53-53:allow:1 3:0-65535:deny:2",
    ]


def test_a_rule_of_names_alone_has_no_clause() -> None:
    only_names = Rule("gmail", Action.ALLOW, (), ("smtp.gmail.com",), (), BOTH_PROTOCOLS, 1)
    tables = compile_policy(policy(only_names, default=Action.DENY))
    assert {clause.rule for clause in tables.clauses} == {DEFAULT_RULE}


def test_limit_of_rules() -> None:
    rules = [rule(Action.DENY, f"10.0.{index // 256}.{index % 256}") for index in range(MAX_RULES + 1)]
    compile_policy(policy(*rules[:MAX_RULES]))
    with pytest.raises(WeirError, match=r"at least 513 rules; the limit is 512"):
        compile_policy(policy(*rules))


def test_limit_of_one_list() -> None:
    ports = tuple(PortRange(port, port) for port in range(1, MAX_LIST + 1))
    compile_policy(policy(rule(Action.DENY, ports=ports[:-1])))  # and the default makes MAX_LIST
    with pytest.raises(WeirError, match=r"at least 129 tests of protocol and port for one destination"):
        compile_policy(policy(rule(Action.DENY, ports=ports)))


def test_limit_of_all_lists() -> None:
    ports = tuple(PortRange(port, port) for port in range(1, 101))
    rules = [rule(Action.DENY, f"93.0.{index}.0/24", ports=ports) for index in range(MAX_CLAUSES // 101 + 1)]
    compile_policy(policy(*rules[:-1]))
    with pytest.raises(WeirError, match=r"tests of protocol and port in all; the limit is 4,096"):
        compile_policy(policy(*rules))


def test_limit_of_prefixes() -> None:
    every_other = tuple(Prefix(IPV4_MAPPED | 2 * index, 128) for index in range(1 << 18))
    with pytest.raises(WeirError, match=r"different prefixes; the limit is 262,144"):
        compile_policy(policy(Rule("many", Action.DENY, every_other, (), (), BOTH_PROTOCOLS, 1)))
