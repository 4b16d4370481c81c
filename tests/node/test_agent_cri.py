"""The CRI away at the agent's start, killed beneath it, hanging: enforcement and metrics go on, names come later."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cgroups import tree
from tests.node.agent import AgentSite, Running, agent_site
from tests.node.containerd import Containerd
from tests.node.kubelet import Container, Kubelet, Pod
from tests.node.probe import Peer, closed, run_in

EACCES = 13


@pytest.fixture
def site(tmp_path: Path, node: Containerd, door: Peer, wall: Peer) -> Iterator[AgentSite]:
    with agent_site(tmp_path, node.cgroups) as made:
        made.options = {"--cri": str(node.socket), "--default": "closed"}
        made.write("closed", closed("closed", door.port))
        made.write("team", closed("team", wall.port, "{namespaces: [shop]}"))
        yield made


@pytest.fixture
def pod(kubelet: Kubelet) -> Iterator[Pod]:
    made = kubelet.pod("shop", f"web-{secrets.token_hex(2)}")
    yield made
    kubelet.remove_pod(made)


@pytest.fixture
def main(kubelet: Kubelet, image: str, pod: Pod) -> Container:
    return kubelet.container(pod, "main", image)


def sends(cgroup: Path, probe: Path, peer: Peer) -> bool:
    """Whether a process of a cgroup may send to a peer."""
    code = run_in(cgroup, probe, "udp", str(peer.port)).returncode
    assert code in (0, EACCES)
    return code == 0


def born(pod: Pod) -> Path:
    """A container's cgroup as a runtime makes it, that no runtime knows."""
    path = tree.mount() / pod.cgroup.strip("/") / secrets.token_hex(32)
    path.mkdir()
    return path


def is_counted(agent: Running, cgroup: Path) -> bool:
    return bool(agent.samples("weir_enforced", layer="hooks", cgroup=f"/{cgroup.relative_to(tree.mount())}"))


def test_away_then_back_then_killed(
    site: AgentSite,
    node: Containerd,
    kubelet: Kubelet,
    pod: Pod,
    main: Container,
    image: str,
    probe: Path,
    door: Peer,
    wall: Peer,
) -> None:
    cgroup = kubelet.cgroup(main)
    path = tree.mount() / cgroup.strip("/")
    node.stop()
    try:
        with site.running() as agent:
            agent.until(lambda: is_counted(agent, path))
            assert agent.metric("weir_cri_up") == 0
            assert [labels["policy"] for labels, _ in agent.samples("weir_container_policy", cgroup=cgroup)] == [
                "closed"
            ]
            assert agent.samples("weir_container_policy", cgroup=cgroup, namespace="", pod="", container="")
            assert sends(path, probe, door)
            assert not sends(path, probe, wall)
            assert "NO NAMES FROM THE CRI" in site.weir.ok("status", env=site.environment)
            assert agent.get("/readyz")[0] == 200

            node.start()
            who = {"namespace": "shop", "pod": pod.name, "container": "main"}
            agent.until(lambda: agent.samples("weir_container_policy", policy="team", cgroup=cgroup, **who))
            agent.until(lambda: agent.metric("weir_cri_up") == 1)
            assert agent.metric("weir_egress_packets_total", **who) == 1
            assert agent.metric("weir_refused_total", policy="closed", **who) == 1
            assert len(agent.samples("weir_container_policy", cgroup=cgroup)) == 1
            assert sends(path, probe, wall)

            node.kill()
            agent.until(lambda: agent.metric("weir_cri_up") == 0)
            stranger = born(pod)
            assert sends(stranger, probe, wall), "the pod's policy"
            assert not sends(stranger, probe, door)
            agent.until(lambda: is_counted(agent, stranger))
            assert agent.samples("weir_container_policy", policy="team", cgroup=cgroup, **who)
            stranger.rmdir()
            node.start()
            agent.until(lambda: agent.metric("weir_cri_up") == 1)
            kubelet.container(pod, "late", image)
            agent.until(lambda: agent.samples("weir_container_policy", policy="team", pod=pod.name, container="late"))
    except BaseException:
        node.stop()
        node.start()
        raise


def test_hanging(
    site: AgentSite, node: Containerd, kubelet: Kubelet, pod: Pod, main: Container, probe: Path, door: Peer, wall: Peer
) -> None:
    """It takes the connection and never answers."""
    path = tree.mount() / kubelet.cgroup(main).strip("/")
    os.kill(node.pid, signal.SIGSTOP)
    try:
        with site.running() as agent:
            assert not sends(path, probe, wall)
            stranger = born(pod)
            assert not sends(stranger, probe, wall)
            assert sends(stranger, probe, door)
            agent.until(lambda: is_counted(agent, stranger))
            agent.until(lambda: "gave no answer" in agent.status()["node"]["cri"])
            assert agent.metric("weir_cri_up") == 0
            os.kill(node.pid, signal.SIGCONT)
            agent.until(lambda: agent.samples("weir_container_policy", policy="team", pod=pod.name, container="main"))
            agent.until(lambda: agent.metric("weir_cri_up") == 1)
            stranger.rmdir()
            assert agent.end() == 0
    finally:
        os.kill(node.pid, signal.SIGCONT)
