"""Kills a command before each of its steps: system calls that change something which outlives the process.

strace counts the calls of the traced process alone (not of its children), each name by itself, and ends it with SIGKILL
as it enters the n-th: that call is not made any more. To be killed before every step in turn is to be killed in every gap between two.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import need
from tests.kernel.site import ROOT, TIMEOUT

CALLS = "bpf,mkdir,rmdir,unlink,rename,clone,clone3,fork,vfork,wait4"
"""What is counted; ? keeps strace quiet where an architecture has no call of that name."""

CHANGES = re.compile(
    r"bpf\(BPF_(MAP_UPDATE|MAP_DELETE|LINK_UPDATE|OBJ_PIN|0x1a)|mkdir|rmdir|unlink|rename|v?fork|clone|wait4"
)
"""The calls among them after which the world is another (0x1a: BPF_MAP_UPDATE_BATCH to an older strace).

Not those that make a map, program or link: what is not pinned goes with the process.
"""


@dataclass(frozen=True)
class Step:
    """The n-th call of one name, and its beginning for messages."""

    name: str
    number: int
    call: str

    def __str__(self) -> str:
        return f"{self.name} number {self.number}: {self.call}"


def strace(*options: str) -> list[str]:
    """The beginning of a command line that runs the rest under strace."""
    names = ",".join(f"?{name}" for name in CALLS.split(","))
    return [need.command("strace"), "-e", f"trace={names}", "-e", "signal=none", "-qq", *options]


def run(command: Sequence[str], environment: Mapping[str, str], text: str) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end with ``text`` as its input, and with a /tmp that is gone with what a kill left there."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**environment, "TMPDIR": folder}
        return subprocess.run(
            command, env=settings, input=text, capture_output=True, text=True, check=False, cwd=ROOT, timeout=TIMEOUT
        )


def steps(command: Sequence[str], environment: Mapping[str, str], text: str = "") -> list[Step]:
    """Run a command, which must succeed, and return its steps. WEIR_TEST_SCALE below 1 leaves some of them out."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        done = run([*strace("-o", str(log)), *command], environment, text)
        assert done.returncode == 0, done.stderr
        lines = log.read_text().splitlines()
    seen: Counter[str] = Counter()
    found = []
    for line in lines:
        if call := re.match(r"(\w+)\(", line):
            seen[call[1]] += 1
            if CHANGES.match(line) and " = -1 " not in line:
                found.append(Step(call[1], seen[call[1]], line[:80]))
    assert len(found) >= 3, "a parser of strace's log that finds nothing would test nothing"
    stride = round(1 / float(os.environ.get("WEIR_TEST_SCALE", "1")))
    return found[::stride]


def kill_before(step: Step, command: Sequence[str], environment: Mapping[str, str], text: str = "") -> bool:
    """Run a command and kill it before that step; False when it ended, as it should, before it came so far."""
    inject = f"inject={step.name}:signal=KILL:when={step.number}"
    done = run([*strace("-e", inject, "-o", "/dev/null"), *command], environment, text)
    assert done.returncode in (0, -9, 137), done.stderr
    return done.returncode != 0
