"""``weir top``: who sends how much and is refused what, a second, as a table that moves."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent.place import Place
from agent.rates import Row, Sort, arranged, rows, total
from agent.verbs.keyboard import END, ESCAPE, keys
from agent.verbs.status import now

SORTS = {"p": Sort.PUBLIC, "v": Sort.PRIVATE, "l": Sort.LOOPBACK, "r": Sort.REFUSED, "n": Sort.NAME}
HELP = "p public  v private  l loopback  r refused  n name  / filter  q quit"
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "": 1.0}
SHORTEST = 0.1
"""Seconds: a reading of a node with thousands of containers takes some of that."""


def read_interval(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    """A time such as 2s, 0.5s or 500ms, in seconds; a usage error for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|)", value)
    if not found:
        raise click.BadParameter(f"{value!r} is no duration; write 2s, 0.5s or 500ms")
    return max(SHORTEST, float(found[1]) * SECONDS[found[2]])


@dataclass(frozen=True)
class View:
    """What the person at the keyboard has chosen. ``typing``: the keys go into the filter."""

    sort: Sort
    text: str = ""
    typing: bool = False
    ended: bool = False

    def after(self, typed: str) -> View:
        """The view after some keys."""
        view = self
        for key in typed:
            view = view._filter_key(key) if view.typing else view._key(key)
        return view

    def _key(self, key: str) -> View:
        if key in ("q", END):
            return replace(self, ended=True)
        if key == "/":
            return replace(self, typing=True, text="")
        if key == ESCAPE:
            return replace(self, text="")
        return replace(self, sort=SORTS.get(key, self.sort))

    def _filter_key(self, key: str) -> View:
        if key == END:
            return replace(self, ended=True)
        if key in ("\r", "\n"):
            return replace(self, typing=False)
        if key == ESCAPE:
            return replace(self, typing=False, text="")
        if key in ("\x7f", "\b"):
            return replace(self, text=self.text[:-1])
        return replace(self, text=self.text + key) if key.isprintable() else self


@click.command(
    epilog="\b\nExamples:\n  weir top --sort refused\n  weir top --once                 # two readings, one table\n"
    "  weir top --json | jq -c '.rows[0]'"
)
@click.option("--sort", type=click.Choice([sort.value for sort in Sort]), default="public", show_default=True)
@click.option("--interval", callback=read_interval, default="2s", show_default=True, help="Time between two readings.")
@click.option("--once", is_flag=True, help="Take two readings, print the table and stop.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each interval.")
def top(sort: str, interval: float, once: bool, as_json: bool) -> int:
    """Show bytes a second by class and refusals a second by rule, for each container or cgroup under a policy.

    \b
    Keys: p v l r n   sort by public, private, loopback bytes, refusals, name
          /           type a part of a name, cgroup or policy; Enter keeps it, Esc drops it
          q           quit
    """  # noqa: D301 - \b is click's mark for lines that stay as they are
    if not (once or as_json or sys.stdout.isatty()):
        raise click.UsageError("Standard output is no terminal: give --once or --json.")
    place = Place.here()

    def read() -> dict[str, Any]:
        return now(place)

    view = View(Sort(sort))
    if as_json or once:
        written(read, view, interval, once, as_json)
    else:
        live(read, view, interval)
    return 0


def written(read: Callable[[], dict[str, Any]], view: View, interval: float, once: bool, as_json: bool) -> None:
    """Print the table, or a line of JSON for each interval."""
    before = read()
    while True:
        time.sleep(interval)
        after = read()
        found = arranged(rows(before, after), view.sort)
        if as_json:
            seconds = after.get("monotonic", 0.0) - before.get("monotonic", 0.0)
            print(json.dumps({"seconds": seconds, "rows": [row.as_data() for row in found]}), flush=True)
        else:
            Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(
                table(found, view, after["loaded"])
            )
        if once:
            return
        before = after


