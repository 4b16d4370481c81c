"""What is around the agent fails: the runtime, bpffs, another agent, the clock. Rules stay, counts stay, it is told."""

from __future__ import annotations

import secrets
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

from agent.kernel.pins import Pins
from tests import need
from tests.kernel.prefixes import without
from tests.node.containerd import Containerd
from tests.node.faults import Node, ended, in_mounts_of, keeping_mounts_of, plain_node
from tests.node.kubelet import Kubelet
from tests.node.probe import Peer, closed

DAYS = 5


@pytest.fixture(name="here")
def _here(tmp_path: Path, probe: Path, door: Peer, wall: Peer) -> Iterator[Node]:
    with plain_node(tmp_path, probe, door, wall) as made:
        yield made


@pytest.fixture
def elsewhere(here: Node, tmp_path: Path) -> Iterator[tuple[Node, str]]:
    """A node whose pins are on a bpffs that only the agent sees, and its directory."""
    weir = here.site.weir
    (tmp_path / "bpf").mkdir()
    here.site.weir = replace(weir, place=replace(weir.place, pins=Pins(tmp_path / "bpf/weir")))
    yield here, str(tmp_path / "bpf")
    here.site.weir = weir


def test_bpffs_unmounted(elsewhere: tuple[Node, str]) -> None:
    """The agent holds the rules without their pins, says that they hang by it, and pins them when it can."""
    here, bpffs = elsewhere
    with here.agent(prefix=without(f"mount -t bpf bpf {bpffs}")) as agent:
        here.works("web")
        here.await_exact(agent)
        before = here.settled(agent)
        for _ in range(2):
            in_mounts_of(agent, f"umount --lazy {bpffs}")
            here.await_reason(agent, "is not on a BPF file system")
            here.lives(agent)
            assert agent.metric("weir_enforced", layer="hooks", cgroup=here.label("web")) == 1
            here.works("web")
            here.works("born-meanwhile")
            here.await_exact(agent, "web")
            in_mounts_of(agent, f"mount -t bpf bpf {bpffs}")
            agent.ready()
            in_mounts_of(agent, f"test -e {bpffs}/weir/abi-*/maps/config -a -e {bpffs}/weir/abi-*/links/*/connect4")
            here.works("web")
            here.works("born-later")
            here.await_exact(agent)
        here.leaks_nothing(agent, before, watches=2)
        with keeping_mounts_of(agent) as inside:
            # What was pinned again is what is in force: it outlives the agent.
            agent.end(signal.SIGKILL)
            here.is_refused("web")
            here.is_refused("born-after-it")
            with here.agent(prefix=inside) as again:
                here.works("web")
                here.await_exact(again)
                here.lives(again)


def test_containerd_killed(
    tmp_path: Path, node: Containerd, kubelet: Kubelet, probe: Path, door: Peer, wall: Peer
) -> None:
    """Names come from what it said last, then from the next one; rules and counts need none."""
    with plain_node(tmp_path, probe, door, wall, f"{node.cgroups.strip('/')}/kubepods") as here:
        here.site.options["--cri"] = str(node.socket)
        before, after = kubelet.pod("shop", "before-0"), None
        main = kubelet.container(before, "main")
        name = kubelet.cgroup(main).removeprefix(here.label(""))
        with here.agent() as agent:
            who = {"namespace": "shop", "pod": "before-0", "container": "main"}
            agent.until(lambda: agent.samples("weir_egress_bytes_total", **who))
            size = here.settled(agent)
            try:
                node.kill()
                agent.until(lambda: agent.metric("weir_cri_up") == 0)
                assert agent.status()["node"]["cri"]
                here.works(name)
                here.works("without-a-name")
                here.await_exact(agent)
                assert agent.metric("weir_egress_bytes_total", **who) == here.sent[name]
                assert agent.get("/readyz")[0] == 200
            finally:
                node.start()
            agent.until(lambda: agent.metric("weir_cri_up") == 1)
            after = kubelet.pod("shop", "after-0")
            agent.until(lambda: agent.samples("weir_egress_bytes_total", pod="after-0"))
            here.lives(agent)
            here.leaks_nothing(agent, size, watches=2)
        for pod in (before, after):
            kubelet.remove_pod(pod)


