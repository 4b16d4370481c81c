"""What a command loads when it runs: a policy is checked on a laptop, without libbpf, BCC, libseccomp or root."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]

REPORT = """
import json, sys
from agent.cli import weir
try:
    weir.main(sys.argv[1:], standalone_mode=False)
finally:
    libraries = [line.split("/")[-1].strip() for line in open("/proc/self/maps") if ".so" in line]
    print(json.dumps({"modules": sorted(sys.modules), "libraries": libraries}), file=sys.stderr)
"""

KERNEL = {"bcc", "pyseccomp", "pyroute2", "agent.kernel.libbpf", "agent.kernel.pinned", "agent.kernel.loader"}


def loaded(*arguments: str) -> tuple[set[str], list[str]]:
    """Modules, and shared libraries, that are in a process of its own after a command."""
    command = [sys.executable, "-c", REPORT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, check=True)
    answer = json.loads(done.stderr.splitlines()[-1])
    return set(answer["modules"]), answer["libraries"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("policy", "check", "appengine", "audit", "untrusted"),
        ("policy", "show", "appengine"),
        ("policy", "explain", "--policy", "appengine", "tcp", "10.0.0.1", "443"),
        ("policy", "schema"),
    ],
    ids=lambda arguments: arguments[1],
)
def test_weir_policy_needs_no_kernel(arguments: tuple[str, ...]) -> None:
    modules, libraries = loaded(*arguments)
    assert "agent.policy.model" in modules
    assert not modules & KERNEL
    assert not [
        name for name in libraries if name.startswith(("libbpf", "libbcc", "libseccomp", "libclang", "libLLVM"))
    ]


def test_weir_status_needs_no_compiler() -> None:
    """Whoever reads the tables (status, events, an agent that stays) never holds BCC's memory."""
    modules, libraries = loaded("version")
    assert "agent.kernel.abi" in modules
    assert "bcc" not in modules
    modules, libraries = loaded("status", "--help")
    assert "agent.kernel.pinned" in modules
    assert "bcc" not in modules
    assert not [name for name in libraries if name.startswith(("libbcc", "libclang", "libLLVM"))]


def test_one_file_opens_shared_libraries() -> None:
    """libbpf is called through agent/kernel/libbpf.py alone; no other file opens a library by itself."""
    found = {
        str(path.relative_to(_ROOT))
        for path in _ROOT.glob("agent/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Name, ast.Attribute))
        and name_of(node) in ("CDLL", "PyDLL", "LoadLibrary", "find_library")
    }
    assert found == {"agent/kernel/libbpf.py", "agent/node/memory.py"}, "libbpf, and malloc's settings in libc"


def name_of(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr
