"""Compiled tables as the kernel programs read them, in Python: what `decide` is held against without a kernel."""

from collections.abc import Iterable

from agent.policy.compile import DEFAULT_RULE, PROTOCOL_BITS, Clause, Entry, Tables
from agent.policy.decide import embedded, normalise
from agent.policy.model import Action, Destination, Flow, Verdict


def evaluate(tables: Tables, flow: Flow) -> tuple[Verdict, Destination]:
    """Return the verdict on a flow and its destination class, by address only."""
    address = normalise(flow.address)
    entry = longest(tables, address)
    verdict = first_match(tables.clauses_of(entry), flow)
    inner = embedded(address)
    if verdict.action is Action.ALLOW and inner is not None:
        second = first_match(tables.clauses_of(longest(tables, inner)), flow)
        verdict = second if second.action is Action.DENY else verdict
    return verdict, entry.destination


def longest(tables: Tables, address: int) -> Entry:
    """Return the entry of the longest prefix that contains the address, as the kernel's LPM trie does."""
    return max((entry for entry in tables.entries if entry.prefix.contains(address)), key=lambda e: e.prefix.length)


def first_match(candidates: Iterable[Clause], flow: Flow) -> Verdict:
    """Return the verdict of the first clause that matches; the last of every list matches everything."""
    bit = PROTOCOL_BITS[flow.protocol]
    clause = next(c for c in candidates if c.protocols & bit and c.first_port <= flow.port <= c.last_port)
    return Verdict(clause.action, None if clause.rule == DEFAULT_RULE else clause.rule)
