"""What a policy becomes besides its tables: flags, and a name for the version that equal policies share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.controller import compiled, flags_of
from agent.kernel.abi import Flag
from agent.policy.find import load
from agent.policy.model import Action, Bind, Family, Mode, Policy, Protocol, Rule, Selector, Sockets
from tests.policies import OPEN_SOCKETS

ALLOW_ALL = Policy("open", Mode.ENFORCE, OPEN_SOCKETS, (), Action.ALLOW, "open.yaml", "0" * 64, "")


def sockets(**changes: object) -> Sockets:
    return replace(OPEN_SOCKETS, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "flag", "holds"),
    [
        (replace(ALLOW_ALL, mode=Mode.AUDIT), Flag.AUDIT, True),
        (ALLOW_ALL, Flag.AUDIT, False),
        (ALLOW_ALL, Flag.LISTEN, True),
        (replace(ALLOW_ALL, sockets=sockets(listen=Action.DENY)), Flag.LISTEN, False),
        (ALLOW_ALL, Flag.BIND_ANY, True),
        (replace(ALLOW_ALL, sockets=sockets(bind=Bind.EPHEMERAL)), Flag.BIND_EPHEMERAL, True),
        (replace(ALLOW_ALL, sockets=sockets(bind=Bind.EPHEMERAL)), Flag.BIND_ANY, False),
        (replace(ALLOW_ALL, sockets=sockets(bind=Bind.DENY)), Flag.BIND_ANY | Flag.BIND_EPHEMERAL, False),
        (replace(ALLOW_ALL, sockets=sockets(transfer=Action.DENY)), Flag.TRANSFER, False),
        (replace(ALLOW_ALL, sockets=sockets(families=frozenset({Family.INET6}))), Flag.INET, False),
        (replace(ALLOW_ALL, sockets=sockets(families=frozenset({Family.INET}))), Flag.INET6, False),
        (replace(ALLOW_ALL, sockets=sockets(protocols=frozenset({Protocol.UDP}))), Flag.TCP, False),
        (replace(ALLOW_ALL, sockets=sockets(protocols=frozenset({Protocol.TCP}))), Flag.UDP, False),
        (replace(ALLOW_ALL, sockets=sockets(idle_timeout=600)), Flag.WANTS_IDLE, True),
        (ALLOW_ALL, Flag.WANTS_IDLE | Flag.WANTS_NAMES | Flag.WANTS_OPTIONS, False),
        (load("appengine", resolvers=()), Flag.WANTS_NAMES, True),
        (load("appengine", resolvers=()), Flag.WANTS_OPTIONS, True),
    ],
)
def test_flags(policy: Policy, flag: Flag, holds: bool) -> None:
    assert bool(flags_of(policy) & flag) is holds


def test_a_rule_of_another_name_is_another_version() -> None:
    rule = Rule("a", Action.DENY, None, (), (), frozenset(Protocol), 7)
    versions = [
        compiled(replace(ALLOW_ALL, egress=(replace(rule, **c),))).version for c in ({}, {"name": "b"}, {"line": 8})
    ]
    assert len({version.sha256 for version in versions}) == 3


def test_who_a_policy_is_for_is_not_in_the_tables() -> None:
    assert compiled(replace(ALLOW_ALL, selector=Selector(namespaces=("prod",)))) == compiled(ALLOW_ALL)
