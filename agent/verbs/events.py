"""``weir events``: refusals and audits as they happen."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from agent import names
from agent.errors import WeirError
from agent.kernel.pinned import PinnedKernel
from agent.kernel.seam import Event, Version
from agent.place import Place
from agent.policy.model import format_address

PROTOCOLS = {6: "tcp", 17: "udp"}


@click.command(
    epilog="\b\nExamples:\n  weir events                  # what is waiting, then stop\n  weir events -f --json | jq .rule"
)
@click.option("--follow", "-f", is_flag=True, help="Wait for more until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def events(follow: bool, as_json: bool) -> int:
    """Print what was refused, or would have been (audit), one line each.

    At most 100 a second for each cgroup are reported and the ring holds some 2,700 until they are read; the counters
    (weir status) miss none, and say how many events were lost. One reader at a time.
    """
    place = Place.here()
    kernel = PinnedKernel(place.pins)
    if not kernel.is_loaded():
        raise WeirError("nothing is loaded, so there are no events", "Start something: weir run, or weir attach")
    fd = os.open(place.pins.maps, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise WeirError("another process reads the events already", "Only one can: stop the other first.") from e
    try:
        while True:
            batch = kernel.events(200 if follow else 0)
            paths, versions = (place.living(), kernel.versions()) if batch else ({}, {})
            for event in batch:
                data = as_data(event, paths, versions, place.root)
                print(json.dumps(data) if as_json else as_text(data), flush=True)
            if not follow and not batch:
                return 0
    finally:
        os.close(fd)
        kernel.close()


def as_data(event: Event, paths: Mapping[int, Path], versions: Mapping[int, Version], root: Path) -> dict[str, Any]:
    """One event for machines."""
    return {
        "time": wall_clock(event.time).isoformat(timespec="milliseconds"),
        "action": "audited" if event.refused.audited else "refused",
        "cgroup": names.cgroup_name(paths.get(event.cgroup), root, event.cgroup),
        "cgroup_id": event.cgroup,
        "pid": event.pid or None,
        "comm": event.comm or None,
        **names.described(event.refused, versions),
        "protocol": PROTOCOLS.get(event.protocol, str(event.protocol)),
        "address": format_address(event.address) if event.address else None,
        "port": event.port or None,
    }


def wall_clock(monotonic: int) -> datetime:
    """A time of CLOCK_MONOTONIC (ns) on the calendar."""
    ago = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - monotonic
    return datetime.fromtimestamp((time.time_ns() - ago) / 1e9, timezone.utc)


def as_text(data: Mapping[str, Any]) -> str:
    """One event for people."""
    who = f"{data['comm']}[{data['pid']}]" if data["pid"] else "packet"
    where = f" {data['address']} port {data['port']}" if data["address"] else ""
    rule = f"{data['policy']}/{data['rule']}" + (f" (line {data['line']})" if data["line"] else "")
    return (
        f"{data['time']} {data['action']} {data['hook']} {data['protocol']}{where} by {rule}: {who} in {data['cgroup']}"
    )
