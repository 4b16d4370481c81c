"""Containers whose first act is forbidden, while the agent comes, goes and changes: none gets through, none is uncounted."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from agent.node.naming import Naming
from tests.kernel.test_upgrade import make_old
from tests.node import images, remains
from tests.node.agent import AgentSite, Running, agent_site
from tests.node.containerd import Containerd
from tests.node.kubelet import Kubelet
from tests.node.oneshot import IP_UDP, KINDS, PROGRAM, REFUSED, SOURCE, THROUGH, Crowd, Door, attempt, door
from tests.node.runc import Runc

SCALE = float(os.environ.get("WEIR_TEST_SCALE", "1"))
ATTEMPTS = max(50, int(1000 * SCALE))
SENDERS = max(6, int(60 * SCALE))
PODS = max(5, int(20 * SCALE))

BY_RULE = """\
  egress:
    - {name: shut, action: deny, to: [127.0.0.1], ports: [PORT]}
  default: allow
"""
BY_DEFAULT = """\
  egress:
    - {name: other, action: allow, to: [127.0.0.2]}
  default: deny
"""
OPEN = "  default: allow\n"
HEAD = """\
apiVersion: weir.dev/v1
kind: SocketPolicy
metadata: {name: NAME}
spec:
  sockets: {families: [inet, inet6, unix], protocols: [tcp, udp], listen: deny, bind: deny, transfer: deny}
"""


def policy(name: str, egress: str, port: int = 0) -> str:
    """A policy file."""
    return HEAD.replace("NAME", name) + egress.replace("PORT", str(port))


@pytest.fixture
def opened() -> Iterator[Door]:
    with door() as made:
        yield made


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.compiled(SOURCE, tmp_path_factory.mktemp("once") / "once")


@pytest.fixture
def runc(tmp_path: Path, program: Path) -> Iterator[Runc]:
    made = Runc(tmp_path, f"/weir-test-{secrets.token_hex(4)}", {PROGRAM: program})
    yield made
    made.remove()


@pytest.fixture
def site(tmp_path: Path, runc: Runc) -> Iterator[AgentSite]:
    with agent_site(tmp_path, runc.cgroup("")) as made:
        made.options = {"--default": "first", "--retain": "24h"}
        yield made


class Turmoil:
    """An agent that is started, killed, upgraded and so on while containers come and go.

    ``early`` is how many refusals were counted with the parent when the first agent was ready.
    """

    def __init__(self, site: AgentSite, crowd: Crowd, port: int) -> None:
        self._site = site
        self._crowd = crowd
        self._texts = [policy("first", egress, port) for egress in (BY_RULE, BY_DEFAULT)]
        self._refused = 0.0
        self._agent: Running | None = None
        self.early: int | None = None
        self.write()

    def write(self) -> None:
        """Write the other policy."""
        self._texts.reverse()
        self._site.write("first", self._texts[0])

    def start(self) -> Running:
        """Start an agent and wait until it is ready."""
        self._agent = self._site.start()
        self._agent.ready()
        if self.early is None:
            self.early = by_cgroup(self._agent, "weir_refused_total")[f"/{self._site.parent.strip('/')}"]
        return self._agent

    def switch(self) -> None:
        """Write the other policy and wait until it is in force."""
        assert self._agent
        agent, before = self._agent, self._agent.samples("weir_policy_info")
        self.write()
        agent.until(lambda: agent.samples("weir_policy_info") != before)

    def replace(self) -> None:
        """Load the programs once more, in place."""
        self._site.weir.ok("load", "--force")

    def upgrade(self) -> None:
        """Let the next agent find the pins of an older ABI."""
        pins = self._site.weir.place.pins
        pins.base.rename(pins.root / "abi-1")

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the agent, if there is one."""
        if self._agent:
            self._agent.end(number)
            self._agent = None

    def go_on_until(self, enough: threading.Event) -> None:
        """Do everything that can happen to an agent, one after the other, and again while there is not enough.

        After each step a container lives its whole life in what the step has left.
        """
        steps = (
            *(self.start, self.switch, self.replace, self.switch, self.end, self.write),
            *(self.start, self.switch, lambda: self.end(signal.SIGTERM), self.upgrade),
            *(self.start, self.replace, self.end),
        )
        for number, step in enumerate(itertools.cycle(steps)):
            if number >= len(steps) and enough.is_set():
                return
            step()
            self._crowd.await_more()
            if self._agent:
                self._count(self._agent)

    def _count(self, agent: Running) -> None:
        """What is counted never falls, over all agents, and is never more than was tried."""
        counted = agent.metric("weir_refused_total")
        assert self._refused <= counted <= len(self._crowd.ends) + self._crowd.at_once
        self._refused = counted


def by_cgroup(agent: Running, name: str, **labels: str) -> Counter[str]:
    """A counter's sum for each cgroup; those that are gone without having been seen are told apart by their ids."""
    found: Counter[str] = Counter()
    for sample, value in agent.samples(name, **labels):
        found[sample["cgroup"]] += int(value)
    return found


