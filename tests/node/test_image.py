"""The image of deploy/Dockerfile, run as deploy/kubernetes/daemonset.yaml says, does the whole job on a real containerd."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.node import own
from tests.deploy.manifests import agent_container
from tests.node import build, remains
from tests.node.containerd import Containerd
from tests.node.deployed import REGISTRY, Place, deployed
from tests.node.kubelet import Kubelet, Pod
from tests.node.probe import DATAGRAM, Peer, closed

EACCES = 13
NEEDED = {
    "BPF": (39, "cannot use BPF: Operation not permitted"),
    "NET_ADMIN": (12, "Failed to load program: Operation not permitted"),
    "PERFMON": (38, "cannot use helper bpf_get_current_comm"),
}
"""Number in include/uapi/linux/capability.h, and what an agent says that has all but this."""


@pytest.fixture(scope="module", autouse=True)
def _built(tmp_path_factory: pytest.TempPathFactory, node: Containerd) -> None:
    name = f"{REGISTRY}/{agent_container()['image']}"
    tar = build.archive(name, tmp_path_factory.mktemp("image") / "image.tar")
    node.load(tar, name)
    tar.unlink()


@pytest.fixture
def place(tmp_path: Path, kubelet: Kubelet, node: Containerd, door: Peer) -> Iterator[Place]:
    with deployed(kubelet, node, tmp_path / "volumes") as made:
        made.write("closed", closed("closed", door.port))
        yield made


@pytest.fixture
def pod(kubelet: Kubelet) -> Iterator[Pod]:
    made = kubelet.pod("shop", f"web-{secrets.token_hex(2)}", labels={"app": "web"})
    yield made
    kubelet.remove_pod(made)


def test_the_whole_job(place: Place, kubelet: Kubelet, image: str, pod: Pod, door: Peer, wall: Peer) -> None:
    """Finds, names, refuses, counts, tells, writes profiles, follows its policies; ends and begins again without a gap."""
    who = {"namespace": "shop", "pod": pod.name, "container": "main"}
    main = kubelet.container(pod, "main", image)
    agent = place.start()
    agent.ready()
    agent.until(lambda: agent.samples("weir_container_policy", **who))  # an event has the names that are known then

    assert kubelet.exec(main, ["/bin/probe", "udp", str(door.port), "7"]).code == 0
    assert kubelet.exec(main, ["/bin/probe", "tcp", str(wall.port)]).code == EACCES
    agent.until(lambda: agent.metric("weir_egress_bytes_total", destination="loopback", **who) == 7 * DATAGRAM)
    assert agent.metric("weir_refused_total", policy="closed", rule="default", **who) == 1

    def layers() -> list[dict[str, Any]]:
        rows = [row for row in agent.status()["cgroups"] if row.get("pod") == pod.name]
        return [row["layers"] for row in rows if row.get("container") == "main"]

    # Once a look at the processes finds no probe among them.
    agent.until(lambda: layers() == [{"hooks": True, "packets": True, "seccomp": "0/1", "lsm": False}], layers)
    agent.until(lambda: f'"{pod.name}"' in agent.log, lambda: agent.log)
    assert f"shop/{pod.name}/main" in agent.exec("weir", "status").stdout
    assert who.items() <= json.loads(agent.exec("weir", "events", "--json").stdout.splitlines()[-1]).items()

    profile = place.profiles / "weir/closed.json"
    confined = kubelet.container(pod, "confined", image, seccomp=profile)
    filtered = {**who, "container": "confined", "layer": "seccomp"}
    agent.until(lambda: agent.metric("weir_enforced", **filtered) == 1)

    probed = agent.exec("weir", "probe")
    assert (probed.code, probed.stdout.splitlines()[-1]) == (0, "weir can work here"), probed
    renewed = agent.exec("weir", "load", "--force")
    assert renewed.code == 0, renewed
    place.write("closed", closed("closed", wall.port))
    agent.until(lambda: kubelet.exec(main, ["/bin/probe", "udp", str(wall.port)]).code == 0)
    assert kubelet.exec(main, ["/bin/probe", "udp", str(door.port)]).code == EACCES

    assert agent.end() == 0
    assert kubelet.exec(confined, ["/bin/probe", "udp", str(door.port)]).code == EACCES
    late = kubelet.container(pod, "late", image, ["/bin/probe", "udp", str(door.port)])
    assert kubelet.wait(late) == EACCES
    again = place.start()
    again.ready()
    again.until(lambda: again.metric("weir_egress_bytes_total", **who) == 8 * DATAGRAM)
    assert kubelet.exec(main, ["/bin/probe", "udp", str(door.port)]).code == EACCES
    assert again.end() == 0


def test_it_listens_below_its_own_parent(place: Place) -> None:
    """The default forbids to listen, the second time from birth on."""
    for _ in range(2):
        agent = place.start()
        agent.ready()
        mine = {"pod": place.pod.name, "container": agent.container.name}
        agent.until(lambda a=agent, m=mine: a.samples("weir_container_policy", policy=own.NAME, **m))  # type: ignore[misc]
        assert agent.samples("weir_container_policy", policy="closed", cgroup=f"/{place.root}")
        assert agent.end() == 0


def test_set_free(place: Place, kubelet: Kubelet, image: str, pod: Pod, wall: Peer) -> None:
    main = kubelet.container(pod, "main", image)
    agent = place.start("--unload-on-exit")
    agent.ready()
    assert kubelet.exec(main, ["/bin/probe", "udp", str(wall.port)]).code == EACCES
    assert agent.end() == 0
    assert kubelet.exec(main, ["/bin/probe", "udp", str(wall.port)]).code == 0
    assert not (place.bpffs / "weir").exists()


def test_nothing_but_what_the_manifest_gives(place: Place, kubelet: Kubelet) -> None:
    """The runtime has not added to its rights, so that the other tests show what these suffice for."""
    agent = place.start()
    agent.ready()
    status = Path(f"/proc/{kubelet.pid(agent.container)}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    given = sum(1 << number for number, _ in NEEDED.values())
    assert [int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")] == [
        *[given] * 3,
        0,
        0,
    ]
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    assert agent.exec("touch", "/opt/weir/x").code != 0


def test_each_capability_is_tried() -> None:
    assert sorted(agent_container()["securityContext"]["capabilities"]["add"]) == sorted(NEEDED)


@pytest.mark.parametrize("capability", NEEDED)
def test_no_capability_too_many(place: Place, kubelet: Kubelet, capability: str) -> None:
    """Without any one of the manifest's the agent cannot begin, and says what it was not let do."""
    agent = place.start(without=[capability])
    assert kubelet.wait(agent.container) == 1
    remains.wait(f"its last words: {agent.log}", lambda: NEEDED[capability][1] in agent.log)
