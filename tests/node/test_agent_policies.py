"""Which policy a container gets, and what follows when the policies change while it runs."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.agent import AgentSite, Running, agent_site
from tests.node.containerd import Containerd
from tests.node.kubelet import Kubelet, Pod
from tests.node.probe import Peer, answers, closed

EACCES = 13


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, node: Containerd, door: Peer) -> Iterator[AgentSite]:
    with agent_site(tmp_path_factory.mktemp("site"), node.cgroups) as made:
        made.options = {"--cri": str(node.socket), "--default": "closed", "--reconcile": "1h"}  # all by notification
        made.write("50-closed", closed("closed", door.port))
        made.write("60-strict", closed("strict", door.port))
        made.write("10-front", closed("front", door.port, "{namespaces: ['team-*'], containers: ['front*']}"))
        made.write("20-team", closed("team", door.port, "{namespaces: [team-a]}"))
        made.write("30-blue", closed("blue", door.port, "{podLabels: {colour: 'b*'}}"))
        made.write("40-path", closed("path", door.port, "{cgroups: ['*/podpath-*/*']}"))
        yield made


@pytest.fixture(scope="module")
def agent(site: AgentSite) -> Iterator[Running]:
    with site.running() as made:
        yield made


@pytest.fixture
def pod(kubelet: Kubelet) -> Iterator[Pod]:
    """A pod that asks for policy `mine`."""
    made = kubelet.pod("shop", f"web-{secrets.token_hex(2)}", annotations={"weir.dev/policy": "mine"})
    yield made
    kubelet.remove_pod(made)


def policy(agent: Running, pod: Pod, container: str) -> str:
    """The policy of a container as the metrics have it; of a container that is there more than once, one after the other."""
    samples = agent.samples("weir_container_policy", namespace=pod.namespace, pod=pod.name, container=container)
    return " ".join(sorted(labels["policy"] for labels, _ in samples))


def under(agent: Running, pod: Pod, container: str, wanted: str) -> None:
    agent.until(lambda: policy(agent, pod, container) == wanted, lambda: policy(agent, pod, container))


def test_selectors(agent: Running, kubelet: Kubelet, image: str) -> None:
    """In the order of the files: 10-front, 20-team, 30-blue, 40-path; else the default."""
    pods: dict[str, tuple[Pod, dict[str, str]]] = {
        "a": (kubelet.pod("team-a", "a", {"colour": "blue"}), {"front-1": "front", "back": "team"}),
        "b": (kubelet.pod("team-b", "b", {"colour": "black"}), {"front-1": "front", "back": "blue"}),
        "c": (kubelet.pod("shop", "c", {"colour": "red"}, uid=f"path-{secrets.token_hex(2)}"), {"front-1": "path"}),
        "d": (kubelet.pod("shop", "d", {"colour": "red"}), {"front-1": "closed"}),
        "e": (kubelet.pod("team-a", "e", annotations={"weir.dev/policy": "strict"}), {"front-1": "strict"}),
        "f": (kubelet.pod("team-a", "f", annotations={"weir.dev/policy": "closed"}), {"front-1": "closed"}),
    }
    try:
        for pod, containers in pods.values():
            for name in containers:
                kubelet.container(pod, name, image)
        for pod, containers in pods.values():
            for name, wanted in containers.items():
                under(agent, pod, name, wanted)
        assert not agent.samples("weir_policy_mismatch")
    finally:
        for pod, _ in pods.values():
            kubelet.remove_pod(pod)


def test_its_policy_from_its_first_instruction(
    agent: Running, site: AgentSite, kubelet: Kubelet, image: str, pod: Pod, door: Peer, wall: Peer
) -> None:
    """The sandbox was seen and named before: the container starts under its pod's policy, not under the default."""
    path = site.write("70-mine", closed("mine", wall.port, rule="window"))
    under(agent, pod, "POD", "mine")
    cgroup = pod.cgroup
    agent.until(
        lambda: [row for row in agent.status()["cgroups"] if row["cgroup"] == cgroup and row["policy"] == "mine"]
    )
    command = f"probe udp {door.port}; echo $?; probe udp {wall.port}; echo $?"
    main = kubelet.container(pod, "main", image, ["/bin/sh", "-c", command])
    kubelet.wait(main)
    kubelet.writes(main, f"{EACCES}\n0\n")
    path.unlink()
    under(agent, pod, "POD", "closed")


