"""What a policy means, as frozen types: no files, no kernel, no YAML.

Every address is one 128-bit integer. IPv4 lives at ::ffff:a.b.c.d, so that one table holds both families.
"""

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

IPV4_MAPPED = 0xFFFF << 32
"""The first address of ::ffff:0:0/96, where IPv4 lives (RFC 4291, 2.5.5.2)."""

MAX_PORT = 65535

PREFIX_LENGTH = re.compile(r"0|[1-9][0-9]{0,2}")


class Action(str, Enum):
    """What a rule, or the default, does with a flow."""

    ALLOW = "allow"
    DENY = "deny"


class Mode(str, Enum):
    """ENFORCE refuses; AUDIT counts and reports what would be refused, and refuses nothing."""

    ENFORCE = "enforce"
    AUDIT = "audit"


class Bind(str, Enum):
    """EPHEMERAL: only port 0 on a wildcard or loopback address."""

    DENY = "deny"
    EPHEMERAL = "ephemeral"
    ALLOW = "allow"


class Family(str, Enum):
    """Address families that a policy may let socket() create."""

    INET = "inet"
    INET6 = "inet6"
    UNIX = "unix"
    NETLINK = "netlink"


class Protocol(str, Enum):
    """Transport protocols of an inet or inet6 socket."""

    TCP = "tcp"
    UDP = "udp"

    @property
    def number(self) -> int:
        """The protocol's number in the IP header (IANA protocol numbers)."""
        return 6 if self is Protocol.TCP else 17


BOTH_PROTOCOLS = frozenset(Protocol)


class Destination(str, Enum):
    """The class under which a sent byte is counted."""

    PUBLIC = "public"
    PRIVATE = "private"
    LOOPBACK = "loopback"


def parse_address(text: str) -> int:
    """Return the 128-bit integer of an IPv4 or IPv6 address.

    Raises ValueError, with a sentence for the user, for anything else (a scope id such as %eth0 included).
    """
    if "%" in text:
        raise ValueError(f"{text!r} has a scope id; leave out the part from % on")
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is no IPv4 or IPv6 address; write one such as 10.1.2.3 or 2001:db8::1") from None
    return int(parsed) | IPV4_MAPPED if parsed.version == 4 else int(parsed)


def format_address(address: int) -> str:
    """Return the address as people write it: dotted for IPv4, RFC 5952 for IPv6."""
    if address >> 32 == 0xFFFF:
        return str(ipaddress.IPv4Address(address & 0xFFFFFFFF))
    return str(ipaddress.IPv6Address(address))


class Prefix(NamedTuple):
    """The addresses that share their first ``length`` bits (0 to 128) with ``address``; the other bits are zero."""

    address: int
    length: int

    @classmethod
    def parse(cls, text: str) -> "Prefix":
        """Read an address or a network in CIDR form; an IPv4 length of n becomes 96 + n.

        Raises ValueError, with a sentence for the user, for anything else (host bits that are set included).
        """
        written, slash, length_text = text.partition("/")
        address = parse_address(written)
        if not slash:
            return cls(address, 128)
        bits = 128 if ":" in written else 32
        if not (PREFIX_LENGTH.fullmatch(length_text) and int(length_text) <= bits):
            raise ValueError(f"{text!r} has no valid prefix length; write a number from 0 to {bits} after the /")
        length = int(length_text) + 128 - bits
        network = cls(address >> (128 - length) << (128 - length), length)
        if network.address != address:
            raise ValueError(f"{text!r} has host bits set; the network is {network}, the single address is {written}")
        return network

    def __str__(self) -> str:
        text = format_address(self.address)
        if self.length == 128:
            return text
        return f"{text}/{self.length if ':' in text else self.length - 96}"

    def contains(self, address: int) -> bool:
        """Return whether the address (128 bits) lies inside."""
        return (address ^ self.address) >> (128 - self.length) == 0


