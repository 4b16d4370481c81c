"""Runtimes without a CRI, older and younger than the agent; and the layouts of others, made by hand.

All paths are those of the cgroup2 tree (the line 0:: of /proc/PID/cgroup), also where the host has cgroup v1 beside it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.cgroups import tree
from tests import need
from tests.node import remains
from tests.node.agent import AgentSite, Running, agent_site
from tests.node.podman import podman
from tests.node.probe import DATAGRAM, Peer, closed, run_in
from tests.node.runc import Runc

EACCES = 13

POD = "0f3a5b1c-2d4e-4f60-8a9b-1c2d3e4f5a6b"


@dataclass(frozen=True)
class Before:
    """What runs before the agent starts."""

    parent: str
    runc: Runc
    cgroups: dict[str, str]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, probe: Path) -> Iterator[Before]:
    need.root()
    parent = f"/weir-test-{os.getpid()}-{secrets.token_hex(3)}"
    runc = Runc(tmp_path_factory.mktemp("runc"), parent, {"/bin/probe": probe})
    with runc.started("early") as pid, podman(tmp_path_factory.mktemp("podman"), f"{parent}-podman") as container:
        yield Before(parent, runc, {"runc": remains.cgroup_of(pid), "podman": container.cgroup})
    remains.remove_cgroups(parent)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, before: Before, door: Peer, wall: Peer) -> Iterator[AgentSite]:
    with agent_site(tmp_path_factory.mktemp("site"), before.parent) as made:
        made.options = {"--default": "closed"}
        made.write("closed", closed("closed", door.port))
        made.write("tenant", closed("tenant", wall.port, "{cgroups: ['*/tenant-*']}"))
        yield made


@pytest.fixture(scope="module")
def agent(site: AgentSite) -> Iterator[Running]:
    with site.running("--root", f"{site.parent.strip('/')}-*") as made:
        yield made


def directory(cgroup: str) -> Path:
    return tree.mount() / cgroup.strip("/")


def is_ruled(agent: Running, cgroup: str, probe: Path, door: Peer, wall: Peer) -> None:
    """One datagram leaves, one is refused, both are counted under the cgroup's own path."""
    agent.until(lambda: agent.samples("weir_enforced", layer="hooks", cgroup=cgroup), lambda: str(agent.status()))
    assert agent.metric("weir_enforced", layer="hooks", cgroup=cgroup) == 1
    sent, refused = (
        agent.metric("weir_egress_bytes_total", cgroup=cgroup),
        agent.metric("weir_refused_total", cgroup=cgroup),
    )
    assert run_in(directory(cgroup), probe, "udp", str(door.port)).returncode == 0
    assert run_in(directory(cgroup), probe, "udp", str(wall.port)).returncode == EACCES
    assert agent.metric("weir_egress_bytes_total", cgroup=cgroup) == sent + DATAGRAM
    assert agent.metric("weir_refused_total", cgroup=cgroup) == refused + 1


def row(agent: Running, cgroup: str) -> dict[str, object]:
    """What `weir status` says of a cgroup; empty when it does not say anything."""
    return next((item for item in agent.status()["cgroups"] if item["cgroup"] == cgroup), {})


@pytest.mark.parametrize("runtime", ["runc", "podman"])
def test_older_than_the_agent(
    agent: Running, before: Before, runtime: str, probe: Path, door: Peer, wall: Peer
) -> None:
    is_ruled(agent, before.cgroups[runtime], probe, door, wall)


def test_runc(agent: Running, before: Before, probe: Path, door: Peer, wall: Peer) -> None:
    with before.runc.started("late") as pid:
        cgroup = remains.cgroup_of(pid)
        is_ruled(agent, cgroup, probe, door, wall)
        sent = agent.metric("weir_egress_bytes_total", cgroup=cgroup)
        assert before.runc.exec("late", ["/bin/probe", "udp", str(door.port), "4"]).returncode == 0
        assert before.runc.exec("late", ["/bin/probe", "udp", str(wall.port)]).returncode == EACCES
        assert agent.metric("weir_egress_bytes_total", cgroup=cgroup) == sent + 4 * DATAGRAM


