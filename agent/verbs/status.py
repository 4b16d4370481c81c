"""``weir status``: what is in force, per cgroup, and what is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from agent import names
from agent.cgroups import tree
from agent.controller import Controller
from agent.kernel.abi import Flag
from agent.kernel.pinned import PinnedKernel
from agent.kernel.seam import Enrolment, Refused, Version
from agent.place import Place


@click.command(
    epilog="\b\nExamples:\n  weir status\n  weir status --json | jq '.cgroups[] | select(.layers.hooks == false)'"
)
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def status(as_json: bool) -> int:
    """Show each cgroup under a policy: mode, layers in force and what they leave uncovered, bytes, refusals."""
    place = Place.here()
    kernel = PinnedKernel(place.pins)
    try:
        data = gather(place, kernel)
    finally:
        kernel.close()
    if as_json:
        print(json.dumps(data))
    else:
        show(data)
    return 0


def gather(place: Place, kernel: PinnedKernel) -> dict[str, Any]:
    """Everything that status shows, for machines."""
    build = kernel.build()
    if build is None:
        return {"loaded": False, "cgroups": [], "maps": {}}
    paths, versions, refusals = place.living(), kernel.versions(), kernel.refusals()
    controller = Controller(kernel, place.root)
    attached = kernel.attached()
    rows = []
    for number, enrolment in kernel.enrolments().items():
        path = paths.get(number)
        hooks = path is not None and controller.parent_of(path, attached) is not None
        own = {refused: count for refused, count in refusals.items() if refused.slot == enrolment.slot}
        rows.append(row(place, kernel, path, number, enrolment, hooks, own, versions))
    return {
        "loaded": True,
        "build": f"{build.build:016x}",
        "errno": "EACCES" if build.has_retval else "EPERM",
        "cgroups": sorted(rows, key=lambda item: str(item["cgroup"])),
        "maps": {name: {"entries": n, "capacity": size} for name, (n, size) in kernel.max_capacity().items()},
    }


def row(
    place: Place,
    kernel: PinnedKernel,
    path: Path | None,
    number: int,
    enrolment: Enrolment,
    hooks: bool,
    refusals: Mapping[Refused, int],
    versions: Mapping[int, Version],
) -> dict[str, Any]:
    """One cgroup."""
    version = versions.get(enrolment.policy)
    counters = kernel.counters(enrolment.slot)
    with_filter, processes = seccomp(path) if path else (0, 0)
    return {
        "cgroup": names.cgroup_name(path, place.root, number),
        "cgroup_id": number,
        "gone": path is None,
        "policy": version.name if version else None,
        "sha256": version.sha256.hex() if version else None,
        "mode": names.mode(enrolment.flags) if version else "refuse all",
        "layers": {"hooks": hooks, "packets": hooks, "seccomp": f"{with_filter}/{processes}", "lsm": False},
        "not_covered": not_covered(enrolment.flags, hooks, with_filter < processes, bool(version)),
        "bytes": counters.bytes,
        "packets": counters.packets,
        "sockets": counters.sockets_created - counters.sockets_released,
        "sockets_adopted": counters.sockets_adopted,
        "events_lost": counters.events_lost + counters.events_suppressed,
        "refusals_uncounted": counters.refusals_uncounted,
        "refused": names.refusals(refusals, versions),
    }


def seccomp(path: Path) -> tuple[int, int]:
    """(Processes with a seccomp filter, processes) of a cgroup, from /proc/PID/status."""
    filtered = total = 0
    for pid in tree.processes(path):
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue  # ended while we looked
        total += 1
        filtered += "\nSeccomp:\t2\n" in text
    return filtered, total


def not_covered(flags: Flag, hooks: bool, unfiltered: bool, has_policy: bool) -> list[str]:
    """What the layers in force leave open, in plain sentences."""
    if not hooks:
        return ["EVERYTHING: the programs are not attached to this cgroup or a parent of it."]
    if not has_policy:
        return []
    open_ends = names.not_in_force(flags)
    if unfiltered:
        open_ends.insert(0, "Processes without a seccomp filter can open sockets that are neither inet nor inet6.")
    return open_ends


def show(data: Mapping[str, Any]) -> None:
    """Print for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if not data["loaded"]:
        console.print("weir is not loaded: no rules are in force on this host")
        return
    console.print(f"loaded: build {data['build']}, a refused call answers {data['errno']}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "CGROUP",
        "POLICY",
        "MODE",
        "HOOKS",
        "SECCOMP",
        "LSM",
        "PUBLIC B",
        "PRIVATE B",
        "LOOPBACK B",
        "REFUSED",
    ):
        table.add_column(
            title, justify="right" if title.endswith(" B") or title == "REFUSED" else "left", overflow="fold"
        )
    for item in data["cgroups"]:
        layers = item["layers"]
        table.add_row(
            item["cgroup"],
            item["policy"] or "(none)",
            item["mode"],
            "yes" if layers["hooks"] else "NO",
            layers["seccomp"],
            "no",
            *(f"{item['bytes'][kind]:,}" for kind in ("public", "private", "loopback")),
            f"{sum(refused['count'] for refused in item['refused']):,}",
        )
    console.print(table)
    for item in data["cgroups"]:
        details(console.print, item)
    for name, use in data["maps"].items():
        if use["entries"] * 10 >= use["capacity"] * 9:
            console.print(f"NEARLY FULL: map {name} holds {use['entries']} of {use['capacity']}")


def details(write: Any, item: Mapping[str, Any]) -> None:
    """The lines below the table: refusals by rule, what is not covered, what was lost."""
    if not any(item[key] for key in ("refused", "not_covered", "sockets_adopted", "refusals_uncounted", "events_lost")):
        return
    write(f"\n{item['cgroup']}", markup=False)
    for refused in item["refused"]:
        write(names.refusal_text(refused), markup=False)
    for sentence in item["not_covered"]:
        write(f"  not covered: {sentence}", markup=False)
    if item["sockets_adopted"]:
        write(f"  {item['sockets_adopted']} sockets were open before it was enrolled; they are judged as its own")
    if item["refusals_uncounted"]:
        write(f"  {item['refusals_uncounted']} refusals found no room in the table of counters")
    if item["events_lost"]:
        write(f"  {item['events_lost']} events were not reported (rate limit, or nobody reads: weir events -f)")
