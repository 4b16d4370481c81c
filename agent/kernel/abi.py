"""The Python side of bpf/abi.h: the same layouts, limits and numbers.

tests/unit/test_abi.py holds every structure and number here against the C compiler's,
tests/kernel/test_abi.py against BCC's.
"""

from __future__ import annotations

import ctypes as c
from enum import IntEnum, IntFlag
from typing import Any

ABI = 2
MAX_RULES = 512
MAX_POLICIES = 256
MAX_LEVEL = 31
MAX_REFUSALS = 16384
MAX_PEERS = 65536
VERDICTS = 512
EVENTS_BYTES = 262144
EVENTS_PER_SECOND = 100
DEFAULT_RULE = 0xFFFF
NAME = 64
UNSETTLED = 0x80000000
MAX_SPARE = 1024
SPARE = 0xFFFFFFFF
SUM = 0x80000000
LABELS = 1024


class Hook(IntEnum):
    """Where a socket was refused (enum weir_hook)."""

    SOCK_CREATE = 1
    CONNECT = 2
    SENDMSG = 3
    BIND = 4
    EGRESS = 5
    INGRESS = 6


class Reason(IntEnum):
    """Why it was refused (enum weir_reason)."""

    NONE = 0
    RULE = 1
    NO_POLICY = 2
    FAMILY = 3
    PROTOCOL = 4
    BIND = 5
    TRANSFER = 6
    LISTEN = 7
    UNSOLICITED = 8
    SIMULTANEOUS = 9
    HEADER = 10
    LOOPBACK_DEVICE = 11
    MEMORY = 12


DESTINATIONS = ("public", "private", "loopback")
"""Names of enum weir_destination, in its order."""


class Flag(IntFlag):
    """Flags of a policy and of an enrolment (WEIR_AUDIT and so on)."""

    AUDIT = 0x0001
    LISTEN = 0x0002
    BIND_ANY = 0x0004
    BIND_EPHEMERAL = 0x0008
    TRANSFER = 0x0010
    INET = 0x0020
    INET6 = 0x0040
    TCP = 0x0080
    UDP = 0x0100
    WANTS_NAMES = 0x0200
    WANTS_OPTIONS = 0x0400
    WANTS_IDLE = 0x0800
    PARENT = 0x2000
    RUN = 0x4000
    BORN = 0x8000


class Address(c.Structure):
    """struct weir_address: 16 bytes in network order, IPv4 as ::ffff:a.b.c.d."""

    _fields_ = [("word", c.c_uint32 * 4)]


class Config(c.Structure):
    """struct weir_config."""

    _fields_ = [
        ("abi", c.c_uint32),
        ("generation", c.c_uint32),
        ("secret", c.c_uint64),
        ("build", c.c_uint64),
        ("next_policy", c.c_uint32),
        ("has_retval", c.c_uint32),
    ]


class Enrolled(c.Structure):
    """struct weir_enrolled."""

    _fields_ = [
        ("policy", c.c_uint32),
        ("slot", c.c_uint16),
        ("flags", c.c_uint16),
        ("since", c.c_uint32),
        ("pad", c.c_uint32),
    ]


class Socket(c.Structure):
    """struct weir_socket."""

    _fields_ = [
        ("leaf", c.c_uint64),
        ("container", c.c_uint64),
        ("owner", c.c_uint64),
        ("policy", c.c_uint64),
        ("peer", c.c_uint64),
        ("created", c.c_uint32),
        ("listener", c.c_uint16),
        ("counted", c.c_uint16),
    ]


class Prefix(c.Structure):
    """struct weir_prefix."""

    _fields_ = [("length", c.c_uint32), ("address", c.c_uint8 * 16)]


class Entry(c.Structure):
    """struct weir_entry."""

    _fields_ = [("list", c.c_uint32), ("destination", c.c_uint32)]


class Ports(c.Structure):
    """struct weir_ports."""

    _fields_ = [
        ("length", c.c_uint32),
        ("list", c.c_uint32),
        ("protocol", c.c_uint8),
        ("pad", c.c_uint8),
        ("port", c.c_uint16),
    ]


class Clause(c.Structure):
    """struct weir_clause."""

    _fields_ = [("rule", c.c_uint16), ("deny", c.c_uint16)]


class Policy(c.Structure):
    """struct weir_policy."""

    _fields_ = [
        ("name", c.c_char * NAME),
        ("sha256", c.c_uint8 * 32),
        ("flags", c.c_uint32),
        ("rules", c.c_uint32),
    ]