def read_destination(text: str) -> Prefix:
    """Return the prefix that a rule or a set lists. Raises ValueError for one that is wrong or means two things."""
    prefix = Prefix.parse(text)
    if prefix.length < 96 and prefix.contains(IPV4_MAPPED):
        raise ValueError(
            f"{text} holds IPv4 as well (it lives at ::ffff:0:0/96); for every address leave `to` out, "
            "for public IPv6 write 2000::/3"
        )
    if prefix in (Prefix(0, 128), Prefix(IPV4_MAPPED, 128)):
        raise ValueError(f"{text} never matches: Linux connects it to loopback; write 127.0.0.1 or ::1")
    return prefix


def nested(prefixes: Iterable[Prefix]) -> Iterator[tuple[Prefix, Prefix | None]]:
    """Yield each different prefix, sorted, and the narrowest of the others around it; None when there is none."""
    around: list[Prefix] = []
    for prefix in sorted(set(prefixes)):
        while around and not around[-1].contains(prefix.address):
            around.pop()
        yield prefix, around[-1] if around else None
        around.append(prefix)


class PortRange(NamedTuple):
    """Ports from ``first`` to ``last``, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Rule:
    """One line of a policy's egress list.

    ``prefixes`` is None for a rule without `to` (any destination); a rule that lists only DNS names has () there.
    ``ports`` is () for every port, 0 included. ``line`` is where the rule begins in the file.
    """

    name: str
    action: Action
    prefixes: tuple[Prefix, ...] | None
    names: tuple[str, ...]
    ports: tuple[PortRange, ...]
    protocols: frozenset[Protocol]
    line: int


@dataclass(frozen=True)
class Options:
    """Socket options: ``mock`` names those that are pretended, ``others`` says what happens to the rest."""

    mock: tuple[str, ...]
    others: Action


@dataclass(frozen=True)
class Sockets:
    """What a program may do with sockets, wherever they lead. ``idle_timeout`` is in seconds, None for never."""

    families: frozenset[Family]
    protocols: frozenset[Protocol]
    listen: Action
    bind: Bind
    transfer: Action
    idle_timeout: int | None
    options: Options


@dataclass(frozen=True)
class Selector:
    """Which containers of a node a policy is for: those that match every part that is not empty.

    ``namespaces``, ``containers`` and ``cgroups`` hold globs, any one of which is enough; ``cgroups`` are paths below
    the cgroup2 mount. ``pod_labels`` holds keys, each with a glob for its value, all of which must match.
    """

    namespaces: tuple[str, ...] = ()
    pod_labels: tuple[tuple[str, str], ...] = ()
    containers: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()


class Unenforced(str, Enum):
    """Parts of a policy that are read and explained, and enforced by a later release; the value says what that means."""

    NAMES = "Destination names are not in force: a rule's DNS names match no address, so the rules after it decide."
    OPTIONS = "Socket options are not in force: every option works as if weir were not there."
    IDLE = "idleTimeout is not in force: idle sockets are never reclaimed."
    LSM = (
        "The LSM layer is not in force: a process without weir's seccomp filter can call listen(), and a TCP socket that "
        "came into the container connected can still send."
    )


@dataclass(frozen=True)
class Policy:
    """A whole policy. ``source`` is the file's name, ``sha256`` the hex digest of its bytes, ``text`` what it says.

    ``selector`` is None for a policy that containers get by annotation, by --policy or as the default only.
    """

    name: str
    mode: Mode
    sockets: Sockets
    egress: tuple[Rule, ...]
    default: Action
    source: str
    sha256: str
    text: str
    selector: Selector | None = None

    def unenforced(self) -> tuple["Unenforced", ...]:
        """Return the parts of this policy that this release reads but no layer enforces."""
        wanted = {
            Unenforced.NAMES: any(rule.names for rule in self.egress),
            Unenforced.OPTIONS: self.sockets.options != Options(mock=(), others=Action.ALLOW),
            Unenforced.IDLE: self.sockets.idle_timeout is not None,
            Unenforced.LSM: Action.DENY in (self.sockets.listen, self.sockets.transfer),
        }
        return tuple(part for part, holds in wanted.items() if holds)


@dataclass(frozen=True)
class Flow:
    """One attempt to reach a destination. ``names`` are the DNS names that the program resolved to the address."""

    protocol: Protocol
    address: int
    port: int
    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Verdict:
    """What was decided, and the index in Policy.egress of the rule that did it; None when the default did."""

    action: Action
    rule: int | None
