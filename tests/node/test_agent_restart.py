"""The agent ended, killed, started again; what others do beneath it; what is full, gone, missing.

The containers are cgroups with a container's name: what runs in them is this test's, and no runtime is asked.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.kernel import libbpf
from tests import need
from tests.node.agent import PATIENCE, AgentSite, Running, Scrape, agent_site
from tests.node.probe import DATAGRAM, Peer, answers, closed, run_in, started_in

EACCES = 13

SCALE = float(os.environ.get("WEIR_TEST_SCALE", "1"))

RETAIN = 4
"""Seconds for which the gone are shown in the test of that: long enough to be seen, also on a slow machine."""


@pytest.fixture
def site(tmp_path: Path, door: Peer) -> Iterator[AgentSite]:
    need.root()
    with agent_site(tmp_path, f"/weir-test-{os.getpid()}-{secrets.token_hex(3)}") as made:
        made.options = {"--default": "closed"}
        made.write("closed", closed("closed", door.port))
        yield made


class Box:
    """A container's cgroup, and what is done in it."""

    def __init__(self, site: AgentSite, probe: Path, door: Peer, wall: Peer) -> None:
        self.name = secrets.token_hex(32)
        self.label = f"{site.parent}/{self.name}"
        self.path = tree.mount() / self.label.strip("/")
        self.path.mkdir()
        self._probe = probe
        self._ports = {"door": door.port, "wall": wall.port}

    def send(self, count: int) -> None:
        """Send datagrams where the policy allows it."""
        assert run_in(self.path, self._probe, "udp", str(self._ports["door"]), str(count)).returncode == 0

    def refused(self) -> bool:
        """Whether a datagram elsewhere is refused; counts as one refusal."""
        code = run_in(self.path, self._probe, "udp", str(self._ports["wall"])).returncode
        assert code in (0, EACCES)
        return code == EACCES

    def sent(self, agent: Running | Scrape) -> float:
        """Datagrams as the agent's metrics have them."""
        return agent.metric("weir_egress_bytes_total", cgroup=self.label) / DATAGRAM


@pytest.fixture
def box(site: AgentSite, probe: Path, door: Peer, wall: Peer) -> Box:
    return Box(site, probe, door, wall)


def refusals(agent: Running, box: Box) -> float:
    return agent.metric("weir_refused_total", cgroup=box.label)


def known(agent: Running, *boxes: Box) -> None:
    """Wait until containers are found."""
    agent.until(lambda: all(agent.samples("weir_container_policy", cgroup=box.label) for box in boxes))


# The agent's own end


def test_restart_and_kill(site: AgentSite, probe: Path, door: Peer, wall: Peer) -> None:
    """Rules and counters know nothing of it; who is born or dies meanwhile is not lost."""
    old, dying = (Box(site, probe, door, wall) for _ in range(2))
    with site.running() as agent, started_in(old.path, probe, "echo", str(door.port)), door.accept() as connection:
        known(agent, old, dying)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # so that nothing has to be sent again
        assert answers(connection)
        tcp = old.sent(agent) * DATAGRAM
        old.send(5)
        dying.send(6)
        assert old.refused()
        assert agent.end() == 0
        assert 'stopped rules="stay in force"' in site.log.read_text()

        born = Box(site, probe, door, wall)
        old.send(7)
        born.send(2)
        assert old.refused()
        assert born.refused()
        dying.path.rmdir()
        with site.running() as second:
            known(second, old, born)
            assert old.sent(second) == 12 + tcp / DATAGRAM
            assert born.sent(second) == 2
            assert dying.sent(second) == 6
            assert (refusals(second, old), refusals(second, born)) == (2, 1)
            assert second.metric("weir_containers", state="gone") == 1
            old.send(1)
            assert second.end(signal.SIGKILL) == -signal.SIGKILL
            old.send(1)
            assert old.refused()
            orphan = Box(site, probe, door, wall)
            assert orphan.refused()
            with site.running() as third:
                known(third, old, orphan)
                assert old.sent(third) == 14 + tcp / DATAGRAM
                assert dying.sent(third) == 6
                assert (refusals(third, old), refusals(third, orphan)) == (3, 1)
                assert answers(connection)
                # Those that waited in the ring while nobody read it come first.
                third.until(lambda: any(event["cgroup"] == orphan.label for event in third.events()))
                lines = len(third.events())
                assert old.refused()
                third.until(lambda: len(third.events()) > lines)
                assert third.events()[-1]["cgroup"] == old.label