def test_an_annotation_that_names_no_policy(
    agent: Running, site: AgentSite, kubelet: Kubelet, image: str, pod: Pod, door: Peer, wall: Peer
) -> None:
    who = {"namespace": "shop", "pod": pod.name, "container": "main"}
    main = kubelet.container(pod, "main", image)
    under(agent, pod, "main", "closed")
    agent.until(lambda: agent.metric("weir_policy_mismatch", **who) == 1)
    assert kubelet.exec(main, ["/bin/probe", "udp", str(wall.port)]).code == EACCES
    row = next(
        row for row in agent.status()["cgroups"] if row.get("pod") == pod.name and row.get("container") == "main"
    )
    assert "'mine'" in row["problem"]
    text = site.weir.ok("status", env=site.environment)
    assert "PROBLEM: " in text
    assert "'mine'" in text
    lines = [line for line in site.log.read_text().splitlines() if pod.name in line and " warning " in line]
    assert len(lines) == 2, "one for the pod's sandbox, one for the container"
    assert "'mine'" in lines[1]

    path = site.write("70-mine", closed("mine", door.port))
    under(agent, pod, "main", "mine")
    agent.until(lambda: not agent.samples("weir_policy_mismatch", **who))
    path.unlink()
    under(agent, pod, "main", "closed")
    agent.until(lambda: agent.metric("weir_policy_mismatch", **who) == 1)


def test_a_connection_under_a_changed_policy(
    agent: Running, site: AgentSite, kubelet: Kubelet, image: str, pod: Pod, door: Peer, wall: Peer
) -> None:
    """The new version judges what is open already; refusals are counted by its rules."""
    who = {"namespace": "shop", "pod": pod.name, "container": "main"}
    path = site.write("70-mine", closed("mine", door.port))
    under(agent, pod, "POD", "mine")
    main = kubelet.container(pod, "main", image, ["/bin/probe", "echo", str(door.port)])
    with door.accept() as connection:
        under(agent, pod, "main", "mine")
        assert answers(connection)
        before = agent.metric("weir_egress_bytes_total", **who)
        path.write_text(closed("mine", wall.port, rule="window"))
        agent.until(lambda: kubelet.exec(main, ["/bin/probe", "udp", str(wall.port)]).code == 0)
        assert not answers(connection, 0.5)
        agent.until(lambda: agent.metric("weir_refused_total", hook="egress", policy="mine", **who) >= 1)
        path.write_text(closed("mine", door.port, rule="door-again"))
        assert answers(connection), "what was held back was never sent again"
        assert agent.metric("weir_egress_bytes_total", **who) > before
        path.unlink()
        under(agent, pod, "main", "closed")
        assert answers(connection)


def test_audit(agent: Running, site: AgentSite, kubelet: Kubelet, image: str, pod: Pod, wall: Peer, door: Peer) -> None:
    who = {"namespace": "shop", "pod": pod.name, "container": "main"}
    path = site.write("70-mine", closed("mine", door.port, mode="audit"))
    under(agent, pod, "POD", "mine")
    main = kubelet.container(pod, "main", image)
    under(agent, pod, "main", "mine")
    assert agent.samples("weir_container_policy", mode="audit", **who)
    assert kubelet.exec(main, ["/bin/probe", "udp", str(wall.port)]).code == 0
    agent.until(lambda: agent.metric("weir_audited_total", rule="default", **who) >= 1)
    assert not agent.samples("weir_refused_total", **who)
    path.unlink()
    under(agent, pod, "main", "closed")


