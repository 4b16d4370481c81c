"""A node for tests of faults: an agent's site, plain cgroups as containers, what was sent from them, and what the agent holds.

with plain_node(tmp_path, probe, door, wall) as made, made.agent() as agent:
    made.send("web", 5)
    made.is_refused("web")
    made.await_exact(agent)
    made.is_tidy()
"""

from __future__ import annotations

import re
import secrets
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agent.cgroups import tree
from agent.controller import Controller
from agent.kernel.abi import SPARE, SUM
from agent.kernel.pinned import PinnedKernel
from tests.node.agent import AgentSite, Running, agent_site
from tests.node.probe import DATAGRAM, Peer, closed, run_in

EACCES = 13


@dataclass(frozen=True)
class Held:
    """What a process has of the machine: descriptors, inotify watches, memory in bytes."""

    descriptors: int
    watches: int
    memory: int


def held(pid: int) -> Held:
    """What a process holds now."""
    proc = Path(f"/proc/{pid}")
    watches = 0
    for info in (proc / "fdinfo").iterdir():
        try:
            watches += info.read_text().count("inotify wd:")
        except FileNotFoundError:
            continue  # closed meanwhile
    resident = re.search(r"VmRSS:\s+(\d+) kB", (proc / "status").read_text())
    assert resident, f"process {pid} has ended"
    return Held(len(list((proc / "fd").iterdir())), watches, int(resident[1]) * 1024)


def cpu_seconds(pid: int) -> float:
    """The processor time of a process (proc(5), fields 14 and 15, in ticks of 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@dataclass
class Node:
    """``sent`` are IP bytes by cgroup; ``refusals`` the calls that were refused."""

    site: AgentSite
    probe: Path
    door: Peer
    wall: Peer
    sent: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)

    @property
    def root(self) -> Path:
        """The directory of the managed parent."""
        return self.site.weir.place.root / self.site.parent

    def label(self, name: str) -> str:
        """What metrics call a cgroup."""
        return f"/{self.site.parent}/{name}"

    def cgroup(self, name: str) -> Path:
        """The directory of a cgroup below the managed parent, made when it is not there."""
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def send(self, name: str, count: int = 1) -> None:
        """Send so many datagrams from a cgroup, to the port that the policy allows."""
        done = run_in(self.cgroup(name), self.probe, "udp", str(self.door.port), str(count))
        assert done.returncode == 0, (done.returncode, done.stderr)
        self.sent[name] += count * DATAGRAM

    def is_refused(self, name: str) -> None:
        """Fail unless a connect from a cgroup, to a port that no policy allows, is refused."""
        done = run_in(self.cgroup(name), self.probe, "udp", str(self.wall.port))
        assert done.returncode == EACCES, (done.returncode, done.stderr)
        self.refusals[name] += 1

    def knock(self, name: str, count: int) -> None:
        """So many attempts from a cgroup, as fast as they go; each is refused."""
        done = run_in(self.cgroup(name), self.probe, "knock", str(self.wall.port), str(count))
        assert done.returncode == 0, (done.returncode, done.stderr)
        self.refusals[name] += count

    def works(self, name: str) -> None:
        """What the policy allows is counted, what it does not is refused."""
        self.send(name, 3)
        self.is_refused(name)

    @contextmanager
    def agent(self, *arguments: str, prefix: Sequence[str] = (), ready: bool = True) -> Iterator[Running]:
        """An agent, killed at the end unless it has ended by itself."""
        made = self.site.start(*arguments, prefix=tuple(prefix))
        try:
            if ready:
                made.ready()
            yield made
        finally:
            if made.process.poll() is None:
                made.process.kill()
            made.process.wait()

    def await_exact(self, agent: Running, *names: str) -> None:
        """Every byte and refusal of these cgroups (by default of all) is counted where it belongs, and none twice."""
        for name in names or self.sent.keys() | self.refusals.keys():
            counted = self.counted(agent, name)
            wanted = (self.sent[name], self.refusals[name])
            agent.until(lambda c=counted, w=wanted: c() == w, lambda c=counted, w=wanted: f"counted {c()}, wanted {w}")

    def counted(self, agent: Running, name: str) -> Callable[[], tuple[float, float]]:
        """(Bytes, refusals) of a cgroup, as a scrape has them."""
        label = self.label(name)
        return lambda: (
            agent.metric("weir_egress_bytes_total", cgroup=label),
            agent.metric("weir_refused_total", cgroup=label),
        )

    def await_counted(self, agent: Running) -> None:
        """Every byte and refusal is counted once, with its cgroup or with the parent of that."""
        wanted = (self.sent.total(), self.refusals.total())

        def counted() -> tuple[float, float]:
            return agent.metric("weir_egress_bytes_total"), agent.metric("weir_refused_total")

        agent.until(lambda: counted() == wanted, lambda: f"counted {counted()}, wanted {wanted}")

    def await_reason(self, agent: Running, words: str) -> None:
        """/readyz, /metrics and `weir status` say that something is wrong, in these words."""
        agent.until(lambda: words in agent.get("/readyz")[1], lambda: agent.get("/readyz")[1])
        assert agent.get("/readyz")[0] == 503
        assert agent.metric("weir_ready") == 0
        assert any(words in reason for reason in agent.status()["node"]["not_ready"])

    def lives(self, agent: Running) -> None:
        """The agent runs, and has met no bug."""
        assert agent.process.poll() is None, self.site.log.read_text()[-2000:]
        assert agent.get("/healthz")[0] == 200
        assert self.site.bugs() == []

    def settled(self, agent: Running) -> Held:
        """What an agent holds once it has opened what it opens when it is needed first."""
        self.works("first")
        agent.until(lambda: agent.metric("weir_events_total", outcome="reported") >= 1)
        for _ in range(2):  # after the first look at the pins they are opened once more
            agent.status()
            agent.metric("weir_ready")
        return held(agent.process.pid)

    def leaks_nothing(self, agent: Running, before: Held, watches: int = 0, versions: int = 0) -> None:
        """It comes back to what it held, and a watch for each cgroup more, a descriptor for each policy version more."""

        def now() -> Held:
            return held(agent.process.pid)

        agent.until(
            lambda: now().descriptors <= before.descriptors + versions and now().watches <= before.watches + watches,
            lambda: f"it held {before}, it holds {now()}",
        )

    @contextmanager
    def kernel(self) -> Iterator[PinnedKernel]:
        """The site's tables."""
        made = PinnedKernel(self.site.weir.place.pins)
        try:
            yield made
        finally:
            made.close()

    def room(self) -> int:
        """How many more cgroups can be enrolled."""
        with self.kernel() as kernel:
            return Controller(kernel, self.site.weir.place.root).room()

    def is_tidy(self) -> None:
        """No slot is lost, none is given twice, and no name is kept of what is not enrolled. No agent may run."""
        with self.kernel() as kernel, self.site.weir.place.locked():
            waiting = list(kernel.drain())
            entries, marks = kernel.enrolments(), kernel.slots()
            used = {entry.slot for entry in entries.values()}
            assert len(waiting) == len(set(waiting))
            assert not used & set(waiting)
            assert {slot for slot, mark in marks.items() if mark == SPARE} - used == set(waiting)
            assert {mark & ~SUM for mark in marks.values() if mark != SPARE} <= used, marks
            assert kernel.labels().keys() <= entries.keys()
            assert {entry.policy for entry in entries.values()} <= kernel.versions().keys()
            kernel.stock(waiting)