def test_unload_on_exit(site: AgentSite, box: Box) -> None:
    with site.running("--unload-on-exit") as agent:
        known(agent, box)
        assert box.refused()
        assert agent.end() == 0
    assert not box.refused()
    assert not site.weir.place.pins.root.exists()
    assert "stopped rules=removed" in site.log.read_text()
    assert not site.socket.exists()


def test_a_second_agent_is_refused(site: AgentSite, box: Box) -> None:
    with site.running() as agent:
        known(agent, box)
        second = site.start()
        assert second.process.wait(PATIENCE) == 1
        assert f"{site.socket}" in site.log.read_text()
        assert box.refused()
        assert agent.status()["node"]["not_ready"] == []
        box.send(1)
        agent.until(lambda: box.sent(agent) == 1)


# Others at work beneath it


def test_load_and_unload_beneath_it(site: AgentSite, box: Box, probe: Path, door: Peer, wall: Peer) -> None:
    with site.running() as agent:
        known(agent, box)
        box.send(3)
        site.weir.ok("load", "--force")  # the same programs once more, swapped in place
        box.send(4)
        assert box.refused()
        assert box.sent(agent) == 7
        later = Box(site, probe, door, wall)
        known(agent, later)

        site.weir.ok("unload", "--force")
        assert box.refused(), "the agent holds what was pinned"
        agent.until(lambda: "the pins were gone and are back" in site.log.read_text())
        assert site.weir.place.pins.maps.exists()
        agent.ready()
        assert later.refused()
        box.send(2)
        assert box.sent(agent) == 9
        last = Box(site, probe, door, wall)
        known(agent, last)
        lines = len(agent.events())
        agent.until(lambda: last.refused() and len(agent.events()) > lines, lambda: "events have ended")
        assert box.sent(agent) == 9
        assert site.log.read_text().count("programs loaded") == 1
        assert agent.end() == 0
        assert box.refused()


def test_a_link_that_is_gone(site: AgentSite, box: Box) -> None:
    """Detached by force (`bpftool link detach`), or its pin removed: seen at once, and repaired."""
    with site.running() as agent:
        known(agent, box)
        number = tree.cgroup_id(box.path.parent)
        pin = site.weir.place.pins.links / str(number) / "connect4"
        with site.weir.place.locked():
            force_detach(pin)
        agent.until(
            lambda: agent.metric("weir_program_attached") == 10, lambda: str(agent.samples("weir_program_attached"))
        )
        agent.until(box.refused)
        agent.ready()
        pin.unlink()
        agent.until(pin.exists)
        agent.until(box.refused)
        agent.ready()
        box.send(3)
        agent.until(lambda: box.sent(agent) == 3, lambda: f"{box.sent(agent)} datagrams: counted twice?")


def test_a_link_that_is_gone_is_visible_at_once(site: AgentSite, box: Box) -> None:
    site.options["--reconcile"] = "1h"
    with site.running() as agent:
        known(agent, box)
        assert agent.metric("weir_program_attached") == 10
        with site.weir.place.locked():  # or it is repaired before anybody sees it
            force_detach(site.weir.place.pins.links / str(tree.cgroup_id(box.path.parent)) / "connect4")
            assert agent.metric("weir_program_attached", program="connect4", cgroup=site.parent) == 0
        agent.until(lambda: agent.metric("weir_program_attached") == 10)


def force_detach(pin: Path) -> None:
    """What `bpftool link detach` does. With the lock of the place: an agent that looks repairs it."""
    command = [need.command("bpftool"), "link", "detach", "pinned", str(pin)]
    subprocess.run(command, check=True)
    fd = libbpf.obj_get(pin)
    assert libbpf.link_info(fd).cgroup_id == 0
    os.close(fd)


# What there is not


