"""Many at once: cgroups by the thousand, refusals by the ten thousand, and an agent that is killed again and again."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.meanwhile import meanwhile
from tests.node.faults import EACCES, Node, cpu_seconds, held, plain_node, stopped
from tests.node.probe import DATAGRAM, Peer, started_in
from tests.node.storm import Storm, attempts

SCALE = float(os.environ.get("WEIR_TEST_SCALE", "1"))
STORM = max(4, int(60 * SCALE))
"""Seconds."""

GROWTH = 16 << 20
"""Bytes by which the agent's memory may grow from one storm to the next like it: allocators, not lists."""


@pytest.fixture(name="here")
def _here(tmp_path: Path, probe: Path, door: Peer, wall: Peer) -> Iterator[Node]:
    with plain_node(tmp_path, probe, door, wall) as made:
        yield made


def test_cgroups_by_the_thousand(here: Node, measured: Callable[[str], None]) -> None:
    """A thousand in a second, for a minute, or as many as this machine can make; how many is told at the end of the tests.

    What lives is counted to the byte, what is born is refused and counted, and nothing of what is gone is left.
    """
    here.site.options |= {"--retain": "15s", "--max-containers": "16384"}
    living = [f"living-{number}" for number in range(4)]
    with here.agent() as agent:
        for name in living:
            here.works(name)
        before, room = here.settled(agent), here.room()
        storm, sizes, end = Storm(here.root), list[int](), time.monotonic() + STORM
        with attempts(here) as tried, meanwhile(lambda: storm.blow(500)):
            while time.monotonic() < end:
                for name in living:
                    here.works(name)
                sizes.append(held(agent.process.pid).memory)
                tried.look(agent.scrape())
                here.lives(agent)
        measured(
            f"{storm.made / storm.seconds:,.0f} cgroups a second for {STORM} s, {len(tried.ends)} attempts beside them"
        )
        assert set(tried.ends) == {EACCES}
        agent.until(lambda: tried.look(agent.scrape()), lambda: f"{len(tried.ends)} refused, counted: {tried.seen}")
        assert max(sizes) - max(sizes[: len(sizes) // 2]) < GROWTH, sizes
        here.await_exact(agent, *living)
        agent.until(lambda: here.room() >= room, lambda: f"room for {here.room()}, before for {room}")
        here.works("after")
        here.await_exact(agent, "after", *living)
        here.leaks_nothing(agent, before, watches=1)
        assert len(agent.samples("weir_sockets")) <= len(living) + 3
        here.lives(agent)
        assert agent.end() == 0
    here.is_tidy()


def test_more_notifications_than_the_kernel_keeps(here: Node) -> None:
    """The agent sleeps through 20,000 of them, and finds what there is."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    here.site.options["--retain"] = "1s"
    with here.agent() as agent:
        before, room = here.settled(agent), here.room()
        with stopped(agent):
            Storm(here.root).blow(limit // 2 + 1000)
            for name in ("found", "later"):
                here.works(name)
        here.await_exact(agent, "found", "later", "first")
        for name in ("found", "later"):
            here.cgroup(name).rmdir()
        agent.until(lambda: here.room() >= room)
        here.leaks_nothing(agent, before)
        here.lives(agent)


def test_more_refusals_than_events(here: Node, measured: Callable[[str], None]) -> None:
    """Each is counted; what is told of them is bounded, and what is not told is counted too."""
    names = [f"busy-{number}" for number in range(12)]
    each = max(2000, int(20_000 * SCALE))
    with here.agent() as agent:
        before = here.settled(agent)
        cpu = cpu_seconds(agent.process.pid)
        for name in names:
            here.knock(name, each)
        here.await_exact(agent)
        total = here.refusals.total()
        outcomes = ("reported", "suppressed", "lost")
        agent.until(
            lambda: sum(agent.metric("weir_events_total", outcome=outcome) for outcome in outcomes) == total,
            lambda: str(agent.samples("weir_events_total")),
        )
        assert agent.metric("weir_events_total", outcome="suppressed") > 0
        assert agent.metric("weir_refusals_uncounted_total") == 0
        measured(f"{total:,} refusals cost the agent {cpu_seconds(agent.process.pid) - cpu:.2f} s of CPU")
        agent.until(lambda: held(agent.process.pid).memory - before.memory < GROWTH, lambda: held(agent.process.pid))
        here.leaks_nothing(agent, before, watches=len(names))
        here.lives(agent)


def test_events_that_nobody_fetches(here: Node) -> None:
    """The ring is full while the agent sleeps: what it had no room for is told as lost."""
    with here.agent() as agent:
        before = here.settled(agent)
        told = agent.metric("weir_events_total", outcome="reported")
        with stopped(agent):
            for number in range(40):
                here.knock(f"busy-{number}", 100)
        here.await_exact(agent)
        assert agent.metric("weir_events_total", outcome="lost") > 0
        outcomes = ("reported", "suppressed", "lost")
        agent.until(
            lambda: (
                sum(agent.metric("weir_events_total", outcome=outcome) for outcome in outcomes) == here.refusals.total()
            ),
            lambda: str(agent.samples("weir_events_total")),
        )
        assert agent.metric("weir_events_total", outcome="reported") > told
        here.leaks_nothing(agent, before, watches=40)
        here.lives(agent)


def test_killed_at_any_moment(here: Node) -> None:
    """kill -9 under churn, twenty times: every byte and refusal is counted once, and no slot is lost."""
    dice = random.Random(os.environ.get("WEIR_TEST_SEED", "weir"))
    here.site.options["--retain"] = "1h"
    storm, turn, arrived = Storm(here.root), itertools.count(), [here.door.drained() * 0]

    def churn() -> None:
        storm.blow(10, living=3)
        number = next(turn)
        arrived.append(here.door.drained())
        here.works(f"living-{number % 5}")
        here.works(f"short-{number % 60}")
        if number % 3 == 0:
            here.cgroup(f"short-{number % 60}").rmdir()

    began = time.monotonic()
    with here.agent() as agent:
        start = time.monotonic() - began
        agent.end(signal.SIGKILL)
    with started_in(here.cgroup("beat"), here.probe, "beat", str(here.door.port)), meanwhile(churn):
        for _ in range(max(4, int(20 * SCALE))):
            with here.agent(ready=False) as agent:
                time.sleep(start * dice.uniform(0.1, 1.2))  # in the middle of its start, or of its work
                agent.end(signal.SIGKILL)
    here.cgroup("beat").rmdir()
    with here.agent() as agent:
        agent.until(lambda: agent.metric("weir_refused_total") == here.refusals.total())
        here.sent["beat"] = (sum(arrived) + here.door.drained()) * DATAGRAM - here.sent.total()
        assert here.sent["beat"] > 0
        here.await_counted(agent)
        for name in (f"living-{number}" for number in range(5)):
            here.works(name)
        here.await_counted(agent)
        here.lives(agent)
        assert agent.end() == 0
    here.is_tidy()
