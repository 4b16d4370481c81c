"""``weir load``: starts the loader process, and says in one sentence what went wrong."""

from __future__ import annotations

import json
import subprocess
import sys

from agent.errors import WeirError
from agent.kernel import adopt, source
from agent.kernel.pinned import PinnedKernel
from agent.kernel.pins import Pins

CAPACITY = 4096
"""Containers at one time, unless told otherwise: 400 KB of counters for each CPU."""

TIMEOUT = 600
"""Seconds; a compile takes one, on 5.10 under emulation eighty."""


def load(pins: Pins, capacity: int | None = None, *, force: bool = False) -> bool:
    """Load the programs unless this very build is loaded; True when something was loaded.

    Raises WeirError; then what was loaded before is still in force.
    """
    pins.make()
    adopt.refuse_unknown(pins)
    kernel = PinnedKernel(pins)
    try:
        present = kernel.build()
    finally:
        kernel.close()
    adopted = None
    if present is None:
        with pins.loading():
            pins.remove_unfinished()
            adopted = adopt.adopt(pins)
    if adopted and capacity not in (None, adopted):
        raise _of_another_size(adopted, capacity)
    if present and capacity not in (None, present.capacity):
        raise _of_another_size(present.capacity, capacity)
    wanted = capacity or (present.capacity if present else adopted or CAPACITY)
    if present and not force and present.build == source.build_number(source.text(source.directory()), (str(wanted),)):
        adopt.forget(pins)
        return False
    run_loader(pins, wanted)
    adopt.forget(pins)
    return True


def _of_another_size(present: int, wanted: int | None) -> WeirError:
    return WeirError(
        f"weir is loaded for {present} containers and its tables cannot change size in place",
        f"Unload first (weir unload), or leave out --max-containers {wanted}.",
    )


def run_loader(pins: Pins, capacity: int) -> None:
    """Run the loader and raise what it reports."""
    order = json.dumps({"pins": str(pins.root), "capacity": capacity})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "agent.kernel.loader"],
            input=order,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise WeirError(f"the loader did not finish in {TIMEOUT} s", "Try again when the machine is less busy.") from e
    try:
        answer = json.loads(done.stdout)
    except ValueError as e:
        tail = "\n".join(f"    {line}" for line in done.stderr.splitlines()[-8:])
        raise WeirError(
            f"the loader ended with status {done.returncode} and no answer\n{tail}",
            "What was loaded before is still in force. Try again: weir load",
        ) from e
    if "error" in answer:
        raise WeirError(answer["error"], answer["hint"])
