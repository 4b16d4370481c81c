"""``weir probe``: what this kernel and host offer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from agent.kernel.probe import Fact, can_work, facts
from agent.place import pins_of

WORDS = {True: "yes", False: "NO", None: "?"}


@click.command(epilog="\b\nExamples:\n  weir probe\n  weir probe --json | jq '.facts[] | select(.holds | not)'")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def probe(as_json: bool) -> int:
    """Say what weir needs and what of it this host has, each with its reason; by trying, not by version numbers.

    It loads the programs beside those that are in force, with pins and a cgroup of its own, and removes them again.
    Exit status 0 if weir can work here, 1 if not.
    """
    found = list(facts(pins_of()))
    works = can_work(found)
    print(json.dumps({"works": works, "facts": [asdict(fact) for fact in found]}) if as_json else as_text(found, works))
    return 0 if works else 1


def as_text(found: Sequence[Fact], works: bool) -> str:
    """The table for people, and what follows from it."""
    width = max(len(fact.name) for fact in found)
    rows = [f"{fact.name:{width}}  {WORDS[fact.holds]:3}  {fact.reason}" for fact in found]
    needed = [fact for fact in found if fact.needed]
    # What could not be tried hangs on something that fails; where nothing does, it is all that there is to say.
    failing = [fact.name for fact in needed if fact.holds is False] or [f.name for f in needed if f.holds is None]
    end = "weir can work here" if works else f"weir cannot work here; first put right: {', '.join(failing)}"
    return "\n".join([*rows, end])
