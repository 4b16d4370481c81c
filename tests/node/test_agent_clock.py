"""The wall clock is stepped by days: what has a duration does not notice, what has a date has the new one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import pytest

from tests import need
from tests.node.faults import Node, plain_node
from tests.node.probe import Peer, closed

DAYS = 5

SOURCE = r"""
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* The system's clock, ahead by the seconds that are written in a file. Preloaded, for one process: the machine's is left alone. */
static long ahead(void)
{
	int fd = open(getenv("WEIR_TEST_CLOCK"), O_RDONLY | O_CLOEXEC);
	char text[32] = {0};

	if (fd < 0 || read(fd, text, sizeof(text) - 1) < 0)
		abort();
	close(fd);
	return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	int failed = syscall(SYS_clock_gettime, clock, now);

	if (!failed && clock == CLOCK_REALTIME)
		now->tv_sec += ahead();
	return failed;
}

int gettimeofday(struct timeval *now, void *zone)
{
	struct timespec precise;

	clock_gettime(CLOCK_REALTIME, &precise);
	now->tv_sec = precise.tv_sec;
	now->tv_usec = precise.tv_nsec / 1000;
	return 0;
}

time_t time(time_t *now)
{
	struct timespec precise;

	clock_gettime(CLOCK_REALTIME, &precise);
	if (now)
		*now = precise.tv_sec;
	return precise.tv_sec;
}
"""


@dataclass(frozen=True)
class Clock:
    """The clock of the agents that are started with ``prefix``."""

    prefix: tuple[str, ...]
    file: Path

    def step(self, days: int) -> None:
        """So many days ahead of the machine's from now on."""
        new = self.file.with_suffix(".new")
        new.write_text(str(days * 86400))
        new.rename(self.file)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    library = tmp_path / "clock.so"
    command = [need.command("gcc"), "-shared", "-fPIC", "-O", "-x", "c", "-o", str(library), "-"]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    made = Clock(("env", f"LD_PRELOAD={library}", f"WEIR_TEST_CLOCK={tmp_path}/clock"), tmp_path / "clock")
    made.step(0)
    return made


@pytest.fixture(name="here")
def _here(tmp_path: Path, probe: Path, door: Peer, wall: Peer) -> Iterator[Node]:
    with plain_node(tmp_path, probe, door, wall) as made:
        yield made


def test_clock_stepped(here: Node, clock: Clock) -> None:
    here.site.options["--retain"] = "1h"
    with here.agent(prefix=clock.prefix) as agent:
        here.works("gone")
        here.await_exact(agent)
        here.cgroup("gone").rmdir()
        agent.until(lambda: not agent.samples("weir_enforced", cgroup=here.label("gone")))
        for number, days in enumerate((DAYS, -DAYS, 0)):
            clock.step(days)
            here.works(f"web-{number}")
            here.await_exact(agent)
            agent.until(lambda n=number: any(event["cgroup"] == here.label(f"web-{n}") for event in agent.events()))
            event = next(event for event in agent.events() if event["cgroup"] == here.label(f"web-{number}"))
            ahead = datetime.fromisoformat(event["time"]) - datetime.now(timezone.utc)
            assert round(ahead.total_seconds() / 86400) == days
            here.site.write("closed", closed("closed", here.door.port, rule=f"door-{number}"))
            agent.until(lambda n=number: agent.metric("weir_policy_reload_successes_total") == n + 2)
            here.lives(agent)
        agent.ready()
        here.await_exact(agent)


def test_clock_stepped_forgets_in_time(here: Node, clock: Clock) -> None:
    """A container that is gone goes, when the clock has gone back by days."""
    here.site.options["--retain"] = "2s"
    with here.agent(prefix=clock.prefix) as agent:
        room = here.room()
        here.works("gone")
        here.await_exact(agent)
        clock.step(-DAYS)
        here.cgroup("gone").rmdir()
        agent.until(lambda: here.room() >= room)
        assert not agent.samples("weir_egress_bytes_total", cgroup=here.label("gone"))
        here.lives(agent)
