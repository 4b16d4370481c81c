"""Costs that are paid once: loading, attaching, switching, starting a command, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from agent.controller import Controller, compiled
from agent.kernel import abi
from agent.kernel.abi import Flag
from agent.kernel.load import CAPACITY, run_loader
from agent.kernel.pinned import PinnedKernel
from agent.kernel.pins import Pins
from agent.place import Place
from tests.bench.place import policy_with
from tests.bench.programs import compiled_empty

_IMPORT = "import os, time; t = time.perf_counter(); {}; print(time.perf_counter() - t, flush=True); os._exit(0)"


@dataclass(frozen=True)
class Cost:
    """One line of the table; ``values`` in ``unit``, of which the median is shown."""

    name: str
    values: tuple[float, ...]
    unit: str
    note: str = ""


def timed(action: Callable[[], object], times: int) -> tuple[float, ...]:
    """Milliseconds of each of so many runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append((time.perf_counter() - began) * 1000)
    return tuple(taken)


def environment(place: Place) -> dict[str, str]:
    """For a weir that works in this place."""
    return {**os.environ, "WEIR_PINS": str(place.pins.root), "WEIR_SLICE": place.slice.name}


def loading(place: Place, times: int) -> list[Cost]:
    """The loader from nothing, and its parts. The place must not be loaded; nothing stays loaded."""

    def cold() -> None:
        place.pins.make()
        run_loader(place.pins, CAPACITY)

    taken: list[float] = []
    for _ in range(times):
        taken += timed(cold, 1)
        place.pins.remove()
    imported = [
        float(subprocess.check_output([sys.executable, "-c", _IMPORT.format("import bcc")])) * 1000
        for _ in range(times)
    ]
    nothing = timed(lambda: subprocess.run([sys.executable, "-c", ""], check=True), times)
    return [
        Cost("load: loader's start to everything pinned", tuple(taken), "ms", "budget 1,000 with attach"),
        Cost("of this: an empty Python process", nothing, "ms"),
        Cost("of this: import of BCC", tuple(imported), "ms"),
        Cost("BCC with empty programs: compile and load", timed(compiled_empty, times), "ms", "in a process with BCC"),
    ]


def attaching(place: Place, times: int) -> Cost:
    """Attach to a cgroup, and detach again, which is not timed. The place must be loaded."""
    kernel = PinnedKernel(place.pins)
    taken: list[float] = []
    for _ in range(times):
        taken += timed(lambda: kernel.attach(place.slice), 1)
        kernel.detach(place.slice.stat().st_ino)
    kernel.close()
    return Cost(f"attach {len(abi.PROGRAMS)} programs to a cgroup", tuple(taken), "ms")


def switching(place: Place, cgroups: int, times: int) -> Cost:
    """Switch that many enrolled cgroups from one policy to another and back. The place must be loaded."""
    kernel = PinnedKernel(place.pins)
    controller = Controller(kernel, place.root)
    policies = [compiled(policy_with(10)), compiled(policy_with(1000))]
    paths = [place.slice / f"switch-{number}" for number in range(cgroups)]
    made: list[Path] = []
    try:
        for path in paths:
            path.mkdir()
            made.append(path)
        controller.enrol_all(paths, policies[0], Flag.BORN)
        turn = iter(range(1, times + 1))

        def switch() -> None:
            controller.enrol_all(paths, policies[next(turn) % 2])

        return Cost(f"switch {cgroups:,} cgroups to another policy", timed(switch, times), "ms", "budget 100 for 1,000")
    finally:
        kernel.withdraw([path.stat().st_ino for path in made])
        for path in made:
            path.rmdir()
        kernel.close()


def starting(place: Place, times: int) -> list[Cost]:
    """What `weir run` adds to a command when weir is loaded."""
    command = [sys.executable, "-m", "agent", "run", "--quiet", "--"]

    def run(prefix: list[str]) -> None:
        subprocess.run([*prefix, "true"], env=environment(place), check=True, stderr=subprocess.DEVNULL)

    bare, under = timed(lambda: run([]), times), timed(lambda: run(command), times)
    script = "import time; print(time.clock_gettime(time.CLOCK_MONOTONIC))"
    before_exec = []
    for _ in range(times):
        began = time.monotonic()
        out = subprocess.check_output([*command, sys.executable, "-S", "-c", script], env=environment(place), text=True)
        direct_began = time.monotonic()
        direct = float(subprocess.check_output([sys.executable, "-S", "-c", script], text=True)) - direct_began
        before_exec.append((float(out) - began - direct) * 1000)
    return [
        Cost("`true`", bare, "ms"),
        Cost("`weir run -- true`", under, "ms", "its end asks inet_diag which sockets still send"),
        Cost("from `weir run` to the command's first instruction", tuple(before_exec), "ms"),
    ]


def kilobytes(pid: int) -> tuple[float, float]:
    """Rss and Pss of a process, in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    fields = dict(line.split(":") for line in lines[1:])
    return int(fields["Rss"].split()[0]) / 1024, int(fields["Pss"].split()[0]) / 1024


def memory(place: Place) -> list[Cost]:
    """Of user space, and of the kernel's maps."""
    command = [sys.executable, "-m", "agent", "run", "--quiet", "--", "sh", "-c", "echo; exec sleep 1000"]
    with subprocess.Popen(command, env=environment(place), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout
        run.stdout.readline()
        run_rss, run_pss = kilobytes(run.pid)
        run.terminate()  # goes to the command
    holder = (
        "import sys; from pathlib import Path; from agent.kernel.pins import Pins; from agent.kernel.pinned import PinnedKernel\n"
        "kernel = PinnedKernel(Pins(Path(sys.argv[1]))); kernel.refusals(); kernel.enrolments(); kernel.versions()\n"
        "kernel.counters(1); kernel.events(0); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(place.pins.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holding:
        assert holding.stdout and holding.stdin
        holding.stdout.readline()
        held_rss, held_pss = kilobytes(holding.pid)
        holding.stdin.close()
    return [
        Cost("`weir run` while its command sleeps, RSS", (run_rss,), "MB", f"PSS {run_pss:.1f} MB"),
        Cost("a process that holds the pinned maps open, RSS", (held_rss,), "MB", f"PSS {held_pss:.1f} MB"),
        Cost("the kernel's maps, memlock", (map_memory(place.pins),), "MB", f"for {CAPACITY:,} containers, no policy"),
    ]


def map_memory(pins: Pins) -> float:
    """Of the pinned maps, in MB."""
    total = 0
    for pin in pins.maps.iterdir():
        shown = subprocess.check_output(["bpftool", "-j", "map", "show", "pinned", str(pin)])
        total += int(json.loads(shown)["bytes_memlock"])
    return total / 1_000_000


def middle(cost: Cost) -> str:
    """The median with its range."""
    if len(cost.values) == 1:
        return f"{_digits(cost.values[0])} {cost.unit}"
    return f"{_digits(median(cost.values))} {cost.unit} ({_digits(min(cost.values))} to {_digits(max(cost.values))})"


def _digits(value: float) -> str:
    """Three that matter, or as many as there are before the point and one more."""
    return f"{value:,.{1 if value >= 10 else 2}f}"
