"""Scrapes and `weir status` read without the lock: what is removed while they look is not there, and no error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.kernel.abi import PROGRAMS
from agent.kernel.pinned import PinnedKernel
from tests.kernel.site import Site, site

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


@contextmanager
def reading(here: Site, read: Callable[[PinnedKernel], object]) -> Iterator[None]:
    """Read again and again, beside the `with`; fails when that does."""
    over, failures = threading.Event(), list[Exception]()
    kernel = PinnedKernel(here.place.pins)

    def run() -> None:
        while not over.is_set():
            try:
                read(kernel)
            except Exception as e:  # noqa: BLE001 - it is told in the test's thread
                failures.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        kernel.close()
    assert failures == []


def test_links_that_come_and_go(here: Site, kernel: PinnedKernel) -> None:
    with here.cgroup() as cgroup, reading(here, lambda reader: reader.attached()):
        number = tree.cgroup_id(cgroup)
        for _ in range(TURNS):
            kernel.attach(cgroup)
            assert kernel.attached() == {number: frozenset(PROGRAMS)}
            kernel.detach(number)
        assert kernel.attached() == {}