def live(read: Callable[[], dict[str, Any]], view: View, interval: float) -> None:
    """Draw the table on the whole screen until q; the terminal is then as it was."""
    console = Console(highlight=False)
    with ExitStack() as stack:
        wait = stack.enter_context(keys(sys.stdin.fileno())) if sys.stdin.isatty() else _without_keys
        screen = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
        before = after = read()
        due = time.monotonic() + interval
        while not view.ended:
            found = arranged(rows(before, after), view.sort, view.text)
            screen.update(drawn(found, view, console.size.height, bool(after["loaded"])), refresh=True)
            view = view.after(wait(due - time.monotonic()))
            if time.monotonic() >= due:
                before, after = after, read()
                due = time.monotonic() + interval


def _without_keys(seconds: float) -> str:
    time.sleep(max(0.0, seconds))
    return ""


def drawn(found: Sequence[Row], view: View, height: int, loaded: bool) -> RenderableType:
    """The whole screen: as many rows as it has room for, and the keys."""
    room = max(1, height - 4)  # titles, totals, what is left out, keys
    left_out = f"{len(found) - room} more below; " if len(found) > room else ""
    prompt = f"filter: {view.text}{'_' if view.typing else ''}  " if view.typing or view.text else ""
    return Group(
        table(found, view, loaded, room),
        Text(f"{left_out}sorted by {view.sort.value}", style="dim", no_wrap=True),
        Text(f"{prompt}{HELP}", style="reverse", no_wrap=True),
    )


def table(found: Sequence[Row], view: View, loaded: bool, room: int | None = None) -> RenderableType:
    """The rows and their sum. ``room``: how many rows at most."""
    if not loaded:
        return Text("weir is not loaded: no rules are in force on this host")
    made = Table(box=None, pad_edge=False, header_style="bold", show_footer=True, footer_style="bold")
    made.add_column(titled(Sort.NAME, view), f"{len(found)} in all", no_wrap=True, min_width=12)
    for sort, shown in SHOWN.items():
        made.add_column(titled(sort, view), shown(total(found, sort.value)), justify="right", no_wrap=True)
    made.add_column("TOP RULE", no_wrap=True)
    made.add_column("SOCKETS", justify="right", no_wrap=True)
    for title in ("POLICY", "MODE", "LAYERS"):
        made.add_column(title, no_wrap=True)
    for row in found[:room]:
        made.add_row(
            Text(row.name),
            *(shown(getattr(row, sort.value)) for sort, shown in SHOWN.items()),
            Text(top_rule(row)),
            f"{row.sockets:,}",
            Text(row.policy or "(none)"),
            row.mode,
            Text(layers(row), style="" if row.hooks else "bold red"),
        )
    return made


def size(per_second: float) -> str:
    """Bytes a second for people, without the "a second"."""
    return decimal(round(per_second)).replace("bytes", "B").replace("byte", "B") if per_second >= 0.5 else "0"


def count(per_second: float) -> str:
    """Refusals a second for people."""
    return f"{per_second:,.1f}" if per_second else "0"


SHOWN = {Sort.PUBLIC: size, Sort.PRIVATE: size, Sort.LOOPBACK: size, Sort.REFUSED: count}
"""The columns of rates, and how their numbers are written."""


def titled(sort: Sort, view: View) -> str:
    """The title of a column that the table can be sorted by, with a mark when it is."""
    return (sort.value.upper() if sort is Sort.NAME else f"{sort.value.upper()}/S") + (
        " ▼" if view.sort is sort else ""
    )


def top_rule(row: Row) -> str:
    """The rule that refused most in this interval, and how much of it."""
    if not row.rules:
        return ""
    busiest = row.rules[0]
    audit = " (audit)" if busiest.audited else ""
    more = f" +{len(row.rules) - 1}" if len(row.rules) > 1 else ""
    return f"{busiest.rule}{audit} {count(busiest.per_second)}{more}"


def layers(row: Row) -> str:
    """The layers in force."""
    if row.gone:
        return "gone"
    if not row.hooks:
        return "NO HOOKS"
    return f"hooks, seccomp {row.seccomp}" + (", lsm" if row.lsm else "")