def test_its_own_policy_by_its_cgroup(agent: Running, before: Before, door: Peer, wall: Peer) -> None:
    with before.runc.started("tenant-1") as pid:
        cgroup = remains.cgroup_of(pid)
        agent.until(lambda: agent.samples("weir_container_policy", policy="tenant", cgroup=cgroup))
        assert before.runc.exec("tenant-1", ["/bin/probe", "udp", str(wall.port)]).returncode == 0
        assert before.runc.exec("tenant-1", ["/bin/probe", "udp", str(door.port)]).returncode == EACCES


def test_one_shot(agent: Running, before: Before, door: Peer, wall: Peer) -> None:
    """Gone before anybody looked: ruled all the same, and counted."""
    sent, refused = agent.metric("weir_egress_bytes_total"), agent.metric("weir_refused_total")
    command = f"probe udp {door.port} 3; probe udp {wall.port}; exit $?"
    assert before.runc.run("shot", ["/bin/sh", "-c", command]).returncode == EACCES
    agent.until(lambda: agent.metric("weir_egress_bytes_total") == sent + 3 * DATAGRAM)
    assert agent.metric("weir_refused_total") == refused + 1


def test_podman(agent: Running, before: Before, tmp_path: Path, probe: Path, door: Peer, wall: Peer) -> None:
    with podman(tmp_path, f"{before.parent}-podman-late") as container:
        is_ruled(agent, container.cgroup, probe, door, wall)
        found = row(agent, container.cgroup)
        assert (found["runtime"], found["id"]) == ("podman", container.id)


LAYOUTS = {
    "containerd, cgroupfs": ("kubepods/burstable/pod{pod}/{id}", ""),
    "containerd, systemd": (
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{pod_}.slice/cri-containerd-{id}.scope",
        "containerd",
    ),
    "CRI-O": ("kubepods.slice/kubepods-pod{pod_}.slice/crio-{id}.scope", "cri-o"),
    "Docker, systemd": ("system.slice/docker-{id}.scope", "docker"),
    "Podman, systemd": ("machine.slice/libpod-{id}.scope", "podman"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(agent: Running, before: Before, layout: str, probe: Path, door: Peer, wall: Peer) -> None:
    """The paths that other runtimes make, and a cgroup inside the container: one row, one count."""
    path, runtime = LAYOUTS[layout]
    number = secrets.token_hex(32)
    cgroup = f"{before.parent}/{path.format(pod=POD, pod_=POD.replace('-', '_'), id=number)}"
    directory(cgroup).mkdir(parents=True)
    is_ruled(agent, cgroup, probe, door, wall)
    found = row(agent, cgroup)
    assert (found.get("runtime", ""), found["id"]) == (runtime, number)
    inner = directory(cgroup) / "container" / "app"
    inner.mkdir(parents=True)
    assert run_in(inner, probe, "udp", str(door.port), "2").returncode == 0
    assert run_in(inner, probe, "udp", str(wall.port)).returncode == EACCES
    agent.until(lambda: agent.metric("weir_egress_bytes_total", cgroup=cgroup) == 3 * DATAGRAM)
    assert agent.metric("weir_refused_total", cgroup=cgroup) == 2


def test_a_name_that_is_no_text(agent: Running, before: Before, probe: Path, door: Peer, wall: Peer) -> None:
    """Names of cgroups are bytes: whoever may make one must not keep the agent from its work."""
    strange = directory(before.parent) / os.fsdecode(b"bad-\xff\"'\\ <b>\x1b[1m")
    strange.mkdir()
    assert run_in(strange, probe, "udp", str(wall.port)).returncode == EACCES
    assert run_in(strange, probe, "udp", str(door.port), "2").returncode == 0
    later = f"{before.parent}/later-{secrets.token_hex(2)}"
    directory(later).mkdir()
    is_ruled(agent, later, probe, door, wall)
    agent.until(lambda: row(agent, f"{before.parent}/{strange.name}"))
    shown = [value for labels, value in agent.samples("weir_egress_bytes_total") if "bad-" in labels["cgroup"]]
    assert sum(shown) == 2 * DATAGRAM
    agent.until(lambda: any("bad-" in event["cgroup"] for event in agent.events()))
    agent.ready()
    strange.rmdir()
    agent.until(lambda: row(agent, f"{before.parent}/{strange.name}")["gone"])
