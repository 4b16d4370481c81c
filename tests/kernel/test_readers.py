"""Scrapes and `weir status` read without the lock: what is removed while they look is not there, and no error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.kernel.abi import PROGRAMS
from agent.kernel.pinned import PinnedKernel
from tests.kernel.site import Site, site
from tests.meanwhile import meanwhile

TURNS = 200


@pytest.fixture(name="here")
def _here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as made:
        made.ok("load")
        yield made


@pytest.fixture
def kernel(here: Site) -> Iterator[PinnedKernel]:
    made = PinnedKernel(here.place.pins)
    yield made
    made.close()


@pytest.fixture
def reader(here: Site) -> Iterator[PinnedKernel]:
    """As another process is: with descriptors of its own."""
    made = PinnedKernel(here.place.pins)
    yield made
    made.close()


def test_links_that_come_and_go(here: Site, kernel: PinnedKernel, reader: PinnedKernel) -> None:
    with here.cgroup() as cgroup, meanwhile(reader.attached):
        number = tree.cgroup_id(cgroup)
        for _ in range(TURNS):
            kernel.attach(cgroup)
            assert kernel.attached() == {number: frozenset(PROGRAMS)}
            kernel.detach(number)
        assert kernel.attached() == {}
