"""/metrics at a scrape: asks for the facts and makes families of them.

What cannot be read is left out and counted, and `weir_ready` is 0, so that no page looks healthy that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.registry import Collector as Collects

from agent.families import Events, Facts, collect
from agent.kernel.seam import Build, Reading
from agent.node.state import NodeState
from agent.series import Series, series_of

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """Where a scrape gets its facts. Whatever a call raises is a failed scrape, not a failed page.

    ``reported`` and ``suppressed`` are events that the agent wrote, and those that it had read and did not write.
    """

    state: Callable[[], NodeState]
    read: Callable[[], Reading]
    maps: Callable[[], Mapping[str, tuple[int, int]]]
    attached: Callable[[], Mapping[int, frozenset[str]]]
    build: Callable[[], Build | None]
    reported: Callable[[], int]
    suppressed: Callable[[], int] = lambda: 0


class Collector(Collects):
    """Asks ``sources`` at each scrape. ``failed`` gets what went wrong. One scrape at a time: the caller sees to it."""

    def __init__(self, sources: Sources, failed: Callable[[Exception], None]) -> None:
        self._sources = sources
        self._failed = failed
        self._errors = 0
        self._lost: dict[str, Events] = {}
        self._events = Events()

    def collect(self) -> Iterator[Metric]:
        """Read everything once, then the families one at a time."""
        ask, before = self._sources, self._errors
        state = ask.state()
        reading = self._try(ask.read)
        maps, attached, build = self._try(ask.maps), self._try(ask.attached), self._try(ask.build)
        self._errors = min(self._errors, before + 1)
        series = series_of(state, reading)
        if reading is not None:
            self._add_losses(series)
        suppressed = self._events.suppressed + ask.suppressed()
        events = replace(self._events, reported=ask.reported(), suppressed=suppressed)
        return collect(Facts(state, reading, maps, attached, build, events, self._errors), series)

    def _try(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except Exception as e:  # noqa: BLE001 - whatever it is, what is known is still shown, and that it is not all
            self._errors += 1
            self._failed(e)
            return None

    def _add_losses(self, series: Sequence[Series]) -> None:
        """Add what each container lost since the last scrape: their sum alone would fall when one of them goes.

        By its cgroup: its other names may come later.
        """
        seen: dict[str, Events] = {}
        for one in series:
            cgroup, counters = one.who["cgroup"], one.counters
            others = seen.get(cgroup, Events())
            now = Events(
                suppressed=others.suppressed + counters.events_suppressed,
                lost=others.lost + counters.events_lost,
                uncounted=others.uncounted + counters.refusals_uncounted,
            )
            if now != Events():
                seen[cgroup] = now
        for cgroup, now in seen.items():
            before = self._lost.get(cgroup, Events())
            self._events = Events(
                suppressed=self._events.suppressed + max(now.suppressed - before.suppressed, 0),
                lost=self._events.lost + max(now.lost - before.lost, 0),
                uncounted=self._events.uncounted + max(now.uncounted - before.uncounted, 0),
            )
        self._lost = seen


def registry(collector: Collector) -> CollectorRegistry:
    """The collector, and what prometheus_client says of this process."""
    made = CollectorRegistry()
    made.register(collector)
    ProcessCollector(registry=made)
    return made
