"""``weir status``: what is in force, per container or cgroup, and what is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from agent import names
from agent.kernel.pinned import PinnedKernel
from agent.node import ask
from agent.place import Place
from agent.status import gather


@click.command(
    epilog="\b\nExamples:\n  weir status\n  weir status --json | jq '.cgroups[] | select((.layers.hooks or .gone) | not)'"
)
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def status(as_json: bool) -> int:
    """Show each cgroup under a policy: mode, layers in force and what they leave uncovered, bytes, refusals.

    While weir agent runs, also the names of the containers, and how the agent is.
    """
    data = now(Place.here())
    if as_json:
        print(json.dumps(data))
    else:
        show(data)
    return 0


def now(place: Place) -> dict[str, Any]:
    """The state as the agent tells it, or from the kernel's tables where no agent runs."""
    told = ask.status(ask.door(place.pins))
    if told is not None:
        return told
    kernel = PinnedKernel(place.pins)
    try:
        return gather(place, kernel)
    finally:
        kernel.close()


def show(data: Mapping[str, Any]) -> None:
    """Print for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)

    def write(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if "node" in data:
        for line in node_lines(data):
            write(line)
    if not data["loaded"]:
        others = ", ".join(data["other_versions"])
        write(
            f"another version of weir has rules in force here ({others}); take them over: weir load"
            if others
            else "weir is not loaded: no rules are in force on this host"
        )
        return
    write(f"loaded: build {data['build']}, a refused call answers {data['errno']}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "CONTAINER" if any(map(names.who, data["cgroups"])) else "CGROUP",
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
            names.who(item) or item["cgroup"],
            item["policy"] or "(none)",
            item["mode"],
            "gone" if item["gone"] else "yes" if layers["hooks"] else "NO",
            layers["seccomp"],
            "yes" if layers["lsm"] else "no",
            *(f"{item['bytes'][kind]:,}" for kind in ("public", "private", "loopback")),
            f"{sum(refused['count'] for refused in item['refused']):,}",
        )
    console.print(table)
    for item in data["cgroups"]:
        details(write, item)
    for name, use in data["maps"].items():
        if use["entries"] * 10 >= use["capacity"] * 9:
            write(f"NEARLY FULL: map {name} holds {use['entries']} of {use['capacity']}")


def node_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """How the agent is: ready or why not, policies and files that are wrong, the CRI, how full the tables are."""
    node = data["node"]
    reloads = node["reloads"]
    running = sum(1 for row in node["rows"] if row["container"] and row["gone"] is None)
    yield f"agent: {'NOT READY' if node['not_ready'] else 'ready'}; {running} containers below {', '.join(node['roots']) or 'no root'}"
    yield from (f"  not ready: {reason}" for reason in node["not_ready"])
    yield from (f"  POLICY FILE WRONG: {file}: {why}" for file, why in reloads["failures"].items())
    if node["cri"]:
        yield f"  NO NAMES FROM THE CRI: {node['cri']}"
    policies = ", ".join(f"{policy['name']} ({policy['mode']})" for policy in node["policies"])
    yield f"policies: {policies or 'none'}; default {node['default'] or 'none'}"
    if data["maps"]:
        yield "tables: " + ", ".join(f"{name} {use['entries']}/{use['capacity']}" for name, use in data["maps"].items())


def details(write: Callable[[str], None], item: Mapping[str, Any]) -> None:
    """The lines below the table: refusals by rule, what is not covered, what was lost."""
    worth = ("refused", "not_covered", "sockets_adopted", "refusals_uncounted", "events_lost", "problem")
    if not any(item.get(key) for key in worth):
        return
    named = names.who(item)
    write(f"\n{named}: {item['cgroup']}" if named else f"\n{item['cgroup']}")
    if item.get("problem"):
        write(f"  PROBLEM: {item['problem']}")
    for refused in item["refused"]:
        write(names.refusal_text(refused))
    for sentence in item["not_covered"]:
        write(f"  not covered: {sentence}")
    if item["sockets_adopted"]:
        write(f"  {item['sockets_adopted']} sockets were open before it was enrolled; they are judged as its own")
    if item["refusals_uncounted"]:
        write(f"  {item['refusals_uncounted']} refusals found no room in the table of counters")
    if item["events_lost"]:
        write(f"  {item['events_lost']} events were not reported (rate limit, or nobody reads: weir events -f)")
