"""Figures → RESULTS.md."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from tests.bench.clients import WORKLOADS, Samples
from tests.bench.figures import BARE, EMPTY, OUTSIDE, figure, weir
from tests.bench.once import Cost, middle
from tests.bench.place import PREFIXES

FILE = Path(__file__).with_name("RESULTS.md")

HEAD = """\
# What weir costs

Written by `make bench`. {when}, Linux {kernel}, {cores} cores of {model}, load average {load}; {turns} turns for each number.

Nanoseconds of CPU time for one operation of a C client (`client.c`), server included where there is one, all on one core;
time that other processes take does not count. The ways to run follow each other in random order every few milliseconds,
with fresh processes in each round; *added* is the median of the differences to the way without weir in the same turn, with
twice its standard error; *to floor* is that divided by what the empty programs add. "Without weir" runs with nothing of
ours attached anywhere. "Empty programs" are `return 1` on every hook that weir uses. Datagrams leave by a link whose other
end is down: the device drops them after every hook has run, so no receiver is measured. TCP goes over a veth pair to a
server outside the cgroup, which takes the connections after each batch, so that no wake-up is measured. Destinations are
allowed by the last word of the policy, its default. The prefixes are denied ones; half lie close around the destinations.
The programs, weir's and the empty ones, are compiled and loaded {loads} times: where one load puts the code in memory makes
up to 30 ns of difference for the same program.

Budgets: added to floor at most 1.5 (aim 1.25); a stream at most 1.01 times (throughput 0.99); 100,000 prefixes at most 1.1
times what 10 cost; outside no measurable cost.
"""

AGENT = """\
`weir agent` as it is installed, on a node of made-up pods: real cgroups as CRI-O lays them out, one container in each, named
by a CRI of the tests' own. So 1,000 containers are 2,001 entries, those of the pods and of the managed parent among them.
Scrapes ask as Prometheus does, for gzip. CPU is that of the whole process, all threads.

"""

TAIL = """
## What stands in the way of a budget

- **TCP connect.** Most of what weir adds is the memory of a socket's owner: making its sk_storage in sock_create takes some
  800 ns, freeing it some 290 (run times of the programs by bpf_stats, and perf). Without it the packets took longer (egress 204
  against 140 ns); a hash keyed by socket cookie cost as much (509 to make, 265 to free); an array indexed by cookie took
  292, but two sockets can meet in one place, and then the owner of one is unknown. So it stays: nothing else is freed with the
  socket, never full, and never another's.
- **Connected send.** Two helper calls for each packet (whose socket is it; is it a full socket). Empty programs make none.
- **Scattered destinations.** Each new UDP peer is written to the list of peers whose answers may come in.
- **Outside.** Once a sendmsg program is attached anywhere, the kernel takes the socket's lock for each unconnected send of
  the whole host (BPF_CGROUP_RUN_SA_PROG_LOCK, include/linux/bpf-cgroup.h). Empty programs cost the same.
- **The agent, scraped.** 1,000 containers and their pods are 26,000 samples, and prometheus_client's own writing of as many
  ready-made ones takes more than half of what a scrape costs.
- **Births among 1,000.** 20 ms go by so that what comes together is looked at together, then all entries are compared. The
  container is under its parent's policy, and counted, all the while: its first socket enrols it in the kernel.
"""


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def text(samples: Samples, costs: Sequence[Cost], of_agent: Sequence[Cost], loads: int) -> str:
    """The whole file."""
    turns = len(next(iter(samples.values())))
    parts = [
        HEAD.format(
            when=datetime.date.today().isoformat(),
            kernel=platform.release(),
            cores=os.cpu_count(),
            model=processor(),
            load=f"{os.getloadavg()[0]:.1f}",
            turns=turns,
            loads=loads,
        )
    ]
    for workload in WORKLOADS:
        parts.append(
            f"\n## {workload.name}\n\n| way to run | median | min to max | added | ratio | to floor |\n|---|---|---|---|---|---|\n"
        )
        for arm in (BARE, OUTSIDE, EMPTY, *(weir(prefixes) for prefixes in PREFIXES)):
            f = figure(samples, workload.name, arm)
            row = f"| {arm} | {f.median:,.0f} | {f.least:,.0f} to {f.most:,.0f} |"
            compared = "| | |" if arm == BARE else f" {f.added:+,.0f} ± {f.error:,.0f} | {f.ratio:.3f} |"
            to_floor = "|" if arm in (BARE, OUTSIDE) else f" {f.to_floor:.2f} |"
            parts.append(f"{row}{compared}{to_floor}\n")
        few, many = (figure(samples, workload.name, weir(n)).median for n in (PREFIXES[0], PREFIXES[-1]))
        parts.append(f"\nGrowth from {PREFIXES[0]} to {PREFIXES[-1]:,} prefixes: {many / few:.3f} times.\n")
    parts.append(table("Paid once", costs))
    parts.append(table("The agent", of_agent, AGENT))
    return "".join([*parts, TAIL])


def table(title: str, costs: Sequence[Cost], remarks: str = "") -> str:
    """One section of costs."""
    rows = "".join(f"| {cost.name} | {middle(cost)} | {cost.note} |\n" for cost in costs)
    return f"\n## {title}\n\n{remarks}| what | median (min to max) | |\n|---|---|---|\n{rows}"
