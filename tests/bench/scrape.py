"""What a scrape costs beside prometheus_client's own rendering of as many ready-made samples.

.venv/bin/python -m tests.bench.scrape
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector as Collects

from agent.cgroups import tree
from agent.controller import Controller, compiled
from agent.kernel.abi import Flag
from agent.kernel.load import load
from agent.kernel.pinned import PinnedKernel
from agent.metrics import Collector, Sources
from agent.node.page import page
from agent.place import Place
from tests import nodes
from tests.bench.once import Cost
from tests.bench.place import own_place, policy_with

CONTAINERS = 10_000
BUDGET = 2.0

MAX_CAPACITY = 65535
"""What `weir agent --max-containers` takes."""


@dataclass(frozen=True)
class Scrape:
    """Medians; ``ratio`` is that of the pairs. ``own`` and ``floor`` are milliseconds of wall clock."""

    samples: int
    own: float
    floor: float
    ratio: float


class _Ready(Collects):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def milliseconds(action: Callable[[], object]) -> float:
    """How long one run takes."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


def _fail(error: Exception) -> None:
    raise error


def scrape_ratio(collector: Collector | None = None, pairs: int = 9, containers: int = CONTAINERS) -> Scrape:
    """Collecting and writing the page, in turns with the floor, which writes the same samples from memory.

    Without a collector, that of a made-up node: the facts are then there already, and no table is read.
    """
    asked = collector or Collector(nodes.sources(*nodes.node(containers)), _fail)
    registry, ready = CollectorRegistry(), CollectorRegistry()
    registry.register(asked)
    metrics = list(asked.collect())
    ready.register(_Ready(metrics))
    own, floor = [], []
    for _ in range(pairs):
        own.append(milliseconds(lambda: page(registry, "", "")))
        floor.append(milliseconds(lambda: generate_latest(ready)))
    ratio = median(a / b for a, b in zip(own, floor, strict=True))
    return Scrape(sum(len(metric.samples) for metric in metrics), median(own), median(floor), ratio)


@contextmanager
def enrolled(place: Place, containers: int) -> Iterator[Collector]:
    """A collector of the kernel's tables, with so many cgroups in them; loads weir there, and removes everything."""
    kernel = PinnedKernel(place.pins)
    paths = [place.slice / f"scrape-{number}" for number in range(containers)]
    place.pins.make()
    load(place.pins, min(2 * containers + 2, MAX_CAPACITY))
    try:
        place.slice.mkdir()
        for path in paths:
            path.mkdir()
        Controller(kernel, place.root).enrol_all(paths, compiled(policy_with(10)), Flag.BORN)
        rows = [nodes.row(number, cgroup_ids=(tree.cgroup_id(path),)) for number, path in enumerate(paths, 2)]
        state = nodes.state(rows)
        yield Collector(
            Sources(lambda: state, kernel.read, kernel.max_capacity, kernel.attached, kernel.build, lambda: 0), _fail
        )
    finally:
        kernel.close()
        place.pins.remove()
        for path in (*paths, place.slice):
            if path.exists():
                path.rmdir()


def costs(place: Place, containers: int, pairs: int = 9) -> list[Cost]:
    """A scrape of a made-up node and of the kernel's tables."""
    made_up = scrape_ratio(None, pairs, containers)
    with enrolled(place, containers) as collector:
        real = scrape_ratio(collector, pairs, containers)
    return [
        Cost(
            f"scrape with {containers:,} containers, to prometheus_client's time for as many ready-made samples",
            (found.ratio,),
            "times",
            f"budget {BUDGET:g}; {found.samples:,} samples, {found.own:,.0f} against {found.floor:,.0f} ms; {what}",
        )
        for found, what in ((made_up, "facts at hand"), (real, "read from the kernel, nothing refused"))
    ]


def main() -> None:
    """Print the rows."""
    for cost in costs(own_place(), CONTAINERS):
        print(f"{cost.name}: {cost.values[0]:.2f} ({cost.note})")


if __name__ == "__main__":
    main()
