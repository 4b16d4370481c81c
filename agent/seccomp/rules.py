"""Which system calls a policy refuses: pure data, from which filter.py makes a seccomp filter.

Everything not listed stays allowed, so that existing programs run; but the families, types and protocols of socket() form an
allow-list, written as its complement. The kernel compares system call arguments as 64 bits while socket() reads ints, so every
comparison masks the upper half away: socket(0x1_0000_0010, …) is AF_NETLINK to the kernel and must be so here.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from errno import EACCES, EAFNOSUPPORT, EINVAL, ENOSYS, EPROTONOSUPPORT
from socket import AF_INET, AF_INET6, AF_NETLINK, AF_UNIX, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM
from typing import NamedTuple

from agent.policy.model import Action, Bind, Family, Protocol, Sockets

_FAMILY, _TYPE, _PROTOCOL = 0, 1, 2  # arguments of socket(2) and socketpair(2)
_INT = 32  # bits of a C int on every architecture of Linux
_TYPE_BITS = 4  # SOCK_TYPE_MASK, linux/net.h: the rest of the type argument holds SOCK_CLOEXEC and SOCK_NONBLOCK
_NETLINK_ROUTE = 0  # linux/netlink.h: lists interfaces and routes, as getifaddrs() does

_NUMBERS: Mapping[Family, int] = {
    Family.INET: AF_INET,
    Family.INET6: AF_INET6,
    Family.UNIX: AF_UNIX,
    Family.NETLINK: AF_NETLINK,
}
_TYPES: Mapping[Protocol, int] = {Protocol.TCP: SOCK_STREAM, Protocol.UDP: SOCK_DGRAM}


class Comparison(NamedTuple):
    """Holds when ``arguments[argument] & mask == value``; arguments count from 0."""

    argument: int
    mask: int
    value: int


@dataclass(frozen=True)
class Deny:
    """The system call ``call`` fails with ``errno`` when every comparison holds; without any, always."""

    call: str
    errno: int
    comparisons: tuple[Comparison, ...] = ()


# Ways past the rules above or past the cgroup that weir watches, whatever the policy says.
_BACK_DOORS = (
    # A ring makes, connects and listens on sockets without a system call that a filter sees. enter and register too: a ring
    # may come from outside as a descriptor. ENOSYS is what a kernel without io_uring says, so callers take their other path.
    Deny("io_uring_setup", ENOSYS),
    Deny("io_uring_enter", ENOSYS),
    Deny("io_uring_register", ENOSYS),
    # Another process's sockets, and another process itself, belong to another cgroup's policy.
    Deny("pidfd_getfd", EACCES),
    Deny("ptrace", EACCES),
    # request_key("dns_resolver") starts a program of the host as root, outside the cgroup (security/keys/request_key.c).
    # ENOSYS is what a kernel without CONFIG_KEYS says.
    Deny("request_key", ENOSYS),
    Deny("add_key", ENOSYS),
    Deny("keyctl", ENOSYS),
)


def rules(sockets: Sockets) -> tuple[Deny, ...]:
    """Return what a seccomp filter refuses for a policy's sockets section. No two rules match the same call."""
    return (*_socket(sockets), *_socketpair(sockets), *_servers(sockets), *_BACK_DOORS)


def _socket(sockets: Sockets) -> Iterator[Deny]:
    for comparisons in _outside(_FAMILY, [_NUMBERS[family] for family in sockets.families], _INT):
        yield Deny("socket", EAFNOSUPPORT, comparisons)
    # AF_UNIX knows nothing but itself: any type and protocol there stays in the host, and the kernel refuses the rest.
    for family in sorted(sockets.families - {Family.UNIX}):
        kinds = _kinds(family, sockets.protocols)
        this_family = _equals(_FAMILY, _NUMBERS[family], _INT)
        for comparisons in _outside(_TYPE, kinds.keys(), _TYPE_BITS):
            yield Deny("socket", EPROTONOSUPPORT, (this_family, *comparisons))
        for type_, protocols in kinds.items():
            this_type = _equals(_TYPE, type_, _TYPE_BITS)
            for comparisons in _outside(_PROTOCOL, protocols, _INT):
                yield Deny("socket", EPROTONOSUPPORT, (this_family, this_type, *comparisons))


def _socketpair(sockets: Sockets) -> Iterator[Deny]:
    """Only AF_UNIX makes pairs that leave no host; AF_INET makes two sockets and then fails (net/socket.c)."""
    for comparisons in _outside(_FAMILY, {AF_UNIX} if Family.UNIX in sockets.families else (), _INT):
        yield Deny("socketpair", EAFNOSUPPORT, comparisons)


def _servers(sockets: Sockets) -> Iterator[Deny]:
    if sockets.listen is Action.DENY:
        yield Deny("listen", EACCES)
        # What the kernel answers for a socket that does not listen, which is every socket the program can have made.
        yield Deny("accept", EINVAL)
        yield Deny("accept4", EINVAL)
    # A filter cannot see which family is bound; the cgroup hooks can, and refuse every bind of inet and inet6 by themselves. So this
    # second lock stays off where a policy allows netlink: getifaddrs() binds its netlink socket.
    if sockets.bind is Bind.DENY and Family.NETLINK not in sockets.families:
        yield Deny("bind", EACCES)


def _kinds(family: Family, protocols: Collection[Protocol]) -> Mapping[int, Collection[int]]:
    """Return the socket types that a family may have, each with its protocol numbers."""
    if family is Family.NETLINK:
        return {SOCK_DGRAM: {_NETLINK_ROUTE}, SOCK_RAW: {_NETLINK_ROUTE}}
    return {_TYPES[protocol]: {0, protocol.number} for protocol in sorted(protocols)}


def _equals(argument: int, value: int, bits: int) -> Comparison:
    return Comparison(argument, (1 << bits) - 1, value)


def _outside(argument: int, allowed: Collection[int], bits: int) -> Iterator[tuple[Comparison, ...]]:
    """Return comparisons of which one holds for each value of ``bits`` bits that is not allowed, and none for the others.

    libseccomp cannot say "not one of" under a mask, nor compare one argument twice in a rule. So the values that are not
    allowed are cut into blocks with a common beginning, as networks are into CIDR prefixes: 31 to 35 blocks for an int.
    """
    return _blocks(argument, frozenset(allowed), bits, 0, 0)


def _blocks(
    argument: int, allowed: frozenset[int], bits: int, value: int, fixed: int
) -> Iterator[tuple[Comparison, ...]]:
    if not allowed:
        mask = (1 << bits) - (1 << (bits - fixed))
        yield (Comparison(argument, mask, value),) if mask else ()
    elif fixed < bits:
        bit = 1 << (bits - fixed - 1)
        yield from _blocks(argument, frozenset(v for v in allowed if not v & bit), bits, value, fixed + 1)
        yield from _blocks(argument, frozenset(v for v in allowed if v & bit), bits, value | bit, fixed + 1)
