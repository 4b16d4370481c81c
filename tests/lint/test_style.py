"""Style, types and shell scripts: what `make lint` looks at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import need

_ROOT = Path(__file__).resolve().parents[2]


def check(*command: str | Path) -> None:
    """Fail with what the command says, unless it ends well."""
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff() -> None:
    check(sys.executable, "-m", "ruff", "check")


def test_format() -> None:
    check(sys.executable, "-m", "ruff", "format", "--check")


def test_c_format() -> None:
    check(need.command("clang-format"), "--dry-run", "-Werror", *_ROOT.glob("bpf/*.[ch]"))


def test_types() -> None:
    check(sys.executable, "-m", "mypy")


def test_shell_scripts() -> None:
    check(need.command("shellcheck"), ".ci/run", *_ROOT.glob("tests/**/*.sh"))
