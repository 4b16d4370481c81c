"""The specification: what a policy says about a flow, slow and obvious.

Everything else that judges flows (the compiled tables, the kernel programs, `explain`) is tested against this file.
"""

from dataclasses import replace
from enum import Enum

from agent.policy import sets
from agent.policy.model import IPV4_MAPPED, Action, Destination, Flow, Policy, Prefix, Rule, Verdict

LOOPBACK4 = IPV4_MAPPED | 0x7F000001
LOOPBACK6 = 1

NAT64 = Prefix(0x64FF9B << 96, 96)
"""64:ff9b::/96, RFC 6052: the last 32 bits are the IPv4 address that a gateway sends to."""
SIX_TO_FOUR = Prefix(0x2002 << 112, 16)
"""2002::/16, RFC 3056: bits 16 to 47 are the IPv4 address of the router that the packet is tunnelled to."""
IPV4_COMPATIBLE = Prefix(0, 96)
"""::/96, RFC 4291 2.5.5.1: the last 32 bits are the IPv4 address; :: and ::1 are not of this kind."""


class Mismatch(str, Enum):
    """The first thing about a flow that a rule does not cover."""

    PROTOCOL = "protocol"
    PORT = "port"
    DESTINATION = "destination"


def normalise(address: int) -> int:
    """Return the address that Linux connects to: 0.0.0.0 means 127.0.0.1 and :: means ::1."""
    if address == IPV4_MAPPED:
        return LOOPBACK4
    return LOOPBACK6 if address == 0 else address


def embedded(address: int) -> int | None:
    """Return the IPv4 address (as ::ffff:a.b.c.d, normalised) that a normalised IPv6 address leads to, or None."""
    if NAT64.contains(address) or (IPV4_COMPATIBLE.contains(address) and address != LOOPBACK6):
        inner = address & 0xFFFFFFFF
    elif SIX_TO_FOUR.contains(address):
        inner = address >> 80 & 0xFFFFFFFF
    else:
        return None
    return normalise(IPV4_MAPPED | inner)


def mismatch(rule: Rule, flow: Flow) -> Mismatch | None:
    """Return what keeps the rule from matching a flow whose address is normalised; None when it matches."""
    if flow.protocol not in rule.protocols:
        return Mismatch.PROTOCOL
    if rule.ports and not any(ports.first <= flow.port <= ports.last for ports in rule.ports):
        return Mismatch.PORT
    if rule.prefixes is None:
        return None
    by_address = any(prefix.contains(flow.address) for prefix in rule.prefixes)
    return None if by_address or flow.names.intersection(rule.names) else Mismatch.DESTINATION


def judge(policy: Policy, flow: Flow) -> Verdict:
    """Return what the first rule in order that matches says, or else the default, about the address as it stands."""
    flow = replace(flow, address=normalise(flow.address))
    for index, rule in enumerate(policy.egress):
        if mismatch(rule, flow) is None:
            return Verdict(rule.action, index)
    return Verdict(policy.default, None)


def decide(policy: Policy, flow: Flow) -> Verdict:
    """Return the verdict on a flow: that on its address and, when that allows, that on the IPv4 address inside it.

    A protocol outside policy.sockets.protocols never comes here: its socket could not be created.
    """
    verdict = judge(policy, flow)
    inner = embedded(normalise(flow.address))
    if verdict.action is Action.DENY or inner is None:
        return verdict
    second = judge(policy, replace(flow, address=inner))
    return second if second.action is Action.DENY else verdict


def destination(address: int) -> Destination:
    """Return the class under which bytes to the address are counted; an IPv4 address inside it is not looked at.

    Raises WeirError when a set cannot be read.
    """
    address = normalise(address)
    for kind, prefixes in sets.destinations().items():
        if any(prefix.contains(address) for prefix in prefixes):
            return kind
    return Destination.PUBLIC
