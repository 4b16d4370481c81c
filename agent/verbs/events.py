"""``weir events``: refusals and audits as they happen, from the agent when it runs, else from the kernel."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from agent.errors import WeirError
from agent.events import Describer, as_text, sole_reader
from agent.kernel.pinned import PinnedKernel
from agent.node import ask
from agent.place import Place


@click.command(
    epilog="\b\nExamples:\n  weir events                  # what is waiting, then stop\n  weir events -f --json | jq .rule"
)
@click.option("--follow", "-f", is_flag=True, help="Wait for more until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def events(follow: bool, as_json: bool) -> int:
    """Print what was refused, or would have been (audit), one line each.

    While weir agent runs: the last 1,000, or with -f those that come, for up to 32 readers; a reader that is too slow
    is told how many it missed. Without it: what is waiting in the kernel, for one reader at a time.

    At most 100 a second for each cgroup are reported and the ring holds some 2,700 until they are read; the counters
    (weir status) miss none, and say how many events were lost.
    """
    place = Place.here()
    told = ask.events(ask.door(place.pins), follow)
    for data in directly(place, follow) if told is None else told:
        if as_json:
            print(json.dumps(data), flush=True)
        elif "lost" in data:
            print(f"weir: {data['lost']} events are missing here: this reader was too slow", file=sys.stderr)
        else:
            print(as_text(data), flush=True)
    return 0


def directly(place: Place, follow: bool) -> Iterator[Mapping[str, Any]]:
    """The events that wait in the kernel, and with ``follow`` those that come.

    Raises WeirError when nothing is loaded, or another process reads them.
    """
    kernel = PinnedKernel(place.pins)
    try:
        if not kernel.is_loaded():
            raise WeirError("nothing is loaded, so there are no events", "Start something: weir run, or weir attach")
        describer = Describer(kernel, place)
        with sole_reader(place.pins.maps):
            while True:
                batch = kernel.events(200 if follow else 0)
                if batch:
                    yield from describer.describe(batch)[0]
                elif not follow:
                    return
    finally:
        kernel.close()