@contextmanager
def plain_node(folder: Path, probe: Path, door: Peer, wall: Peer, parent: str = "") -> Iterator[Node]:
    """A node under the policy `closed`, which lets through the one port and nothing else.

    ``parent``: the managed parent, by default one of its own.
    """
    with agent_site(folder, parent or f"weir-test-{secrets.token_hex(4)}") as site:
        site.options = {"--default": "closed"}
        site.write("closed", closed("closed", door.port))
        yield Node(site, probe, door, wall)


def ended(agent: Running) -> int:
    """The exit status of an agent that ends by itself."""
    return agent.process.wait(120)


def in_mounts_of(agent: Running, command: str) -> None:
    """Run a shell command among the mounts that an agent sees."""
    subprocess.run(["nsenter", f"--target={agent.process.pid}", "--mount", "sh", "-ec", command], check=True)


@contextmanager
def keeping_mounts_of(agent: Running) -> Iterator[list[str]]:
    """Keep what an agent sees mounted beyond its end; the beginning of a command that sees the same."""
    target = f"--target={agent.process.pid}"
    keeper = subprocess.Popen(["nsenter", target, "--mount", "sleep", "infinity"])
    try:
        while Path(f"/proc/{keeper.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.01)
        yield ["nsenter", f"--target={keeper.pid}", "--mount"]
    finally:
        keeper.kill()
        keeper.wait()


@contextmanager
def stopped(agent: Running) -> Iterator[None]:
    """The agent does not run meanwhile (SIGSTOP)."""
    agent.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        agent.process.send_signal(signal.SIGCONT)


def id_of(path: Path) -> int:
    """A cgroup's id."""
    return tree.cgroup_id(path)
