"""What the demo tries, as data. Addresses are answered by the peer of a World; see tests/addresses.py."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import Enum

from tests import addresses

LOCAL_PORT = 8080  # where the demo itself listens, on the client's loopback

_IPPROTO_SCTP = 132  # linux/in.h; the socket module has it only where the C library's headers do
_IPPROTO_UDPLITE = 136
_IPPROTO_MPTCP = 262
_ANY = "0.0.0.0"


class Kind(str, Enum):
    """What the client does: see the function of the same name in client.py."""

    TCP = "tcp"
    UDP = "udp"
    ROUTE = "route"
    STRANGER = "stranger"
    SOCKET = "socket"
    BIND = "bind"
    LISTEN = "listen"
    IO_URING = "io_uring_setup"
    UPLOAD_TCP = "upload_tcp"
    UPLOAD_UDP = "upload_udp"


@dataclass(frozen=True)
class Attempt:
    """One thing that the client tries.

    ``part`` is the part of spec.sockets that forbids it, "always" for what weir forbids under every policy, "" where
    the rules for destinations decide. ``name`` is the DNS name that stands for the address. ``socket`` is what socket()
    is given; ``size`` is bytes or datagrams to send.
    """

    text: str
    kind: Kind
    address: str = ""
    port: int = 0
    name: str = ""
    socket: tuple[int, int, int] = (0, 0, 0)
    part: str = ""
    size: int = 0


def _flow(kind: Kind, address: str, port: int, name: str = "") -> Attempt:
    host = f"[{address}]" if ":" in address else address
    return Attempt(f"{kind.value} {host}:{port}{' Gmail' if name else ''}", kind, address, port, name)


def _tcp(port: int, *to: str) -> list[Attempt]:
    return [_flow(Kind.TCP, address, port) for address in to]


def _udp(port: int, *to: str) -> list[Attempt]:
    return [_flow(Kind.UDP, address, port) for address in to]


def _socket(text: str, part: str, *arguments: int) -> Attempt:
    family, type_, protocol = arguments
    return Attempt(f"socket({text})", Kind.SOCKET, socket=(family, type_, protocol), part=part)


_INET, _STREAM, _DGRAM, _RAW = socket.AF_INET, socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW

ATTEMPTS: dict[str, list[Attempt]] = {
    "Public addresses": [
        *_tcp(80, addresses.PUBLIC, addresses.PUBLIC6),
        *_tcp(443, addresses.PUBLIC, addresses.PUBLIC6),
        *_udp(443, addresses.PUBLIC, addresses.PUBLIC6),
        *_tcp(80, f"::ffff:{addresses.PUBLIC}"),
    ],
    "Mail and FTP": [
        *_tcp(25, addresses.PUBLIC, addresses.PUBLIC6),
        *_tcp(587, addresses.PUBLIC),
        *_tcp(21, addresses.PUBLIC),
    ],
    "Google": [
        *_tcp(443, addresses.GOOGLE, addresses.GOOGLE6),
        _flow(Kind.TCP, addresses.GMAIL_SMTP, 465, "smtp.gmail.com"),
        _flow(Kind.TCP, addresses.GMAIL_POP, 995, "pop.gmail.com"),
        _flow(Kind.TCP, addresses.GMAIL_IMAP, 993, "imap.gmail.com"),
        *_udp(53, *addresses.GOOGLE_DNS),
        *_tcp(53, addresses.GOOGLE_DNS[0]),
        *_tcp(443, addresses.GOOGLE_DNS[0]),
    ],
    "Private addresses, and those that lead to the host": [
        *_tcp(443, *addresses.PRIVATE, addresses.PRIVATE6),
        *_udp(161, addresses.PRIVATE[0]),
        *_tcp(80, addresses.METADATA),
        *_tcp(LOCAL_PORT, "127.0.0.1", "::1", _ANY, "::"),
        *_udp(5353, "224.0.0.251", "ff02::fb"),
    ],
    "IPv4 addresses inside IPv6 ones: mapped, NAT64, 6to4": [
        *_tcp(443, f"::ffff:{addresses.PRIVATE[0]}", addresses.NAT64_PRIVATE, addresses.SIX_TO_FOUR_PRIVATE),
        *_udp(443, addresses.NAT64_PRIVATE),
        *_tcp(443, f"64:ff9b::{addresses.PUBLIC}"),
    ],
    "Being a server": [
        Attempt("bind TCP to port 8000", Kind.BIND, _ANY, 8000, socket=(_INET, _STREAM, 0), part="bind"),
        Attempt("bind UDP to any port", Kind.BIND, _ANY, 0, socket=(_INET, _DGRAM, 0), part="bind"),
        Attempt("listen without bind", Kind.LISTEN, socket=(_INET, _STREAM, 0), part="listen"),
        Attempt("UDP from a stranger", Kind.STRANGER, addresses.PUBLIC, 53, part="listen"),
    ],
    "Sockets of other kinds": [
        _socket("AF_PACKET, SOCK_RAW", "families", socket.AF_PACKET, _RAW, 0),
        _socket("AF_NETLINK, SOCK_RAW", "families", socket.AF_NETLINK, _RAW, 0),
        _socket("AF_VSOCK, SOCK_STREAM", "families", 40, _STREAM, 0),
        _socket("SOCK_RAW, ICMP", "protocols", _INET, _RAW, socket.IPPROTO_ICMP),
        _socket("SOCK_STREAM, SCTP", "protocols", _INET, _STREAM, _IPPROTO_SCTP),
        _socket("SOCK_STREAM, MPTCP", "protocols", _INET, _STREAM, _IPPROTO_MPTCP),
        _socket("SOCK_DGRAM, UDP-Lite", "protocols", _INET, _DGRAM, _IPPROTO_UDPLITE),
        Attempt("io_uring_setup", Kind.IO_URING, part="always"),
    ],
    "Past connect() and sendto()": [
        Attempt("UDP, routed through fd00:1::1", Kind.ROUTE, addresses.PUBLIC6, 443, part="always"),
    ],
}

UPLOAD = [
    Attempt("TCP", Kind.UPLOAD_TCP, addresses.PUBLIC, 9, size=4 << 20),
    Attempt("TCP", Kind.UPLOAD_TCP, addresses.PUBLIC6, 9, size=4 << 20),
    Attempt("UDP", Kind.UPLOAD_UDP, addresses.PUBLIC, 9, size=1000),
    Attempt("UDP", Kind.UPLOAD_UDP, addresses.PUBLIC6, 9, size=1000),
]