def test_nothing_gets_through(site: AgentSite, runc: Runc, opened: Door) -> None:
    before = Crowd(runc, lambda number: attempt(KINDS[number % 2], opened.port), "before")
    before.run(10)
    assert set(before.ends) == {THROUGH}, before.complaints
    arrived = opened.arrived()
    assert all(arrived[kind] for kind in KINDS)
    assert arrived.total() == len(before.ends)

    crowd = Crowd(runc, lambda number: attempt(KINDS[number % 2], opened.port))
    turmoil = Turmoil(site, crowd, opened.port)
    # An older weir's ABI had no spare slots: what is born under it is refused, and counts with the parent.
    site.weir.ok("attach", site.weir.place.root / site.parent.strip("/"), "--policy", site.policies / "first.yaml")
    make_old(site.weir)
    try:
        with crowd.running(ATTEMPTS) as enough:
            crowd.await_more()
            turmoil.go_on_until(enough)
        turmoil.end()
        agent = turmoil.start()
        assert Counter(crowd.ends) == {REFUSED: len(crowd.ends)}, crowd.complaints
        assert len(crowd.ends) >= ATTEMPTS
        assert not opened.arrived()
        assert agent.metric("weir_refusals_uncounted_total") == 0
        refused = by_cgroup(agent, "weir_refused_total")
        assert refused.total() == len(crowd.ends)
        with_the_parent = refused.pop(f"/{site.parent.strip('/')}")
        assert set(refused.values()) == {1}
        # An agent that starts takes the spare slots back for a moment; else each container has its own counters.
        assert turmoil.early
        assert with_the_parent - turmoil.early < len(refused) / 4
    finally:
        turmoil.end()


def test_what_is_sent_while_nobody_looks(site: AgentSite, runc: Runc, opened: Door) -> None:
    """Each container sends another number of bytes, and one of each crowd is still there when the agent comes back."""
    site.write("first", policy("first", OPEN))
    with site.running() as agent:
        agent.end(signal.SIGKILL)
    expected: list[int] = []
    for ending in (signal.SIGKILL, signal.SIGTERM, signal.SIGTERM):
        first = 100 + len(expected)

        def command(number: int, first: int = first) -> list[str]:
            return attempt("udp", opened.port, 1 + number % 3, first + number)

        crowd = Crowd(runc, command, f"sends-{first}")
        crowd.run(SENDERS)
        assert set(crowd.ends) == {THROUGH}, crowd.complaints
        expected += [(1 + number % 3) * (first + number + IP_UDP) for number in range(len(crowd.ends))]
        opened.arrived()
        stays = f"stays-{first}"
        with runc.started(stays, attempt("udp", opened.port, 1, 9000 + first, "stay")):
            remains.wait("its datagram", lambda: bool(opened.arrived()))
            expected.append(9000 + first + IP_UDP)
            with site.running() as agent:
                sent = by_cgroup(agent, "weir_egress_bytes_total", destination="loopback")
                assert sent[runc.cgroup(stays)] == expected[-1]
                assert sent.pop(f"/{site.parent.strip('/')}") == 0
                assert sorted(sent.values()) == sorted(expected)
                agent.end(ending)


@pytest.fixture
def pods(tmp_path: Path, node: Containerd, opened: Door) -> Iterator[AgentSite]:
    """A site whose default policy opens the door, and whose policy `strict` does not."""
    with agent_site(tmp_path, node.cgroups) as made:
        made.options = {"--cri": str(node.socket), "--default": "first"}
        made.write("first", policy("first", OPEN))
        made.write("strict", policy("strict", BY_RULE, opened.port))
        yield made


def test_a_pods_first_instruction_is_under_the_pods_policy(
    pods: AgentSite, node: Containerd, kubelet: Kubelet, program: Path, opened: Door
) -> None:
    """Once the agent has seen the sandbox, its containers start under the annotation's policy, also while the agent sleeps."""
    image = node.image("weir.test/once:1", {PROGRAM: program})
    with pods.running() as agent:
        for number in range(PODS):
            pod = kubelet.pod("shop", f"web-{number}", annotations={"weir.dev/policy": "strict"})
            seen = {"policy": "strict", "cgroup": pod.cgroup}
            agent.until(lambda seen=seen: agent.samples("weir_container_policy", **seen))
            with asleep(agent) if number % 4 > 1 else nullcontext():
                job = kubelet.container(pod, "job", image, attempt(KINDS[number % 2], opened.port))
                assert kubelet.wait(job) == REFUSED, number
            kubelet.remove_pod(pod)
        assert not opened.arrived()
        agent.until(lambda: agent.metric("weir_containers", state="running") == 0)
        assert agent.metric("weir_refused_total") == PODS
        plain = kubelet.pod("shop", "plain")
        assert kubelet.wait(kubelet.container(plain, "job", image, attempt("tcp", opened.port))) == THROUGH
        kubelet.remove_pod(plain)


@contextmanager
def asleep(agent: Running) -> Iterator[None]:
    """An agent that does nothing until the end of the `with`."""
    agent.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        agent.process.send_signal(signal.SIGCONT)


def test_a_name_that_comes_late_is_asked_for_again(node: Containerd, kubelet: Kubelet) -> None:
    """One look misses the pod's name, and nothing makes the agent look again until the runtime has it."""
    uid, arrived = str(uuid.uuid4()), threading.Event()
    naming = Naming([node.socket], 3600, arrived.set)
    naming.start()
    try:
        remains.wait("the first answer", lambda: not naming.problem)
        assert naming.pod(uid) is None
        naming.miss()
        time.sleep(0.5)
        arrived.clear()
        pod = kubelet.pod("shop", "late", uid=uid)
        assert arrived.wait(60)
        remains.wait("the name", lambda: naming.pod(uid) is not None)
        kubelet.remove_pod(pod)
    finally:
        naming.stop()
