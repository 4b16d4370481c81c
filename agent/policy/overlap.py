"""Rules that contradict or repeat one another: what each rule alone cannot show."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from agent.policy.document import NameDestination, RulePart, SetDestination
from agent.policy.model import BOTH_PROTOCOLS, MAX_PORT, PortRange, Prefix, Protocol
from agent.policy.sets import RESOLVERS

Place = tuple[str | int, ...]
"""Keys and indexes that lead to a value, from the top of the file."""


class Cover:
    """A set of prefixes that finds the one around another in one step for each length that occurs."""

    def __init__(self, prefixes: Iterable[Prefix]) -> None:
        self._prefixes = set(prefixes)
        self._lengths = sorted({prefix.length for prefix in self._prefixes})

    def wider(self, prefix: Prefix) -> Prefix | None:
        """Return the widest prefix that contains this one and is not this one."""
        for length in self._lengths:
            if length >= prefix.length:
                return None
            around = Prefix(prefix.address >> (128 - length) << (128 - length), length)
            if around in self._prefixes:
                return around
        return None

    def covers(self, prefix: Prefix) -> bool:
        """Return whether the prefix is in the set or inside a member of it."""
        return prefix in self._prefixes or self.wider(prefix) is not None


@dataclass(frozen=True)
class Reach:
    """What a rule can match. ``cover`` and ``prefixes`` leave out `resolvers`, which differ from host to host."""

    rule: RulePart
    protocols: frozenset[Protocol]
    prefixes: frozenset[Prefix]
    cover: Cover
    names: frozenset[str]
    sets: frozenset[str]

    def inside(self, other: "Reach") -> bool:
        """Return whether the other rule matches every flow that this one does, on every host."""
        return (
            self.protocols <= other.protocols
            and ports_inside(self.rule.ports, other.rule.ports)
            and (not other.rule.to or (bool(self.rule.to) and self._destinations_inside(other)))
        )

    def _destinations_inside(self, other: "Reach") -> bool:
        return (
            self.names <= other.names
            and (RESOLVERS not in self.sets or RESOLVERS in other.sets)
            and all(other.cover.covers(prefix) for prefix in self.prefixes)
        )


def problems(
    rules: Mapping[int, RulePart], lines: Mapping[int, int], expand: Callable[[str], tuple[Prefix, ...]]
) -> Iterator[tuple[Place, str]]:
    """Yield what is wrong between rules, and where.

    ``rules`` and ``lines`` go by index in spec.egress (a rule that could not be read is missing); ``expand`` gives the
    prefixes of a set.
    """
    earlier: dict[int, Reach] = {}
    for index, rule in rules.items():
        place = ("spec", "egress", index)
        yield from repeated_ports(rule, place)
        yield from repeated_destinations(rule, place)
        reach = reach_of(rule, expand)
        for before, other in earlier.items():
            if reach.inside(other):
                first = f"{other.rule.name} (line {lines[before]})"
                yield place, f"{rule.name} can never match: {first} decides all that it covers; move or remove it"
                break
        earlier[index] = reach


def reach_of(rule: RulePart, expand: Callable[[str], tuple[Prefix, ...]]) -> Reach:
    """Return what a rule can match."""
    sets = frozenset(item.set_name for item in rule.to if isinstance(item, SetDestination))
    prefixes = {item for item in rule.to if isinstance(item, Prefix)}
    prefixes.update(prefix for name in sets - {RESOLVERS} for prefix in expand(name))
    return Reach(
        rule=rule,
        protocols=frozenset([rule.protocol]) if rule.protocol else BOTH_PROTOCOLS,
        prefixes=frozenset(prefixes),
        cover=Cover(prefixes),
        names=frozenset(item.dns_name for item in rule.to if isinstance(item, NameDestination)),
        sets=sets,
    )


def ports_inside(inner: tuple[PortRange, ...], outer: tuple[PortRange, ...]) -> bool:
    """Return whether every port of the first is one of the second; () is every port."""
    if not outer:
        return True
    free = 0  # the lowest port for which no range of outer has been seen
    gaps = []
    for ports in sorted(outer):
        if ports.first > free:
            gaps.append(PortRange(free, ports.first - 1))
        free = max(free, ports.last + 1)
    if free <= MAX_PORT:
        gaps.append(PortRange(free, MAX_PORT))
    wanted = inner or (PortRange(0, MAX_PORT),)
    return not any(ports.first <= gap.last and gap.first <= ports.last for ports in wanted for gap in gaps)


def repeated_ports(rule: RulePart, place: Place) -> Iterator[tuple[Place, str]]:
    """Yield each range that shares a port with one before it."""
    for index, ports in enumerate(rule.ports):
        shared = next((p for p in rule.ports[:index] if p.first <= ports.last and ports.first <= p.last), None)
        if shared:
            yield (*place, "ports", index), f"{ports} overlaps {shared} of the same list; join or remove one"


def repeated_destinations(rule: RulePart, place: Place) -> Iterator[tuple[Place, str]]:
    """Yield each destination that is in the list already, as it stands or inside a wider one."""
    cover = Cover(item for item in rule.to if isinstance(item, Prefix))
    seen = set()
    for index, item in enumerate(rule.to):
        around = cover.wider(item) if isinstance(item, Prefix) else None
        if item in seen:
            yield (*place, "to", index), "the same destination is in this list already; take one out"
        elif around:
            yield (*place, "to", index), f"{item} is inside {around} of the same list; take it out"
        seen.add(item)