class Labels(c.Structure):
    """struct weir_labels."""

    _fields_ = [("text", c.c_char * LABELS)]


class Rule(c.Structure):
    """struct weir_rule."""

    _fields_ = [("name", c.c_char * NAME), ("line", c.c_uint32), ("deny", c.c_uint32)]


class Counters(c.Structure):
    """struct weir_counters."""

    _fields_ = [
        ("bytes", c.c_uint64 * 3),
        ("packets", c.c_uint64 * 3),
        ("sockets_created", c.c_uint64),
        ("sockets_released", c.c_uint64),
        ("sockets_adopted", c.c_uint64),
        ("events_suppressed", c.c_uint64),
        ("events_lost", c.c_uint64),
        ("refusals_uncounted", c.c_uint64),
    ]


class Refusal(c.Structure):
    """struct weir_refusal."""

    _fields_ = [
        ("policy", c.c_uint32),
        ("slot", c.c_uint16),
        ("rule", c.c_uint16),
        ("hook", c.c_uint8),
        ("reason", c.c_uint8),
        ("audited", c.c_uint8),
        ("pad", c.c_uint8),
    ]


class Bucket(c.Structure):
    """struct weir_bucket."""

    _fields_ = [("second", c.c_uint64), ("events", c.c_uint64)]


class Peer(c.Structure):
    """struct weir_peer."""

    _fields_ = [("cookie", c.c_uint64), ("address", Address), ("port", c.c_uint32), ("pad", c.c_uint32)]


class Verdict(c.Structure):
    """struct weir_verdict."""

    _fields_ = [
        ("begun", c.c_uint32),
        ("ended", c.c_uint32),
        ("high", c.c_uint64),
        ("low", c.c_uint64),
        ("flow", c.c_uint32),
        ("policy", c.c_uint32),
        ("verdict", c.c_uint32),
        ("pad", c.c_uint32),
    ]


class Event(c.Structure):
    """struct weir_event."""

    _fields_ = [
        ("time", c.c_uint64),
        ("cgroup", c.c_uint64),
        ("pid", c.c_uint32),
        ("policy", c.c_uint32),
        ("address", Address),
        ("port", c.c_uint16),
        ("rule", c.c_uint16),
        ("slot", c.c_uint16),
        ("hook", c.c_uint8),
        ("reason", c.c_uint8),
        ("protocol", c.c_uint8),
        ("audited", c.c_uint8),
        ("pad", c.c_uint8 * 6),
        ("comm", c.c_char * 16),
    ]


MAPS: dict[str, tuple[type[Any] | None, type[Any] | None]] = {
    "config": (c.c_uint32, Config),
    "cgroups": (c.c_uint64, Enrolled),
    "counters": (c.c_uint32, Counters),
    "buckets": (c.c_uint32, Bucket),
    "spare": (None, c.c_uint32),
    "slots": (c.c_uint32, c.c_uint32),
    "labels": (c.c_uint64, Labels),
    "sockets": (c.c_uint32, Socket),
    "verdicts": (c.c_uint32, Verdict),
    "refusals": (Refusal, c.c_uint64),
    "peers": (Peer, c.c_uint32),
    "addresses": (c.c_uint32, c.c_uint32),
    "clauses": (c.c_uint32, c.c_uint32),
    "policies": (c.c_uint32, Policy),
    "events": (None, None),
}
"""The pinned maps (bpf/maps.c) and the types of their keys and values; a queue has no keys, a ring buffer neither."""

PROGRAMS = {
    "sock_create": ("CGROUP_SOCK", 2),
    "sock_release": ("CGROUP_SOCK", 34),
    "connect4": ("CGROUP_SOCK_ADDR", 10),
    "connect6": ("CGROUP_SOCK_ADDR", 11),
    "sendmsg4": ("CGROUP_SOCK_ADDR", 14),
    "sendmsg6": ("CGROUP_SOCK_ADDR", 15),
    "bind4": ("CGROUP_SOCK_ADDR", 8),
    "bind6": ("CGROUP_SOCK_ADDR", 9),
    "egress": ("CGROUP_SKB", 1),
    "ingress": ("CGROUP_SKB", 0),
}
"""Program (function weir_NAME) -> BCC's program type and the number of enum bpf_attach_type (linux/bpf.h)."""
