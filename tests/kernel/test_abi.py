"""agent/kernel/abi.py against BCC, which makes the maps: its own view of each table's key and leaf, field by field."""

from __future__ import annotations

import ctypes as c
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from agent.kernel import abi, libbpf
from tests import need
from tests.kernel.cage import Cage

ROOT = Path(__file__).resolve().parents[2]

INNER: dict[str, tuple[Any, Any]] = {
    "one_addresses": (abi.Prefix, abi.Entry),
    "one_clauses": (abi.Ports, abi.Clause),
}
OUTER = {"addresses", "clauses"}

CAPACITIES = {
    "config": 1,
    "verdicts": abi.VERDICTS,
    "refusals": abi.MAX_REFUSALS,
    "peers": abi.MAX_PEERS,
    "addresses": abi.MAX_POLICIES,
    "clauses": abi.MAX_POLICIES,
    "policies": abi.MAX_POLICIES,
    "spare": abi.MAX_SPARE,
    "events": abi.EVENTS_BYTES,
}


@pytest.fixture(scope="module")
def in_bcc() -> dict[str, Any]:
    """What BCC says, in a process of its own."""
    need.root()
    if find_spec("bcc") is None:
        need.skip("needs BCC: python3-bpfcc")
    command = [sys.executable, "-m", "tests.kernel.bcc_tables"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def described(twin: Any) -> dict[str, Any]:
    """The same description of a type of abi.py as bcc_tables.py gives of BCC's."""
    fields = [field[0] for field in getattr(twin, "_fields_", [])]
    return {
        "size": c.sizeof(twin),
        "fields": {name: [getattr(twin, name).offset, getattr(twin, name).size] for name in fields},
    }


@pytest.mark.parametrize("name", sorted((abi.MAPS.keys() - {"sockets", "spare", "events"} - OUTER) | INNER.keys()))
def test_bcc_lays_it_out_as_we_do(name: str, in_bcc: dict[str, Any]) -> None:
    key, value = {**abi.MAPS, **INNER}[name]
    assert in_bcc[name] == {"key": described(key), "leaf": described(value)}


@pytest.mark.parametrize("name", abi.MAPS)
def test_the_map_in_the_kernel(name: str, cage: Cage) -> None:
    """BCC's Python knows no socket storage and no maps of maps: of those the kernel tells the sizes."""
    fd = libbpf.obj_get(cage.place.pins.maps / name)
    try:
        info = libbpf.map_info(fd)
    finally:
        os.close(fd)
    key, value = abi.MAPS[name]
    assert (info.key_size, info.value_size) == (c.sizeof(key) if key else 0, c.sizeof(value) if value else 0)
    assert info.max_entries == CAPACITIES.get(name, info.max_entries)
