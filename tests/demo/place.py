"""A place of the demo's own for weir's programs and cgroups, and the command `weir` there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from agent.errors import WeirError
from agent.place import Place

_PINS = Path("/sys/fs/bpf")
_PREFIX = "weir-demo-"


class Weir:
    """The command, with pins and slice that nothing else on this host uses."""

    def __init__(self, name: str) -> None:
        self.environment = {**os.environ, "WEIR_PINS": str(_PINS / name), "WEIR_SLICE": name}
        self.place = Place.here(self.environment)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "agent", *arguments]

    def output(self, *arguments: str) -> str:
        """What a verb prints. Raises WeirError with what it said when it fails."""
        done = subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise WeirError(f"weir {' '.join(arguments)}: {done.stderr.strip()}", "See the message.")
        return done.stdout

    def start(self, prefix: Sequence[str], policy: str, *command: str) -> subprocess.Popen[str]:
        """Start `weir run --json` with pipes at its three ends; `prefix` leads into a network namespace."""
        run = self.command("run", "--json", "--policy", policy, "--", *command)
        pipe = subprocess.PIPE
        return subprocess.Popen([*prefix, *run], env=self.environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def summary(stderr: str) -> dict[str, Any]:
    """The last line of `weir run --json`. Raises WeirError when there is none: the rules were not put in force."""
    lines = stderr.strip().splitlines() or [""]
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except ValueError:
        fail(stderr)
    return found


def fail(stderr: str) -> NoReturn:
    raise WeirError(f"weir run did not end with a summary: {stderr.strip()}", "See the message.")


@contextmanager
def place() -> Iterator[Weir]:
    """Programs loaded, from `with` to its end; takes away first what killed demos left."""
    for left in _PINS.glob(f"{_PREFIX}*"):
        if not Path("/proc", left.name.removeprefix(_PREFIX)).exists():
            Weir(left.name).output("unload", "--force")
    weir = Weir(f"{_PREFIX}{os.getpid()}")
    try:
        weir.output("load")
        yield weir
    finally:
        weir.output("unload", "--force")
