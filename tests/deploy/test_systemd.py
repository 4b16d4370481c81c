"""deploy/systemd: the unit is one that systemd takes, with the bounds of the DaemonSet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import need
from tests.deploy.copies import DEPLOY
from tests.deploy.manifests import agent_container

UNIT = (DEPLOY / "systemd/weir.service").read_text()
EXECUTABLE = "/opt/weir/.venv/bin/weir"


def values(key: str) -> list[str]:
    """The words of every line `KEY=…`."""
    lines = [line.partition("=")[2] for line in UNIT.splitlines() if line.startswith(f"{key}=")]
    assert lines, key
    return " ".join(lines).split()


def test_systemd_takes_it(tmp_path: Path) -> None:
    """With this interpreter for the command, which is not at its place here."""
    unit = tmp_path / "weir.service"
    unit.write_text(UNIT.replace(EXECUTABLE, sys.executable))
    command = [need.command("systemd-analyze"), "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_capabilities_are_those_of_the_daemonset() -> None:
    manifest = agent_container()["securityContext"]["capabilities"]["add"]
    assert sorted(values("CapabilityBoundingSet")) == sorted(f"CAP_{name}" for name in manifest)


def test_stopping_it_leaves_the_rules() -> None:
    assert not [line for line in UNIT.splitlines() if line.startswith(("ExecStop", "ExecStopPost"))]
    assert values("ExecStart") == [EXECUTABLE, "agent"]
    assert values("Restart") == ["always"]


def test_it_can_write_its_pins() -> None:
    assert "/sys/fs/bpf" in values("ReadWritePaths")
    assert "bpf" in values("SystemCallFilter")
