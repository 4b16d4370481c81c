"""The pieces of the port space against the clauses that they come from."""

from __future__ import annotations

from hypothesis import given, settings

from agent.policy.compile import Clause, compile_policy
from agent.policy.model import Action, Policy, Protocol
from agent.policy.ports import Piece, pieces, prefixes
from tests.policies import policies

EVERYTHING = Clause(3, 0, 65535, Action.ALLOW, 0xFFFF)


def find(found: tuple[Piece, ...], protocol: Protocol, port: int) -> Piece:
    """The longest match, as the kernel's LPM trie finds it."""
    fitting = [p for p in found if p.protocol is protocol and (p.port ^ port) >> (16 - p.length) == 0]
    return max(fitting, key=lambda piece: piece.length)


def test_one_denied_port() -> None:
    found = pieces([Clause(1, 25, 25, Action.DENY, 0), EVERYTHING])
    assert find(found, Protocol.TCP, 25)[3:] == (Action.DENY, 0)
    assert find(found, Protocol.TCP, 24)[3:] == find(found, Protocol.TCP, 26)[3:] == (Action.ALLOW, 0xFFFF)
    assert [piece for piece in found if piece.protocol is Protocol.UDP] == [
        Piece(Protocol.UDP, 0, 0, Action.ALLOW, 0xFFFF)
    ]


def test_prefixes_of_a_range_cover_it_and_nothing_else() -> None:
    for first, last in ((0, 65535), (1, 65535), (0, 65534), (5, 5), (1023, 1025), (20, 21)):
        covered = [port + i for port, length in prefixes(first, last) for i in range(1 << (16 - length))]
        assert covered == list(range(first, last + 1))


@settings(max_examples=100, deadline=None)
@given(policies())
def test_every_edge_has_the_first_matching_clause(policy: Policy) -> None:
    tables = compile_policy(policy)
    for clauses in {tables.clauses_of(entry) for entry in tables.entries}:
        found = pieces(clauses)
        edges = {0, 65535, *(c.first_port for c in clauses), *(c.last_port for c in clauses)}
        for port in {edge + step for edge in edges for step in (-1, 0, 1) if 0 <= edge + step <= 65535}:
            for protocol, bit in ((Protocol.TCP, 1), (Protocol.UDP, 2)):
                wanted = next(c for c in clauses if c.protocols & bit and c.first_port <= port <= c.last_port)
                assert find(found, protocol, port)[3:] == (wanted.action, wanted.rule)
