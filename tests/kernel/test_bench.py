"""The benchmark runs from end to end and leaves nothing behind. No time is asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import need

_ROOT = Path(__file__).resolve().parents[2]
_SHORT = ("--rounds=1", "--turns=2", "--loads=1", "--times=1", "--cgroups=3", "--containers=3", "--seconds=1")


def test_the_benchmark_runs(tmp_path: Path) -> None:
    need.root()
    need.command("gcc")
    need.command("bpftool")
    output = tmp_path / "results.md"
    with subprocess.Popen([sys.executable, "-m", "tests.bench", *_SHORT, f"--output={output}"], cwd=_ROOT) as bench:
        assert bench.wait() == 0
    text = output.read_text()
    assert text.count("| empty programs |") == 5
    assert "nan" not in text
    assert "## The agent" in text
    assert text.count("containers") > 10
    assert not list(Path("/sys/fs/bpf").glob(f"weir-bench-{bench.pid}-*"))
