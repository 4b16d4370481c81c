"""`make demo`, as a stranger runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from agent.cgroups import tree
from tests import need
from tests.demo.attempts import ATTEMPTS

_COMMAND = (sys.executable, "-m", "tests.demo")
_COLUMNS = 120
_PATIENCE = 300.0  # seconds; the demo takes about ten


def leftovers(demo: int) -> list[Path]:
    """Pins, cgroup and network namespaces of the demo with this process id."""
    places = (
        (Path("/sys/fs/bpf"), "weir-demo-{}"),
        (tree.mount(), "weir-demo-{}"),
        (Path("/run/netns"), "weir-?-{}-*"),
    )
    return [path for place, pattern in places for path in place.glob(pattern.format(demo))]


def test_every_row_is_as_the_policy_says() -> None:
    need.root()
    need.command("php")
    demo = subprocess.Popen(_COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = demo.communicate(timeout=_PATIENCE)
    assert demo.returncode == 0, output
    lines = output.splitlines()
    rows = sum(line.endswith(" ok") for line in lines)
    assert rows == sum(map(len, ATTEMPTS.values())) + 2, "one row for each attempt and each PHP program"
    assert sum(line.endswith(" equal") for line in lines) == 3
    assert max(map(len, lines)) <= _COLUMNS
    assert not leftovers(demo.pid)


def test_ctrl_c_leaves_nothing() -> None:
    need.root()
    demo = subprocess.Popen(_COMMAND, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    cgroup = tree.mount() / f"weir-demo-{demo.pid}"
    deadline = time.monotonic() + _PATIENCE
    while not list(cgroup.glob("run-*")):
        assert demo.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(demo.pid, signal.SIGINT)
    demo.communicate(timeout=_PATIENCE)
    assert demo.returncode == 130
    assert not leftovers(demo.pid)
