"""Policy → Tables, purely. agent/kernel/tables.py turns them into the maps that bpf/abi.h describes.

One longest-prefix match on the destination selects an entry; the entry's clauses, read in order, give the verdict.
For each prefix that occurs in the policy the entry holds the clauses of every rule that contains the prefix, so the
longest match selects exactly the rules that apply and their order is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from agent.errors import WeirError
from agent.policy import sets
from agent.policy.model import (
    BOTH_PROTOCOLS,
    MAX_PORT,
    Action,
    Destination,
    Policy,
    PortRange,
    Prefix,
    Protocol,
    nested,
)

MAX_RULES = 512  # bpf/abi.h: counters and events name a rule by its index
# Everything that a user can grow has a limit. These keep a policy version within tens of megabytes of kernel memory (a
# node of an LPM trie takes some hundred bytes, and one clause may become sixty of them) and its compilation in seconds.
MAX_CLAUSES = 4096
MAX_LIST = 128
MAX_PREFIXES = 262144

DEFAULT_RULE = 0xFFFF
"""The rule number of a clause that stands for the policy's default."""

EVERYWHERE = Prefix(0, 0)
EVERY_PORT = PortRange(0, MAX_PORT)
PROTOCOL_BITS = {Protocol.TCP: 1, Protocol.UDP: 2}
BOTH_BITS = 3


class Clause(NamedTuple):
    """One test of a flow's protocol and port; ``protocols`` is a mask of PROTOCOL_BITS, ports are included."""

    protocols: int
    first_port: int
    last_port: int
    action: Action
    rule: int

    @property
    def unconditional(self) -> bool:
        """Whether it matches every flow, so that no clause after it counts."""
        return self.protocols == BOTH_BITS and (self.first_port, self.last_port) == EVERY_PORT


@dataclass(frozen=True, slots=True)  # the agent holds some hundred of them for each policy of its node
class Entry:
    """What the longest match finds: Tables.clauses[first:first + count], and the class that bytes count under."""

    prefix: Prefix
    first: int
    count: int
    destination: Destination

    def same_answer(self, other: "Entry") -> bool:
        """Return whether both entries give every flow the same verdict and class."""
        mine = (self.first, self.count, self.destination)
        return mine == (other.first, other.count, other.destination)


@dataclass(frozen=True)
class Tables:
    """A compiled policy. The first entry is ::/0, so every address finds one; entries are sorted by prefix."""

    entries: tuple[Entry, ...]
    clauses: tuple[Clause, ...]

    def clauses_of(self, entry: Entry) -> tuple[Clause, ...]:
        """Return the entry's clauses in the order in which they are tried."""
        return self.clauses[entry.first : entry.first + entry.count]


class ClauseLists:
    """The lists of clauses of one policy: each is stored once, however many prefixes share it.

    A set of rules is an integer with bit n set for the rule with index n.
    """

    def __init__(self, policy: Policy) -> None:
        self._rules = [tuple(clauses(policy, index)) for index in range(len(policy.egress))]
        self._default = Clause(BOTH_BITS, *EVERY_PORT, policy.default, DEFAULT_RULE)
        self._by_rules: dict[int, tuple[int, int]] = {}
        self._by_clauses: dict[tuple[Clause, ...], tuple[int, int]] = {}
        self.clauses: list[Clause] = []

    def place(self, rules: int) -> tuple[int, int]:
        """Return where the list for a set of rules lies in ``clauses``: (first, count).

        Raises WeirError when the list is longer than MAX_LIST, or all lists together than MAX_CLAUSES.
        """
        found = self._by_rules.get(rules)
        if found is None:
            wanted = self._ordered(rules)
            found = self._by_clauses.get(wanted) or self._append(wanted)
            self._by_clauses[wanted] = self._by_rules[rules] = found
        return found

    def _ordered(self, rules: int) -> tuple[Clause, ...]:
        chosen: list[Clause] = []
        while rules:
            lowest = rules & -rules
            rules ^= lowest
            for clause in self._rules[lowest.bit_length() - 1]:
                chosen.append(clause)
                if clause.unconditional:
                    return tuple(chosen)
        return (*chosen, self._default)

    def _append(self, wanted: tuple[Clause, ...]) -> tuple[int, int]:
        check("tests of protocol and port for one destination", len(wanted), MAX_LIST)
        place = (len(self.clauses), len(wanted))
        self.clauses.extend(wanted)
        check("tests of protocol and port in all", len(self.clauses), MAX_CLAUSES)
        return place


def compile_policy(policy: Policy) -> Tables:
    """Return the tables that decide every flow without DNS names as ``decide`` does.

    Raises WeirError when the policy is over one of the limits, or an address set cannot be read.
    """
    check("rules", len(policy.egress), MAX_RULES)
    own_rules: dict[Prefix, int] = {EVERYWHERE: 0}
    for index, rule in enumerate(policy.egress):
        for prefix in (EVERYWHERE,) if rule.prefixes is None else rule.prefixes:
            own_rules[prefix] = own_rules.get(prefix, 0) | 1 << index
    own_classes = {
        prefix: kind for kind in (Destination.PRIVATE, Destination.LOOPBACK) for prefix in sets.destinations()[kind]
    }

    lists = ClauseLists(policy)
    entries: list[Entry] = []
    found: dict[Prefix, tuple[int, Entry]] = {}  # the rules that contain each prefix, and what they come to
    for prefix, around in nested((*own_rules, *own_classes)):
        outer_rules, outer = found[around] if around else (0, None)
        rules = outer_rules | own_rules.get(prefix, 0)
        kind = narrower(outer.destination if outer else Destination.PUBLIC, own_classes.get(prefix))
        entry = Entry(prefix, *lists.place(rules), kind)
        if outer is None or not outer.same_answer(entry):
            entries.append(entry)
        found[prefix] = (rules, entry)
    check("different prefixes", len(entries), MAX_PREFIXES)
    return Tables(tuple(entries), tuple(lists.clauses))


def clauses(policy: Policy, index: int) -> Iterator[Clause]:
    """Yield the clauses of one rule, one for each of its port ranges."""
    rule = policy.egress[index]
    bits = sum(PROTOCOL_BITS[protocol] for protocol in BOTH_PROTOCOLS & rule.protocols)
    for ports in rule.ports or (EVERY_PORT,):
        yield Clause(bits, ports.first, ports.last, rule.action, index)


def narrower(outer: Destination, own: Destination | None) -> Destination:
    """Return the class of a prefix inside one of class ``outer``: loopback outdoes private, private outdoes public."""
    for kind in (Destination.LOOPBACK, Destination.PRIVATE):
        if kind in (outer, own):
            return kind
    return Destination.PUBLIC


def check(what: str, count: int, limit: int) -> None:
    """Raise WeirError when a policy needs more of something than the kernel's tables hold."""
    if count > limit:
        raise WeirError(
            f"the policy needs at least {count:,} {what}; the limit is {limit:,}",
            "Join rules that do the same, or split the policy into one for each kind of container.",
        )
