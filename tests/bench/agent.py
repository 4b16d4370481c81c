"""What the agent itself costs: memory, idle CPU, a policy's change, births. Prints its rows of RESULTS.md.

.venv/bin/python -m tests.bench.agent
"""

from __future__ import annotations

import compileall
import os
import time
from pathlib import Path
from urllib.request import Request, urlopen

from agent.kernel.pinned import PinnedKernel
from tests.bench import births, results, scrape
from tests.bench.node import POLICY, Node, node
from tests.bench.once import Cost, kilobytes
from tests.bench.place import own_place
from tests.kernel.site import ROOT
from tests.node.agent import PATIENCE, Running

PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "Accept-Encoding": "gzip",
}
"""What Prometheus sends, shortened."""

INTERVAL = 15.0
"""Seconds between scrapes."""


def scraped(agent: Running) -> int:
    """Bytes of a scrape's answer, as Prometheus asks for it."""
    with urlopen(Request(f"http://127.0.0.1:{agent.port}/metrics", headers=PROMETHEUS)) as answer:
        return len(answer.read())


def cpu(pid: int) -> float:
    """Seconds that a process has had of any CPU, ended threads included (proc_pid_stat(5): utime, stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(agent: Running, containers: int, note: str = "") -> Cost:
    """After some scrapes; by then nothing grows any more."""
    for _ in range(5):
        scraped(agent)
    rss, pss = kilobytes(agent.process.pid)
    return Cost(
        f"resident with {containers:,} containers, RSS",
        (rss,),
        "MB",
        ", ".join(filter(None, (f"PSS {pss:.1f} MB", note))),
    )


def idle(agent: Running, containers: int, seconds: float, *, scrapes: bool) -> Cost:
    """Nothing happens on the node; whole looks at it, and questions to the CRI, are part of it."""
    pid, began, before, due = agent.process.pid, time.monotonic(), cpu(agent.process.pid), 0.0
    while (now := time.monotonic()) - began < seconds:
        if scrapes and now >= due:
            scraped(agent)
            due = now + INTERVAL
        time.sleep(min(0.1, seconds))
    share = 100 * (cpu(pid) - before) / (time.monotonic() - began)
    what = f"a scrape every {INTERVAL:g} s" if scrapes else "no scrape"
    return Cost(
        f"idle with {containers:,} containers, {what}", (share,), "% of a core", "" if scrapes else "budget 0.5"
    )


def reload(made: Node, times: int) -> list[Cost]:
    """A policy file changes, and every container is switched to its new version."""
    kernel = PinnedKernel(made.site.weir.place.pins)
    whole, switch = [], []
    try:
        for turn in range(times):
            old = set(kernel.versions())
            began, first = time.perf_counter(), 0.0
            made.site.write("appengine", POLICY.replace("ports: [25]", f"ports: [25, {1000 + turn}]"))
            while time.perf_counter() - began < PATIENCE:
                used = {entry.policy for entry in kernel.enrolments().values()}
                now = time.perf_counter()
                first = first or (now if used - old else 0.0)
                if first and not used & old:
                    break
                time.sleep(0.002)
            else:
                raise AssertionError("the policy was not taken up")
            whole.append((now - began) * 1000)
            switch.append((now - first) * 1000)
            time.sleep(0.5)
    finally:
        kernel.close()
    number = len(made.made)
    return [
        Cost(f"hot reload for {number:,} containers: file written to the last one switched", tuple(whole), "ms"),
        Cost("of this: the first container switched to the last", tuple(switch), "ms", "budget 100 for 1,000"),
    ]


def costs(containers: int = 1000, many: int = 10_000, seconds: float = 60.0, times: int = 200) -> list[Cost]:
    """Every row. The agent's modules are compiled first, as they are where it is installed."""
    compileall.compile_dir(ROOT / "agent", quiet=2)
    rows = []
    with node(0, retain="1s") as made:
        made.tell(births.coming(0, times))
        with made.running() as agent:
            rows.append(resident(agent, 0))
            rows.append(births.to_entry(made, times))
    with node(containers, retain="1s") as made:
        made.tell(births.coming(containers, times))
        made.site.write(births.OWN, POLICY.replace("name: appengine", f"name: {births.OWN}"))
        with made.running() as agent:
            rows.append(resident(agent, containers, "budget 48"))
            rows += [idle(agent, containers, seconds, scrapes=scrapes) for scrapes in (False, True)]
            rows += reload(made, max(1, min(5, times // 20)))
            rows.append(births.to_entry(made, times))
            rows.append(births.to_own_policy(made, max(1, times // 4)))
    rows += births.first_socket(own_place(), times)
    rows += scrape.costs(own_place(), many)
    return rows


def main() -> None:
    """Print the section."""
    print(results.table("The agent", costs(), results.AGENT))


if __name__ == "__main__":
    main()
