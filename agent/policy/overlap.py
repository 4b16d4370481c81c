"""Rules that contradict or repeat one another: what each rule alone cannot show.

A set of rules is an integer with bit n set for the rule with index n, a set of ports one with bit n set for port n. So a
policy is looked at once, and not each value of each rule beside those of every other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from operator import and_

from agent.policy.document import DestinationItem, RulePart, SetDestination
from agent.policy.model import MAX_PORT, PortRange, Prefix, Protocol, nested
from agent.policy.ports import prefixes
from agent.policy.sets import RESOLVERS

Place = tuple[str | int, ...]
"""Keys and indexes that lead to a value, from the top of the file."""

EVERY_PORT = (1 << MAX_PORT + 1) - 1


def problems(
    rules: Mapping[int, RulePart], lines: Mapping[int, int], expand: Callable[[str], tuple[Prefix, ...]]
) -> Iterator[tuple[Place, str]]:
    """Yield what is wrong between rules, and where.

    ``rules`` and ``lines`` go by index in spec.egress (a rule that could not be read is missing); ``expand`` gives the
    prefixes of a set.
    """
    behind = hidden(rules, expand)
    for index, rule in rules.items():
        place = ("spec", "egress", index)
        yield from repeated_ports(rule, place)
        yield from repeated_destinations(rule, place)
        if index in behind:
            before = behind[index]
            first = f"{rules[before].name} (line {lines[before]})"
            yield place, f"{rule.name} can never match: {first} decides all that it covers; move or remove it"


def hidden(rules: Mapping[int, RulePart], expand: Callable[[str], tuple[Prefix, ...]]) -> dict[int, int]:
    """Return each rule that no flow comes to, on any host, and the first rule that matches all that it does."""
    everywhere = rule_set(index for index, rule in rules.items() if not rule.to)
    by_destination = covering(rules, expand)
    by_protocol = {
        protocol: rule_set(index for index, rule in rules.items() if rule.protocol in (None, protocol))
        for protocol in Protocol
    }
    ports = {index: port_set(rule.ports) for index, rule in rules.items()}
    found = {}
    for index, rule in rules.items():
        listed = reduce(and_, (by_destination[item] for item in rule.to), -1) if rule.to else 0
        around = (everywhere | listed) & (1 << index) - 1
        for protocol in [rule.protocol] if rule.protocol else Protocol:
            around &= by_protocol[protocol]
        first = next((before for before in members(around) if ports[index] & ~ports[before] == 0), None)
        if first is not None:
            found[index] = first
    return found


def covering(rules: Mapping[int, RulePart], expand: Callable[[str], tuple[Prefix, ...]]) -> dict[DestinationItem, int]:
    """Return for each destination in the rules those rules whose lists have all of it.

    The set `resolvers` is other addresses on each host, so that no prefix has it inside, and it has none.
    """
    found: dict[DestinationItem, int] = {}
    for index, rule in rules.items():
        for item in rule.to:
            found[item] = found.get(item, 0) | 1 << index
    prefixes_of: dict[DestinationItem, tuple[Prefix, ...]] = {
        item: (item,) if isinstance(item, Prefix) else expand(item.set_name)
        for item in found
        if isinstance(item, Prefix) or (isinstance(item, SetDestination) and item.set_name != RESOLVERS)
    }
    around: dict[Prefix, int] = {}
    for item, its in prefixes_of.items():
        for prefix in its:
            around[prefix] = around.get(prefix, 0) | found[item]
    for prefix, outer in nested(around):
        around[prefix] |= around[outer] if outer else 0
    for item, its in prefixes_of.items():
        found[item] = reduce(and_, (around[prefix] for prefix in its), -1)
    return found


def rule_set(indexes: Iterable[int]) -> int:
    """Return a set of rules from their indexes."""
    return sum(1 << index for index in indexes)


def members(rules: int) -> Iterator[int]:
    """Yield the indexes of a set of rules, lowest first."""
    while rules:
        lowest = rules & -rules
        rules ^= lowest
        yield lowest.bit_length() - 1


def port_set(ports: Sequence[PortRange]) -> int:
    """Return the ports of the ranges as a set; () is every port."""
    found = 0
    for first, last in ports:
        found |= (1 << last + 1) - (1 << first)
    return found if ports else EVERY_PORT


def repeated_ports(rule: RulePart, place: Place) -> Iterator[tuple[Place, str]]:
    """Yield each range that shares a port with one before it, and the first such."""
    if all(ports.last < following.first for ports, following in pairwise(sorted(rule.ports))):
        return
    # Blocks of ports as in ports.py: two ranges meet where a block of one is a block of the other, or inside one.
    own: dict[tuple[int, int], int] = {}  # a block of a range: the first range that has it
    inside: dict[tuple[int, int], int] = {}  # a block with a range's block in it: the first such range
    for index, ports in enumerate(rule.ports):
        blocks = set(prefixes(*ports))
        outer = {(port >> 16 - bits << 16 - bits, bits) for port, length in blocks for bits in range(length)}
        first = min([inside.get(block, index) for block in blocks] + [own.get(block, index) for block in outer])
        if first < index:
            message = f"{ports} overlaps {rule.ports[first]} of the same list; join or remove one"
            yield (*place, "ports", index), message
        for block in blocks:
            own.setdefault(block, index)
        for block in blocks | outer:
            inside.setdefault(block, index)


def repeated_destinations(rule: RulePart, place: Place) -> Iterator[tuple[Place, str]]:
    """Yield each destination that is in the list already, as it stands or inside a wider one."""
    widest: dict[Prefix, Prefix | None] = {}  # the prefix around each that is inside no other
    for prefix, outer in nested(item for item in rule.to if isinstance(item, Prefix)):
        widest[prefix] = (widest[outer] or outer) if outer else None
    seen = set()
    for index, item in enumerate(rule.to):
        around = widest[item] if isinstance(item, Prefix) else None
        if item in seen:
            yield (*place, "to", index), "the same destination is in this list already; take one out"
        elif around:
            yield (*place, "to", index), f"{item} is inside {around} of the same list; take it out"
        seen.add(item)
