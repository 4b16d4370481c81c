"""weir as its user meets it: the command, with pins, slice and cgroups of a test's own, all gone at the end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.cgroups import tree
from agent.kernel.pinned import PinnedKernel
from agent.kernel.pins import Pins
from agent.place import Place
from tests import need

ROOT = Path(__file__).resolve().parents[2]

TIMEOUT = 600.0
"""Seconds for one command: under emulation a load alone takes half a minute."""

DENY_ALL = """\
apiVersion: weir.dev/v1
kind: SocketPolicy
metadata: {name: NAME}
spec:
  sockets: {families: [inet, inet6, unix], protocols: [tcp, udp], listen: deny, bind: deny, transfer: deny}
  egress:
    - {name: door, action: allow, to: [127.0.0.1], ports: [PORT]}
  default: deny
"""
"""A policy that refuses all but one port of this host."""


@dataclass(frozen=True)
class Site:
    """Where one test's weir keeps its things."""

    place: Place
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What tells weir to keep to this site."""
        return {**os.environ, "WEIR_PINS": str(self.place.pins.root), "WEIR_SLICE": self.place.slice.name}

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line of weir, as installed beside this Python."""
        return [str(Path(sys.executable).with_name("weir")), *map(str, arguments)]

    def weir(
        self, *arguments: str | Path, prefix: Sequence[str] = (), **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run weir to its end. Options as for subprocess.run; ``prefix`` is a command that starts it."""
        settings: dict[str, Any] = {"capture_output": True, "env": self.environment, "timeout": TIMEOUT, **options}
        return subprocess.run([*prefix, *self.command(*arguments)], text=True, check=False, cwd=ROOT, **settings)

    def ok(self, *arguments: str | Path, **options: Any) -> str:
        """Run weir, which must succeed; its standard output."""
        done = self.weir(*arguments, **options)
        assert done.returncode == 0, f"weir {' '.join(map(str, arguments))}: {done.returncode}\n{done.stderr}"
        return done.stdout

    def start(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start weir beside the test; the caller waits for it."""
        return subprocess.Popen(self.command(*arguments), text=True, env=self.environment, cwd=ROOT, **options)

    def status(self) -> dict[str, Any]:
        """What `weir status --json` says."""
        answer: dict[str, Any] = json.loads(self.ok("status", "--json"))
        return answer

    def policy_of(self, cgroup: Path) -> str | None:
        """The name of the policy that a cgroup is under, None when it is under none."""
        rows = [row for row in self.status()["cgroups"] if row["cgroup_id"] == tree.cgroup_id(cgroup)]
        return rows[0]["policy"] if rows else None

    def policy(self, name: str, port: int) -> Path:
        """A policy file that refuses everything but one port on 127.0.0.1."""
        path = self.folder / f"{name}.yaml"
        path.write_text(DENY_ALL.replace("NAME", name).replace("PORT", str(port)))
        return path

    @contextmanager
    def cgroup(self) -> Iterator[Path]:
        """A cgroup beside the slice; at the end its processes are killed and it is removed."""
        path = self.place.root / f"{self.place.slice.name}-{secrets.token_hex(3)}"
        path.mkdir()
        try:
            yield path
        finally:
            remove(path)

    def rest(self) -> list[str]:
        """Cgroups of runs and pins of half-finished work that are there; a tidy weir leaves none."""
        cgroups = [path.name for path in self.place.slice.glob("*/")]
        return cgroups + [str(path) for path in self.place.pins.root.rglob("*-new")]

    def state(self) -> list[str]:
        """All that weir has put on this host: pins, cgroups of the slice, and what the tables say of them."""
        pins = self.place.pins
        found = [str(path) for path in pins.root.rglob("*")] + [str(path) for path in self.place.slice.rglob("*/")]
        if not (pins.maps / "config").exists():
            return sorted(found)
        kernel = PinnedKernel(pins)
        try:
            tables = [str(kernel.enrolments()), str(kernel.attached()), str(list(kernel.versions()))]
        finally:
            kernel.close()
        return sorted(found) + tables


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """A site of this process's own; unloaded and removed at the end, also after a failure."""
    need.root()
    name = f"weir-test-{os.getpid()}-{secrets.token_hex(2)}"
    root = tree.mount()
    made = Site(Place(Pins(Path("/sys/fs/bpf") / name), root, root / name), folder)
    try:
        yield made
    finally:
        made.place.pins.remove()
        remove(made.place.slice)


def remove(cgroup: Path) -> None:
    """Kill what is in a cgroup and below it, and remove it; nothing when it is not there."""
    if not cgroup.exists():
        return
    deadline = time.monotonic() + TIMEOUT
    while True:
        for pid in tree.processes(cgroup):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            for path in [*reversed(list(tree.descendants(cgroup))), cgroup]:
                path.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def one_line(done: subprocess.CompletedProcess[str]) -> Mapping[str, str]:
    """An expected failure as its reader sees it: {"message", "hint"}; fails on a traceback or another exit status."""
    assert done.returncode == 1, f"exit {done.returncode}: {done.stderr}"
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("weir: loading")]
    assert lines and lines[0].startswith("weir: "), done.stderr
    assert len(lines) > 1 and lines[-1].startswith("  "), f"no hint: {done.stderr}"
    return {"message": "\n".join(lines[:-1]).removeprefix("weir: "), "hint": lines[-1].strip()}


def wait_until_blocked(pid: int) -> None:
    """Until a process, or a child of it, waits for a lock (/proc/locks marks those with an arrow); fails when it ends."""
    deadline = time.monotonic() + TIMEOUT
    while not any(pid in (waiting, stat(waiting)[1]) for waiting in waiting_for_locks()):
        assert stat(pid)[0] not in ("Z", ""), "it has ended and waited for no lock"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def waiting_for_locks() -> list[int]:
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return [int(fields[5]) for fields in lines if fields[1] == "->"]


def stat(pid: int) -> tuple[str, int]:
    """A process's state and its parent; ("", 0) when it is gone (proc(5))."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except FileNotFoundError:
        return "", 0
    return state, int(parent)
