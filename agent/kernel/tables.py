"""Compiled tables → the inner maps of one policy version."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator
from socket import htons
from typing import Any

from agent.kernel import abi, libbpf
from agent.kernel.seam import Version
from agent.policy.compile import Tables
from agent.policy.model import Action
from agent.policy.ports import pieces


def fill(tables: Tables) -> Iterator[tuple[str, int]]:
    """Yield (outer map, descriptor of a filled inner map); the caller closes each.

    Raises OSError.
    """
    yield "addresses", _lpm("addresses", abi.Prefix, abi.Entry, _entries(tables))
    yield "clauses", _lpm("clauses", abi.Ports, abi.Clause, _clauses(tables))


def _entries(tables: Tables) -> list[tuple[Any, Any]]:
    """A list's number is the index of its first clause: equal lists are shared, so it is theirs alone."""
    rows = []
    for entry in tables.entries:
        key = abi.Prefix(length=entry.prefix.length)
        key.address[:] = entry.prefix.address.to_bytes(16, "big")
        rows.append((key, abi.Entry(entry.first, abi.DESTINATIONS.index(entry.destination.value))))
    return rows


def _clauses(tables: Tables) -> list[tuple[Any, Any]]:
    lists = {entry.first: tables.clauses_of(entry) for entry in tables.entries}
    return [
        (
            abi.Ports(48 + piece.length, number, piece.protocol.number, 0, htons(piece.port)),
            abi.Clause(piece.rule, piece.action is Action.DENY),
        )
        for number, clauses in lists.items()
        for piece in pieces(clauses)
    ]


def _lpm(name: str, key_type: Any, value_type: Any, rows: list[tuple[Any, Any]]) -> int:
    fd = libbpf.map_create(
        libbpf.BPF_MAP_TYPE_LPM_TRIE,
        name,
        c.sizeof(key_type),
        c.sizeof(value_type),
        len(rows),
        libbpf.BPF_F_NO_PREALLOC,
    )
    try:
        keys = (key_type * len(rows))(*(key for key, _ in rows))
        values = (value_type * len(rows))(*(value for _, value in rows))
        libbpf.update_batch(fd, keys, values)
    except BaseException:
        os.close(fd)
        raise
    return fd


def rules(version: Version) -> int:
    """Make an array of the names of a version's rules; the caller closes its descriptor.

    Pinned, not in a map of maps: to open an inner map by its id takes CAP_SYS_ADMIN. Raises OSError.
    """
    size = c.sizeof(abi.Rule)
    fd = libbpf.map_create(libbpf.BPF_MAP_TYPE_ARRAY, "rules", 4, size, abi.MAX_RULES)
    try:
        for index, rule in enumerate(version.rules):
            value = abi.Rule(rule.name.encode(), rule.line, rule.deny)
            libbpf.update(fd, c.c_uint32(index), value)
    except BaseException:
        os.close(fd)
        raise
    return fd
