"""What the policy says about an attempt: by the specification for destinations, by the filter's rules for system calls."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace

from agent.policy.decide import decide
from agent.policy.explain import rule_name
from agent.policy.model import Action, Flow, Policy, Protocol, parse_address
from agent.seccomp.rules import rules
from tests.demo.attempts import Attempt, Kind

BY_NAME = "*"
"""Marks what the policy decides otherwise by the destination's name, which the kernel does not know yet."""

_WORKS = {Kind.TCP: "connected", Kind.UDP: "answered", Kind.ROUTE: "sent", Kind.STRANGER: "received"}
_PROTOCOLS = {Kind.TCP: Protocol.TCP, Kind.UDP: Protocol.UDP}
_HOOKS = {Kind.TCP: "connect hook", Kind.UDP: "sendmsg hook"}


@dataclass(frozen=True)
class Expected:
    """``saw`` is the word or errno that the program should see; layer and rule are those that refuse it, else empty."""

    text: str
    saw: str
    layer: str = ""
    rule: str = ""


def expected(policy: Policy, attempt: Attempt, refusal: str) -> Expected:
    """What should happen. ``refusal`` is the errno that this kernel gives at connect and sendmsg (weir status)."""
    if attempt.kind in _PROTOCOLS:
        return _destination(policy, attempt, refusal)
    denied = f"deny: {attempt.part}"
    if attempt.kind is Kind.ROUTE:
        return Expected(denied, "EPERM", "packet out", "sockets/header")
    if attempt.kind is Kind.STRANGER:
        if policy.sockets.listen is Action.ALLOW:
            return Expected("allow: listen", _WORKS[attempt.kind])
        return Expected(denied, "nothing", "packet in", "sockets/unsolicited")
    return Expected(denied, errno.errorcode[_filter(policy, attempt)], "seccomp")


def _destination(policy: Policy, attempt: Attempt, refusal: str) -> Expected:
    flow = Flow(_PROTOCOLS[attempt.kind], parse_address(attempt.address), attempt.port)
    verdict = decide(policy, flow)
    by_name = decide(policy, replace(flow, names=frozenset([attempt.name])))
    rule = rule_name(policy, verdict)
    if verdict.action is Action.ALLOW:
        return Expected(f"allow: {rule}", _WORKS[attempt.kind])
    where = rule if verdict.rule is None else f"{rule}, line {policy.egress[verdict.rule].line}"
    return Expected(f"deny: {rule}{' ' + BY_NAME if by_name != verdict else ''}", refusal, _HOOKS[attempt.kind], where)


def _filter(policy: Policy, attempt: Attempt) -> int:
    """The errno of the filter's rule for this system call. Raises LookupError when the policy has none."""
    for deny in rules(policy.sockets):
        if deny.call != attempt.kind.value:
            continue
        if all(attempt.socket[c.argument] & c.mask == c.value for c in deny.comparisons):
            return deny.errno
    raise LookupError(f"policy {policy.name} does not refuse: {attempt.text}")