def test_cri_hangs(here: Node, tmp_path: Path) -> None:
    """Containers that nobody names come and go under their policy."""
    here.site.options |= {"--cri": str(tmp_path / "cri"), "--retain": "1s"}
    names = [f"cri-containerd-{secrets.token_hex(32)}.scope" for _ in range(8)]
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "cri"))
        silent.listen(1)
        with here.agent() as agent:
            assert agent.metric("weir_cri_up") == 0
            before = here.settled(agent)
            room = here.room()
            for name in names:
                here.works(name)
            here.await_exact(agent)
            for name in names:
                here.cgroup(name).rmdir()
            agent.until(lambda: here.room() >= room, lambda: f"{here.room()} of {room}")
            here.works("last")
            here.await_exact(agent, "last")
            here.lives(agent)
            here.leaks_nothing(agent, before, watches=1)
            assert agent.end() == 0
    here.is_tidy()


def test_two_agents(here: Node) -> None:
    """The second ends and says why. With a socket of its own it does no harm."""
    with here.agent() as first:
        here.works("web")
        with here.agent(ready=False) as second:
            assert ended(second) == 1
        assert "weir: another agent listens at" in here.site.log.read_text()
        here.site.options["--socket"] = str(here.site.folder / "run2/agent.sock")
        with here.agent(ready=False) as third:
            third.until(lambda: "another process reads the events already" in third.get("/readyz")[1])
            for name in ("web", "new"):
                here.works(name)
            here.await_exact(first)
            here.await_exact(third)
            here.lives(third)
            assert third.end() == 0
        here.works("web")
        here.works("newer")
        here.await_exact(first)
        del here.site.options["--socket"]
        here.lives(first)
        assert first.end() == 0
    here.is_tidy()


def test_pins_of_another_version(here: Node) -> None:
    with here.agent() as agent:
        here.works("web")
        assert agent.end() == 0
    pins = here.site.weir.place.pins
    pins.base.rename(pins.root / "abi-99")
    with here.agent(ready=False) as agent:
        assert ended(agent) == 1
    assert "another version of weir (abi-99)" in here.site.log.read_text()
    here.works("web")
    (pins.root / "abi-99").rename(pins.base)
    with here.agent() as agent:
        here.await_exact(agent)
        here.lives(agent)


@pytest.fixture
def library() -> Path:
    """What makes another clock of the system's, for one process."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        need.skip("needs the package faketime")
    return found[0]


def test_clock_stepped(here: Node, tmp_path: Path, library: Path) -> None:
    """By days, forwards and backwards. What has a duration does not notice; what has a date has the new one."""
    clock = tmp_path / "clock"
    clock.write_text("+0d")
    fake = ["env", f"LD_PRELOAD={library}", f"FAKETIME_TIMESTAMP_FILE={clock}", "FAKETIME_NO_CACHE=1"]
    fake += ["FAKETIME_DONT_FAKE_MONOTONIC=1", "NO_FAKE_STAT=1"]
    here.site.options["--retain"] = "1h"
    with here.agent(prefix=fake) as agent:
        here.works("gone")
        here.await_exact(agent)
        here.cgroup("gone").rmdir()
        agent.until(lambda: not agent.samples("weir_enforced", cgroup=here.label("gone")))
        for number, days in enumerate((DAYS, -DAYS, 0)):
            clock.write_text(f"{days:+}d")
            here.works(f"web-{number}")
            here.await_exact(agent)
            agent.until(lambda n=number: any(event["cgroup"] == here.label(f"web-{n}") for event in agent.events()))
            event = next(event for event in agent.events() if event["cgroup"] == here.label(f"web-{number}"))
            ahead = datetime.fromisoformat(event["time"]) - datetime.now(timezone.utc)
            assert round(ahead.total_seconds() / 86400) == days
            here.site.write("closed", closed("closed", here.door.port, rule=f"door-{number}"))
            agent.until(lambda n=number: agent.metric("weir_policy_reload_successes_total") == n + 2)
            here.lives(agent)
        assert agent.get("/readyz")[0] == 200
        here.await_exact(agent)


def test_clock_stepped_forgets_in_time(here: Node, tmp_path: Path, library: Path) -> None:
    """A container that is gone goes, when the clock has gone back by days."""
    clock = tmp_path / "clock"
    clock.write_text("+0d")
    fake = ["env", f"LD_PRELOAD={library}", f"FAKETIME_TIMESTAMP_FILE={clock}", "FAKETIME_NO_CACHE=1"]
    here.site.options["--retain"] = "2s"
    with here.agent(prefix=[*fake, "FAKETIME_DONT_FAKE_MONOTONIC=1", "NO_FAKE_STAT=1"]) as agent:
        room = here.room()
        here.works("gone")
        here.await_exact(agent)
        clock.write_text(f"-{DAYS}d")
        here.cgroup("gone").rmdir()
        agent.until(lambda: here.room() >= room)
        assert not agent.samples("weir_egress_bytes_total", cgroup=here.label("gone"))
        here.lives(agent)
