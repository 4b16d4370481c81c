"""The App Engine sockets section, and what socket() must answer under any policy, in the kernel's terms."""

from __future__ import annotations

from errno import EAFNOSUPPORT, EPROTONOSUPPORT

from agent.policy.model import Action, Bind, Family, Options, Protocol, Sockets

APPENGINE = Sockets(
    families=frozenset({Family.INET, Family.INET6, Family.UNIX}),
    protocols=frozenset(Protocol),
    listen=Action.DENY,
    bind=Bind.DENY,
    transfer=Action.DENY,
    idle_timeout=None,
    options=Options(mock=(), others=Action.DENY),
)

_FAMILIES = {1: Family.UNIX, 2: Family.INET, 10: Family.INET6, 16: Family.NETLINK}  # linux/socket.h
_STREAM, _DGRAM, _RAW = 1, 2, 3  # asm-generic/socket.h
_TCP, _UDP, _ROUTE = 6, 17, 0


def expected(sockets: Sockets, family: int, type_: int, protocol: int) -> int:
    """Return the errno with which the filter must refuse socket(), 0 when it must not.

    The arguments are 64-bit registers, of which the kernel reads ints; it takes the flags off the type.
    """
    family, type_, protocol = family & 0xFFFFFFFF, type_ & 0xF, protocol & 0xFFFFFFFF
    name = _FAMILIES.get(family)
    if name is None or name not in sockets.families:
        return EAFNOSUPPORT
    if name is Family.UNIX:
        return 0
    if name is Family.NETLINK:
        return 0 if type_ in (_DGRAM, _RAW) and protocol == _ROUTE else EPROTONOSUPPORT
    if type_ == _STREAM and protocol in (0, _TCP) and Protocol.TCP in sockets.protocols:
        return 0
    if type_ == _DGRAM and protocol in (0, _UDP) and Protocol.UDP in sockets.protocols:
        return 0
    return EPROTONOSUPPORT
