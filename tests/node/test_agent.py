"""The agent on a node with a real containerd: containers older and younger than it, found, named, ruled, measured."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.cgroups import tree
from tests.node.agent import AgentSite, Running, agent_site
from tests.node.containerd import Containerd
from tests.node.kubelet import Container, Kubelet, Pod
from tests.node.probe import DATAGRAM, Peer, answers, closed, run_in, started_in

EACCES = 13


@dataclass(frozen=True)
class Early:
    """A container that is older than the agent, with a connection that the policy allows and one that it does not."""

    pod: Pod
    container: Container
    allowed: socket.socket
    forbidden: socket.socket

    @property
    def who(self) -> dict[str, str]:
        return {"namespace": "old", "pod": "early-0", "container": "main"}


@pytest.fixture(scope="module")
def early(kubelet: Kubelet, image: str, door: Peer, wall: Peer) -> Iterator[Early]:
    pod = kubelet.pod("old", "early-0")
    command = ["/bin/sh", "-c", f"probe echo {door.port} & probe echo {wall.port} & exec sleep 100000"]
    container = kubelet.container(pod, "main", image, command)
    with door.accept() as allowed, wall.accept() as forbidden:
        assert answers(allowed)
        assert answers(forbidden)
        yield Early(pod, container, allowed, forbidden)
    kubelet.remove_pod(pod)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, node: Containerd, early: Early, door: Peer) -> Iterator[AgentSite]:
    with agent_site(tmp_path_factory.mktemp("site"), node.cgroups) as made:
        made.options = {"--cri": str(node.socket), "--default": "closed"}
        made.write("closed", closed("closed", door.port))
        yield made


@pytest.fixture(scope="module")
def agent(site: AgentSite) -> Iterator[Running]:
    with site.running() as made:
        yield made


@pytest.fixture
def pod(kubelet: Kubelet) -> Iterator[Pod]:
    made = kubelet.pod("shop", f"web-{secrets.token_hex(2)}", labels={"app": "web"})
    yield made
    kubelet.remove_pod(made)


def named(pod: Pod, container: str) -> dict[str, str]:
    return {"namespace": pod.namespace, "pod": pod.name, "container": container}


def test_named_and_counted(agent: Running, kubelet: Kubelet, image: str, pod: Pod, door: Peer, wall: Peer) -> None:
    who = named(pod, "main")
    command = f"probe udp {door.port} 7; probe udp {wall.port} 5; probe tcp {wall.port}; echo $?; exec sleep 100000"
    main = kubelet.container(pod, "main", image, ["/bin/sh", "-c", command])
    agent.until(lambda: agent.metric("weir_egress_bytes_total", destination="loopback", **who) == 7 * DATAGRAM)
    assert agent.metric("weir_egress_packets_total", destination="loopback", **who) == 7
    assert agent.metric("weir_egress_bytes_total", destination="public", **who) == 0
    agent.until(lambda: kubelet.logs(main) == f"{EACCES}\n", lambda: kubelet.logs(main))
    refused = {"policy": "closed", "hook": "connect", "reason": "rule", "rule": "default", **who}
    agent.until(lambda: agent.metric("weir_refused_total", **refused) == 2)
    assert agent.samples("weir_container_policy", policy="closed", mode="enforce", **who)
    assert agent.samples("weir_container_policy", policy="closed", pod=pod.name, container="POD")
    assert {labels["layer"]: value for labels, value in agent.samples("weir_enforced", **who)} == {
        "hooks": 1,
        "packets": 1,
        "seccomp": 0,
        "lsm": 0,
    }
    assert agent.metric("weir_sockets_adopted_total", **who) == 0
    assert len(agent.samples("weir_egress_bytes_total", **who)) == 3


def test_gone_with_its_last_values(agent: Running, kubelet: Kubelet, image: str, door: Peer) -> None:
    pod = kubelet.pod("shop", "gone-0")
    who = named(pod, "main")
    # It lives until it was seen: what comes and goes between two looks is known by its cgroup's id alone.
    kubelet.container(pod, "main", image, ["/bin/sh", "-c", f"probe udp {door.port} 11; exec sleep 100000"])
    agent.until(lambda: agent.metric("weir_egress_bytes_total", **who) == 11 * DATAGRAM)
    kubelet.remove_pod(pod)
    agent.until(lambda: not agent.samples("weir_enforced", pod="gone-0"))
    assert agent.metric("weir_containers", state="gone") >= 2
    row = next(
        row for row in agent.status()["cgroups"] if row.get("pod") == "gone-0" and row.get("container") == "main"
    )
    assert row["gone"]
    assert row["bytes"]["loopback"] == 11 * DATAGRAM
    assert agent.metric("weir_egress_bytes_total", **who) == 11 * DATAGRAM


def test_a_container_older_than_the_agent(agent: Running, early: Early) -> None:
    """Its sockets work where its policy lets them, and count."""
    assert answers(early.allowed)
    before = agent.metric("weir_egress_bytes_total", destination="loopback", **early.who)
    assert not answers(early.forbidden, 0.5)
    refused = {"hook": "egress", "rule": "default", **early.who}
    agent.until(lambda: agent.metric("weir_refused_total", **refused) >= 1)
    assert answers(early.allowed)
    agent.until(lambda: agent.metric("weir_egress_bytes_total", destination="loopback", **early.who) > before)


def test_exec(agent: Running, kubelet: Kubelet, image: str, pod: Pod, door: Peer, wall: Peer) -> None:
    who = named(pod, "main")
    main = kubelet.container(pod, "main", image)
    assert kubelet.exec(main, ["/bin/probe", "udp", str(door.port), "3"]).code == 0
    assert kubelet.exec(main, ["/bin/probe", "udp", str(wall.port), "3"]).code == EACCES
    agent.until(lambda: agent.metric("weir_egress_bytes_total", **who) == 3 * DATAGRAM)
    assert agent.metric("weir_refused_total", rule="default", **who) == 1


def test_nested_cgroups_are_the_container_s(
    agent: Running, kubelet: Kubelet, image: str, pod: Pod, door: Peer, wall: Peer, probe: Path
) -> None:
    who = named(pod, "main")
    main = kubelet.container(pod, "main", image, ["/bin/probe", "udp", str(door.port), "2"], start=False)
    kubelet.start(main)
    assert kubelet.wait(main) == 0
    main = kubelet.container(pod, "side", image)
    who = named(pod, "side")
    label = kubelet.cgroup(main)
    cgroup = tree.mount() / label.strip("/")
    inner = cgroup / "init.scope" / "deeper"
    inner.mkdir(parents=True)
    assert run_in(inner, probe, "udp", str(door.port), "5").returncode == 0
    assert run_in(inner, probe, "udp", str(wall.port), "5").returncode == EACCES
    assert run_in(cgroup, probe, "udp", str(door.port), "4").returncode == 0
    agent.until(lambda: agent.metric("weir_egress_bytes_total", **who) == 9 * DATAGRAM)
    assert agent.metric("weir_refused_total", rule="default", **who) == 1
    agent.until(lambda: {labels["cgroup"] for labels, _ in agent.samples("weir_sockets", pod=pod.name)} >= {label})
    assert not [labels for labels, _ in agent.samples("weir_sockets") if labels["cgroup"].startswith(f"{label}/")]

    with started_in(inner, probe, "echo", str(door.port)) as process, door.accept() as connection:
        assert answers(connection)
        (cgroup / "cgroup.procs").write_text(str(process.pid))  # its socket stays behind, and works on
        assert answers(connection)
    agent.until(lambda: agent.metric("weir_sockets", **who) == 0)
    before = agent.metric("weir_egress_bytes_total", **who)
    inner.rmdir()
    inner.parent.rmdir()
    agent.until(lambda: [len(ids) for ids in enrolled(agent, label)] == [1], lambda: str(enrolled(agent, label)))
    assert not [row for row in agent.status()["cgroups"] if row["cgroup"].startswith(f"{label}/")]
    assert agent.metric("weir_egress_bytes_total", **who) == before


def enrolled(agent: Running, cgroup: str) -> list[list[int]]:
    """The cgroups that count for a container, for each row that it has."""
    return [row["cgroup_ids"] for row in agent.status()["node"]["rows"] if row["cgroup"] == cgroup]


def test_events(
    agent: Running, site: AgentSite, kubelet: Kubelet, image: str, pod: Pod, wall: Peer, tmp_path: Path
) -> None:
    """One line on standard output, and the same from the socket, for those who follow and for those who come late."""
    who = named(pod, "main")
    main = kubelet.container(pod, "main", image)
    agent.until(lambda: agent.samples("weir_container_policy", **who))
    out = tmp_path / "followed"
    with out.open("w") as file:
        follower = subprocess.Popen(site.weir.command("events", "-f", "--json"), env=site.environment, stdout=file)

    def followed() -> bool:
        assert kubelet.exec(main, ["/bin/probe", "udp", str(wall.port)]).code == EACCES
        return bool(mine(out.read_text(), who))

    try:
        agent.until(followed)
    finally:
        follower.kill()
        follower.wait()
    event = mine(out.read_text(), who)[0]
    assert event["action"] == "refused"
    assert (event["policy"], event["rule"], event["hook"], event["comm"]) == ("closed", "default", "connect", "probe")
    assert (event["protocol"], event["address"], event["port"]) == ("udp", "127.0.0.1", wall.port)
    assert event["cgroup"] == kubelet.cgroup(main)
    agent.until(lambda: event in agent.events())
    assert event in mine(site.weir.ok("events", "--json", env=site.environment), who)


def mine(lines: str, who: dict[str, str]) -> list[dict[str, object]]:
    """The events of one container."""
    events = [json.loads(line) for line in lines.splitlines(keepends=True) if line.endswith("\n")]
    return [event for event in events if who.items() <= event.items()]


def test_status(agent: Running, site: AgentSite, kubelet: Kubelet, image: str, pod: Pod, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}'
    )
    command = ["/bin/sh", "-c", "sleep 100000 & exec sleep 100000"]
    kubelet.container(pod, "with", image, command, seccomp=profile)
    kubelet.container(pod, "without", image, command)

    def rows() -> dict[str, dict[str, object]]:
        return {row.get("container", ""): row for row in agent.status()["cgroups"] if row.get("pod") == pod.name}

    def layers(container: str) -> object:
        return rows().get(container, {}).get("layers")

    both = {"hooks": True, "packets": True, "lsm": False}
    agent.until(lambda: layers("with") == {**both, "seccomp": "2/2"}, lambda: str(rows()))
    agent.until(lambda: layers("without") == {**both, "seccomp": "0/2"}, lambda: str(rows()))
    agent.until(lambda: agent.metric("weir_enforced", layer="seccomp", **named(pod, "with")) == 1)
    assert agent.metric("weir_enforced", layer="seccomp", **named(pod, "without")) == 0
    text = site.weir.ok("status", env=site.environment)
    assert "agent: ready" in text
    assert f"shop/{pod.name}/with" in text
