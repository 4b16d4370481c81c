"""What a scrape costs beside prometheus_client's own rendering of as many ready-made samples.

.venv/bin/python -m tests.bench.scrape
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector as Collects

from agent.metrics import Collector
from agent.node.page import page
from tests import nodes

CONTAINERS = 10_000
BUDGET = 2.0


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


def scrape_ratio(collector: Collector | None = None, pairs: int = 9, containers: int = CONTAINERS) -> Scrape:
    """Collecting and writing the page, in turns with the floor, which writes the same samples from memory.

    Without a collector, that of a made-up node: the facts are then there already, and no table is read.
    """

    def fail(error: Exception) -> None:
        raise error

    asked = collector or Collector(nodes.sources(*nodes.node(containers)), fail)
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


def main() -> None:
    """Print the row."""
    found = scrape_ratio()
    print(
        f"{CONTAINERS:,} containers, {found.samples:,} samples: {found.own:.0f} ms, "
        f"ready-made {found.floor:.0f} ms, ratio {found.ratio:.2f} (budget {BUDGET})"
    )


if __name__ == "__main__":
    main()
