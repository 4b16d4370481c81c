"""A list of clauses → pieces of the port space, each decided by one clause: the second of the kernel's two look-ups.

The kernel finds the piece by longest-prefix match on (list, protocol, port), so it needs no loop over clauses and the
length of a list costs nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from agent.policy.compile import PROTOCOL_BITS, Clause
from agent.policy.model import MAX_PORT, Action, Protocol

PORT_BITS = 16


class Piece(NamedTuple):
    """Ports that share their first ``length`` bits (0 to 16) with ``port``, and the verdict on them."""

    protocol: Protocol
    port: int
    length: int
    action: Action
    rule: int


def pieces(clauses: Sequence[Clause]) -> tuple[Piece, ...]:
    """Return disjoint pieces that cover every port of both protocols and give the first matching clause's verdict.

    ``clauses`` ends in an unconditional one, as every list of Tables does.
    """
    found: list[Piece] = []
    for protocol in Protocol:
        own = [clause for clause in clauses if clause.protocols & PROTOCOL_BITS[protocol]]
        for first, last, clause in intervals(own):
            found.extend(
                Piece(protocol, port, length, clause.action, clause.rule) for port, length in prefixes(first, last)
            )
    return tuple(found)


def intervals(clauses: Iterable[Clause]) -> Iterator[tuple[int, int, Clause]]:
    """Yield (first port, last port, the clause that decides them), neighbours of one rule joined."""
    ordered = list(clauses)
    starts = sorted({0, *(c.first_port for c in ordered), *(c.last_port + 1 for c in ordered)} - {MAX_PORT + 1})
    begin, current = 0, decides(ordered, 0)
    for start in starts[1:]:
        following = decides(ordered, start)
        if (following.action, following.rule) != (current.action, current.rule):
            yield begin, start - 1, current
            begin, current = start, following
    yield begin, MAX_PORT, current


def decides(clauses: Iterable[Clause], port: int) -> Clause:
    """Return the first clause that covers the port."""
    return next(clause for clause in clauses if clause.first_port <= port <= clause.last_port)


def prefixes(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the fewest (port, prefix length) that cover exactly the ports from ``first`` to ``last``."""
    while first <= last:
        bits = (first & -first).bit_length() - 1 if first else PORT_BITS
        while first + (1 << bits) - 1 > last:
            bits -= 1
        yield first, PORT_BITS - bits
        first += 1 << bits
