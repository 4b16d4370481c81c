"""A node with as many containers as wanted, and the real agent on it: cgroups as CRI-O lays them out, without processes.

The CRI is a gRPC server of the tests' own; everything else is as on a node.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from agent.cri import api_pb2 as api
from agent.node.choose import ANNOTATION
from tests.kernel.site import ROOT
from tests.node.agent import AgentSite, Running, agent_site
from tests.node.grpc_server import Answer, grpc_server

POLICY = (ROOT / "policies/appengine.yaml").read_text()

RECONCILE = "60s"
"""The agent's own default; tests use shorter ones."""

_UNREAD = b"\x4a\xa0\x06" + bytes(800)
"""What else a runtime says of a container and the agent does not read: field 9, 800 bytes."""


@dataclass(frozen=True)
class Pod:
    """A pod of one container; CRI-O gives the sandbox no cgroup of its own (drop_infra_ctr). ``policy``: its annotation."""

    number: int
    policy: str = ""

    @property
    def uid(self) -> str:
        """As Kubernetes writes it."""
        return f"{self.number:08x}-1111-2222-3333-444455556666"

    @property
    def container(self) -> str:
        """The container's id."""
        return f"{self.number:064x}"

    @property
    def sandbox(self) -> str:
        """The sandbox's id."""
        return f"{self.number:08x}" * 8

    @property
    def cgroup(self) -> str:
        """The container's cgroup below the managed parent."""
        pod = f"kubepods-burstable-pod{self.uid.replace('-', '_')}.slice"
        return f"kubepods-burstable.slice/{pod}/crio-{self.container}.scope"


def listed(pods: Sequence[Pod]) -> dict[str, bytes]:
    """What the runtime answers about these pods: with the labels and annotations of an ordinary Deployment."""
    sandboxes, containers = api.ListPodSandboxResponse(), api.ListContainersResponse()
    for pod in pods:
        team, name = f"team-{pod.number % 50}", f"web-{pod.number % 200}-6d4cf56db6-{pod.number:05x}"
        labels = {
            "app.kubernetes.io/name": f"web-{pod.number % 200}",
            "app.kubernetes.io/part-of": team,
            "pod-template-hash": "6d4cf56db6",
            "io.kubernetes.pod.name": name,
            "io.kubernetes.pod.namespace": team,
            "io.kubernetes.pod.uid": pod.uid,
        }
        annotations = {
            "kubectl.kubernetes.io/last-applied-configuration": "x" * 1500,
            "kubernetes.io/config.seen": "2026-01-01T00:00:00.000000000Z",
            "kubernetes.io/config.source": "api",
            **({ANNOTATION: pod.policy} if pod.policy else {}),
        }
        sandboxes.items.add(
            id=pod.sandbox,
            metadata=api.PodSandboxMetadata(name=name, uid=pod.uid, namespace=team),
            labels=labels,
            annotations=annotations,
        )
        container = api.Container(
            id=pod.container, pod_sandbox_id=pod.sandbox, metadata=api.ContainerMetadata(name="web")
        )
        container.MergeFromString(_UNREAD)
        containers.containers.append(container)
    return {"ListPodSandbox": sandboxes.SerializeToString(), "ListContainers": containers.SerializeToString()}


class Node:
    """A managed parent with pods in it; ``coming`` are those that the runtime lists already and that have no cgroup."""

    def __init__(self, site: AgentSite) -> None:
        self.site = site
        self.parent = site.weir.place.root / site.parent
        self.made: list[Pod] = []
        self.answers: dict[str, bytes] = {}
        self.coming: dict[str, Pod] = {}

    def fill(self, containers: int) -> None:
        """Make so many pods, and tell the runtime of them."""
        for number in range(len(self.made), containers):
            pod = Pod(number)
            (self.parent / pod.cgroup).mkdir(parents=True)
            self.made.append(pod)
        self.tell([])

    def tell(self, coming: Sequence[Pod]) -> None:
        """Let the runtime list these too."""
        self.answers = listed([*self.made, *coming])
        self.coming = {key: pod for pod in coming for key in (pod.uid, pod.container, pod.sandbox)}

    def list_pods(self, request: bytes, _: object) -> bytes:
        """ListPodSandbox."""
        wanted = api.ListPodSandboxRequest.FromString(request).filter
        return self._listed("ListPodSandbox", wanted.id or wanted.label_selector.get("io.kubernetes.pod.uid"))

    def list_containers(self, request: bytes, _: object) -> bytes:
        """ListContainers."""
        return self._listed("ListContainers", api.ListContainersRequest.FromString(request).filter.id)

    def _listed(self, method: str, wanted: str | None) -> bytes:
        """A runtime finds one by its id in no time; of those that were there at the start nobody asks for one."""
        if not wanted:
            return self.answers[method]
        return listed([self.coming[wanted]] if wanted in self.coming else [])[method]

    @contextmanager
    def running(self) -> Iterator[Running]:
        """The agent, once every container has its entry and its name."""
        with self.site.running() as agent:
            agent.until(lambda: len(agent.samples("weir_container_policy", container="web")) >= len(self.made))
            yield agent


@contextmanager
def node(containers: int, **options: str) -> Iterator[Node]:
    """A node with so many containers, under the App Engine policy; ``options``: of the agent, by their name without --."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="weir-bench-")))
        site = stack.enter_context(agent_site(folder, f"weir-bench-{secrets.token_hex(4)}"))
        site.write("appengine", POLICY)
        made = Node(site)
        made.fill(containers)
        answers: dict[str, Answer] = {
            "ListPodSandbox": made.list_pods,
            "ListContainers": made.list_containers,
        }
        stack.enter_context(grpc_server(folder / "cri.sock", answers))
        given = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        site.options.update({"--cri": str(folder / "cri.sock"), "--reconcile": RECONCILE, **given})
        yield made