def test_a_bad_file(
    agent: Running, site: AgentSite, kubelet: Kubelet, image: str, pod: Pod, door: Peer, wall: Peer
) -> None:
    path = site.write("70-mine", closed("mine", door.port))
    under(agent, pod, "POD", "mine")
    main = kubelet.container(pod, "main", image)
    under(agent, pod, "main", "mine")
    failures = agent.metric("weir_policy_reload_failures_total")
    sha256 = agent.samples("weir_policy_info", policy="mine")[0][0]["sha256"]
    path.write_text(closed("mine", wall.port).replace("default: deny", "default: perhaps"))
    agent.until(lambda: agent.metric("weir_policy_reload_failures_total") > failures)
    agent.until(lambda: agent.samples("weir_policy_file_invalid"))
    assert [labels for labels, _ in agent.samples("weir_policy_file_invalid")] == [{"file": "70-mine.yaml"}]
    assert kubelet.exec(main, ["/bin/probe", "udp", str(door.port)]).code == 0
    assert kubelet.exec(main, ["/bin/probe", "udp", str(wall.port)]).code == EACCES
    assert agent.samples("weir_policy_info", policy="mine")[0][0]["sha256"] == sha256
    assert "POLICY FILE WRONG: 70-mine.yaml" in site.weir.ok("status", env=site.environment)
    assert agent.get("/readyz")[0] == 200
    said = site.log.read_text().count("policy file 70-mine.yaml is not used")
    path.unlink()
    agent.until(lambda: not agent.samples("weir_policy_file_invalid"))
    under(agent, pod, "main", "closed")
    assert site.log.read_text().count("policy file 70-mine.yaml is not used") == said == 1


def test_the_swap_of_a_mounted_config_map(
    tmp_path: Path,
    node: Containerd,
    kubelet: Kubelet,
    image: str,
    door: Peer,
    wall: Peer,
    site: AgentSite,
    agent: Running,
) -> None:
    """The kubelet writes a directory beside the old one and renames a link: both files change at once."""
    folder = site.policies
    made = kubelet.pod("team-a", f"swap-{secrets.token_hex(2)}", annotations={"weir.dev/policy": "mapped"})
    other = kubelet.pod("team-a", f"swap-{secrets.token_hex(2)}", annotations={"weir.dev/policy": "second"})
    try:
        swap(folder, "1", {"90-mapped.yaml": closed("mapped", door.port)})
        under(agent, made, "POD", "mapped")
        main = kubelet.container(made, "main", image)
        under(agent, made, "main", "mapped")
        agent.until(lambda: agent.metric("weir_policy_mismatch", pod=other.name, container="POD") == 1)
        swap(
            folder,
            "2",
            {
                "90-mapped.yaml": closed("mapped", wall.port, rule="window"),
                "91-second.yaml": closed("second", door.port),
            },
        )
        under(agent, other, "POD", "second")
        assert kubelet.exec(main, ["/bin/probe", "udp", str(wall.port)]).code == 0
        assert kubelet.exec(main, ["/bin/probe", "udp", str(door.port)]).code == EACCES
        swap(folder, "3", {})
        under(agent, made, "main", "closed")
        under(agent, other, "POD", "closed")
    finally:
        kubelet.remove_pod(made)
        kubelet.remove_pod(other)


def swap(folder: Path, version: str, files: dict[str, str]) -> None:
    """What the kubelet's AtomicWriter does (pkg/volume/util/atomic_writer.go)."""
    data = folder / f"..{version}"
    data.mkdir()
    for name, text in files.items():
        (data / name).write_text(text)
    (folder / "..data_tmp").symlink_to(data.name)
    os.rename(folder / "..data_tmp", folder / "..data")
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    for path in folder.iterdir():
        if path.is_symlink() and not path.name.startswith("..") and path.name not in files:
            path.unlink()
