"""One set of loaded programs and one World for all tests of this tier; a fresh box for each test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests import need
from tests.kernel.cage import Box, Cage, cage
from tests.world import World


@pytest.fixture(scope="session", name="cage")
def _cage() -> Iterator[Cage]:
    need.root()
    if not os.path.ismount("/sys/fs/bpf"):
        subprocess.run(["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"], check=True)
    with cage() as made:
        yield made


@pytest.fixture(scope="session", name="world")
def _world() -> Iterator[World]:
    need.root()
    with World() as made:
        yield made


@pytest.fixture
def box(cage: Cage, world: World) -> Iterator[Box]:
    """A new cgroup; its jobs run in the client's namespace of the session's World."""
    with cage.box(world) as made:
        yield made