def test_no_managed_parent_yet(site: AgentSite, probe: Path, door: Peer, wall: Peer) -> None:
    root = tree.mount() / site.parent.strip("/")
    root.rmdir()
    agent = site.start()
    try:
        agent.until(lambda: agent.get("/readyz")[0] == 503)
        agent.until(lambda: "no managed parent" in agent.get("/readyz")[1], lambda: agent.get("/readyz")[1])
        assert agent.get("/healthz")[0] == 200
        assert agent.metric("weir_ready") == 0
        assert "no managed parent" in site.weir.ok("status", env=site.environment)
        root.mkdir()
        agent.ready()
        box = Box(site, probe, door, wall)
        assert box.refused()
        known(agent, box)
        assert agent.metric("weir_ready") == 1
    finally:
        agent.end()


def test_full(site: AgentSite, probe: Path, door: Peer, wall: Peer) -> None:
    """The parent and two containers have places; the others are under the parent's policy, and count with it."""
    site.options["--retain"] = "1s"
    with site.running("--max-containers", "4") as agent:
        boxes = [Box(site, probe, door, wall) for _ in range(5)]
        agent.until(lambda: "no place of their own" in agent.get("/readyz")[1], lambda: agent.get("/readyz")[1])
        assert agent.get("/readyz")[0] == 503
        assert "no place of their own" in site.weir.ok("status", env=site.environment)
        assert all(box.refused() for box in boxes)
        for box in boxes:
            box.send(1)
        agent.until(lambda: agent.metric("weir_egress_bytes_total") == 5 * DATAGRAM)
        assert agent.metric("weir_refused_total") == 5
        full = agent.metric("weir_map_entries", map="cgroups")
        assert full <= agent.metric("weir_map_capacity", map="cgroups")
        for box in boxes[:3]:
            box.path.rmdir()
        agent.ready()
        known(agent, *boxes[3:])
        assert all(box.refused() for box in boxes[3:])


# What is gone


def test_a_gone_container_stays_for_a_while(site: AgentSite, box: Box) -> None:
    site.options["--retain"] = f"{RETAIN}s"
    with site.running() as agent:
        known(agent, box)
        box.send(3)
        seen = []

        def look() -> list[tuple[float, float]]:
            """What one page says: how many are gone, and what this one has sent."""
            page = agent.scrape()
            seen.append((page.metric("weir_containers", state="gone"), box.sent(page)))
            return seen

        box.path.rmdir()
        began = time.monotonic()
        agent.until(lambda: look()[-1] == (0, 0), lambda: str(look()))
        assert time.monotonic() - began >= RETAIN
        assert (1, 3) in seen
        assert set(seen) <= {(0, 3), (1, 3), (0, 0)}
        assert not agent.samples("weir_sockets", cgroup=box.label)
        agent.until(lambda: agent.metric("weir_map_entries", map="cgroups") == 1)


def test_churn(site: AgentSite, probe: Path, door: Peer, wall: Peer) -> None:
    """Many containers that live for a moment leave nothing but the series of the living."""
    count = max(20, int(1000 * SCALE))
    site.options |= {"--retain": "1s"}
    with site.running("--no-events") as agent:
        living = [Box(site, probe, door, wall) for _ in range(3)]
        for box in living:
            box.send(1)
        script = (
            'for i in $(seq "$1"); do c=$0/$(printf %064x "$i"); mkdir "$c"; '
            '(echo 0 > "$c/cgroup.procs"; exec "$2" udp "$3"); '
            'until rmdir "$c" 2>/dev/null; do :; done; done'
        )
        command = ["/bin/sh", "-c", script, str(living[0].path.parent), str(count), str(probe), str(door.port)]
        with subprocess.Popen(command) as process:
            while process.poll() is None:
                assert agent.get("/metrics")[0] == 200
                time.sleep(0.2)
        assert process.returncode == 0
        wanted = {site.parent, *(box.label for box in living)}
        agent.until(
            lambda: {labels["cgroup"] for labels, _ in agent.samples("weir_egress_bytes_total")} == wanted,
            lambda: f"{len(agent.samples('weir_sockets'))} are shown",
        )
        assert agent.metric("weir_containers", state="gone") == 0
        assert all(box.sent(agent) == 1 for box in living)
        agent.until(lambda: agent.metric("weir_map_entries", map="cgroups") == 4)
        agent.ready()
