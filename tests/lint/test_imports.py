"""Who may import what: the table in agent/README.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]

# Modules that one part alone may import, and which that is.
_ALONE = {
    "bcc": {"agent/kernel/loader.py"},
    "pyseccomp": {"agent/seccomp/filter.py"},
    "pyroute2": {"agent/cgroups/sockets.py"},
    "agent.kernel.libbpf": {"agent/kernel/", "agent/place.py"},
    "agent.kernel.pinned": {"agent/kernel/", "agent/run.py", "agent/node/daemon.py", "agent/verbs/"},
    "inotify_simple": {"agent/cgroups/watch.py"},
    "google": {"agent/cri/"},
    "click": {"agent/cli.py", "agent/__main__.py", "agent/verbs/"},
    "rich": {"agent/verbs/"},
}

# Parts that may import nothing of ours but this.
_ONLY = {
    "agent/policy/": {"agent.policy", "agent.errors"},
    "agent/seccomp/": {"agent.seccomp", "agent.policy.model", "agent.errors"},
    "agent/cgroups/": {"agent.cgroups", "agent.errors"},
    "agent/kernel/seam.py": {"agent.kernel.abi", "agent.policy"},
    "agent/controller.py": {"agent.kernel.seam", "agent.kernel.abi", "agent.policy", "agent.cgroups", "agent.errors"},
}

SOURCES = [str(path.relative_to(_ROOT)) for path in sorted(_ROOT.glob("agent/**/*.py"))]


def imported(file: str) -> Iterator[str]:
    """Full names of what a file imports; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse((_ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, module: str) -> bool:
    """True when a name is a module's, or in it."""
    return f"{name}.".startswith(f"{module}.")


@pytest.mark.parametrize("file", SOURCES)
def test_imports(file: str) -> None:
    for name in imported(file):
        for module, importers in _ALONE.items():
            if within(name, module):
                assert file.startswith(tuple(importers)), f"{module} is for {', '.join(sorted(importers))}"
        for part, modules in _ONLY.items():
            if file.startswith(part) and within(name, "agent"):
                assert any(within(name, module) for module in modules), f"{part} may not import {name}"
