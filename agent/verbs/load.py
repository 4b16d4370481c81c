"""``weir load`` and ``weir unload``."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

import click

from agent.cgroups import tree
from agent.controller import Controller
from agent.errors import WeirError
from agent.kernel.load import CAPACITY
from agent.kernel.load import load as load_programs
from agent.kernel.pinned import PinnedKernel
from agent.node.ask import door
from agent.node.doorway import is_taken
from agent.place import Place


@click.command(
    epilog="\b\nExamples:\n  weir load\n  weir load --force            # the same programs once more, swapped in place\n"
    "  weir load --attach-root /    # also see sockets that were made outside every enrolled cgroup"
)
@click.option("--max-containers", type=click.IntRange(2, 65535), help=f"Cgroups at one time [default: {CAPACITY}].")
@click.option("--force", is_flag=True, help="Compile and replace even when this very build is loaded.")
@click.option("--attach-root", metavar="CGROUP", help="Attach to this cgroup once, for all that is enrolled below it.")
def load(max_containers: int | None, force: bool, attach_root: str | None) -> int:
    """Compile the programs and pin them; replace older ones in place, with no moment without rules.

    `weir run` and `weir attach` do it themselves when nothing is loaded. Killed half-way it has changed nothing that
    matters: run it again.

    With --attach-root / every socket of the host passes through the programs, so that one made outside and handed to a
    container is noticed. It costs processes outside nearly as much as those inside.
    """
    place = Place.here()
    parent = tree.resolve(attach_root, place.root) if attach_root else None
    began = time.monotonic()
    with place.locked():
        changed = load_programs(place.pins, max_containers, force=force)
        if parent:
            manage(place, parent)
    seconds = time.monotonic() - began
    print(f"loaded in {seconds:.2f} s, pinned below {place.pins.root}" if changed else "already loaded: nothing to do")
    return 0


def manage(place: Place, parent: Path) -> None:
    """Attach the programs to a cgroup."""
    kernel = PinnedKernel(place.pins)
    try:
        Controller(kernel, place.root).manage(parent)
    finally:
        kernel.close()


@click.command(epilog="\b\nExamples:\n  weir unload\n  weir unload --force          # also while cgroups are enrolled")
@click.option("--force", is_flag=True, help="Also when cgroups are under a policy: they are free from then on.")
def unload(force: bool) -> int:
    """Detach every program and remove every pin: rules, counters and all.

    Refused while a cgroup is enrolled, since its processes would be free of their policy.
    """
    place = Place.here()
    if not place.pins.root.exists():
        print("nothing is loaded")
        return 0
    with suppress(OSError):  # it is a warning: a stuck agent, or a strange path, must not keep anybody from unloading
        if is_taken(door(place.pins)):
            print("weir: an agent runs here and puts everything back: stop it first", file=sys.stderr)
    with place.locked():
        kernel = PinnedKernel(place.pins)
        try:
            if not force and place.pins.foreign():
                raise WeirError(
                    f"another version of weir has rules in force ({', '.join(place.pins.foreign())})",
                    "Take them over first (weir load), or set everything free: weir unload --force",
                )
            if not force and kernel.is_loaded():
                refuse_when_enrolled(kernel, place)
        finally:
            kernel.close()
        with place.pins.loading():
            place.pins.remove()
    for child in place.slice.iterdir() if place.slice.exists() else []:
        if child.is_dir():
            print(f"weir: {child} still has processes, now free of their policy", file=sys.stderr)
            break
    else:
        if place.slice.exists():
            place.slice.rmdir()
    print("unloaded")
    return 0


def refuse_when_enrolled(kernel: PinnedKernel, place: Place) -> None:
    """Raise WeirError when a living cgroup is under a policy."""
    Controller(kernel, place.root).collect()
    paths = place.living()
    enrolled = [
        str(paths[number]) for number in kernel.enrolments() if number in paths and paths[number] != place.slice
    ]
    if enrolled:
        raise WeirError(
            f"{len(enrolled)} cgroups are under a policy, {enrolled[0]} among them",
            "Detach them first (weir detach CGROUP), or set them free: weir unload --force",
        )
