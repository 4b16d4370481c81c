"""The agent on a node with a real containerd: found, named, under the right policy, measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.agent import AgentSite, Running, agent_site
from tests.node.containerd import Containerd
from tests.node.kubelet import Kubelet

CLOSED = """\
apiVersion: weir.dev/v1
kind: SocketPolicy
metadata: {name: NAME}
spec:
  sockets: {families: [inet, inet6, unix], protocols: [tcp, udp], listen: deny, bind: deny, transfer: deny}
  SELECTOR
  egress:
    - {name: door, action: allow, to: [127.0.0.0/8], ports: [PORT]}
  default: deny
"""


def closed(name: str, port: int, selector: str = "") -> str:
    """A policy that allows one port of this host."""
    return CLOSED.replace("NAME", name).replace("PORT", str(port)).replace("SELECTOR", selector or "mode: enforce")


@pytest.fixture
def site(tmp_path: Path, node: Containerd) -> Iterator[AgentSite]:
    with agent_site(tmp_path, node.cgroups) as made:
        made.options = {"--cri": str(node.socket), "--default": "closed"}
        made.write("closed", closed("closed", 7))
        yield made


@pytest.fixture
def agent(site: AgentSite) -> Iterator[Running]:
    with site.running() as made:
        yield made


def send(port: int, count: int = 1) -> list[str]:
    """A command that sends so many datagrams of 10 bytes."""
    return ["/bin/sh", "-c", f"for i in $(seq {count}); do echo 123456789 | nc -u -w 1 127.0.0.1 {port}; done; true"]


def test_named_and_counted(agent: Running, kubelet: Kubelet) -> None:
    pod = kubelet.pod("shop", "web-0", labels={"app": "web"})
    try:
        kubelet.container(pod, "main")
        who = {"namespace": "shop", "pod": "web-0", "container": "main"}
        agent.until(lambda: agent.samples("weir_enforced", layer="hooks", **who))
        assert agent.metric("weir_enforced", layer="hooks", **who) == 1
        assert agent.samples("weir_container_policy", policy="closed", **who)
        assert agent.samples("weir_container_policy", policy="closed", pod="web-0", container="POD")
    finally:
        kubelet.remove_pod(pod)
    agent.until(lambda: agent.metric("weir_containers", state="gone") >= 2)
