"""Names and labels of containers from the container runtime: containerd or CRI-O, through the CRI API v1.

client = Client(Path("/run/containerd/containerd.sock"))
named = client.inventory().named(container_id)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from sys import intern

from google.protobuf.message import DecodeError, Message

from agent.cri import api_pb2 as api
from agent.cri.rpc import Connection, CriUnavailable

__all__ = ["SANDBOX", "Client", "ContainerInfo", "CriUnavailable", "Inventory", "Named", "PodInfo"]

SANDBOX = "POD"
"""The container name of a sandbox's own process, which has none: the one that cAdvisor and the kubelet's metrics use."""

_OURS = "weir.dev/"

_POD_UID = "io.kubernetes.pod.uid"
"""The kubelet's label on what it makes (pkg/kubelet/types/labels.go). metadata.uid, which it equals, is in no filter."""


@dataclass(frozen=True, slots=True)
class PodInfo:
    """A pod's sandbox. ``annotations`` are those of weir only (weir.dev/…): others can be large."""

    sandbox_id: str
    uid: str
    namespace: str
    name: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    created: int


@dataclass(frozen=True, slots=True)
class ContainerInfo:
    """A container of a pod, whatever its state."""

    id: str
    name: str
    sandbox_id: str


@dataclass(frozen=True)
class Named:
    """What people call a container. Labels and annotations are its pod's."""

    namespace: str
    pod: str
    container: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class Inventory:
    """What the runtime had at one moment: containers by their id, pods by the id of their sandbox."""

    containers: Mapping[str, ContainerInfo]
    pods: Mapping[str, PodInfo]

    def named(self, container_id: str) -> Named | None:
        """The names of a container or of a sandbox (container SANDBOX); None when the runtime did not list it."""
        container = self.containers.get(container_id)
        pod = self.pods.get(container.sandbox_id if container else container_id)
        if pod is None:
            return None
        name = container.name if container else SANDBOX
        return Named(pod.namespace, pod.name, name, pod.labels, pod.annotations)

    def pod_of_uid(self, uid: str) -> PodInfo | None:
        """The pod with this uid, as Kubernetes writes it (with hyphens); of several sandboxes the newest."""
        return self._by_uid.get(uid)

    def with_more(self, newer: Inventory) -> Inventory:
        """Add what was listed later; the answer is this itself when that says nothing new."""
        both = Inventory({**self.containers, **newer.containers}, {**self.pods, **newer.pods})
        return self if both == self else both

    @cached_property
    def _by_uid(self) -> dict[str, PodInfo]:
        return {pod.uid: pod for pod in sorted(self.pods.values(), key=lambda pod: pod.created)}


class Client:
    """Asks the runtime at a socket. Each question has a connection of its own, so a restart of the runtime is no matter.

    ``timeout``: seconds for one question, connecting included.
    """

    def __init__(self, socket_path: Path, timeout: float = 5.0) -> None:
        self._path = socket_path
        self._timeout = timeout

    def inventory(self) -> Inventory:
        """Every pod and container that the runtime knows now, stopped ones included.

        Raises CriUnavailable when it does not answer, not in time, or not in the CRI's language.
        """
        with Connection(self._path, self._timeout) as connection:
            # Containers first: the pod of a container that was listed is then listed too, unless both are gone.
            containers, pods = api.ListContainersResponse(), api.ListPodSandboxResponse()
            self._ask(connection, api.ListContainersRequest(), containers)
            self._ask(connection, api.ListPodSandboxRequest(), pods)
        return Inventory(_containers(containers), _pods(pods))

    def some(self, containers: Collection[str], pod_uids: Collection[str]) -> Inventory:
        """What the runtime knows of these containers (or sandboxes), with their pods, and of these pods.

        So that a birth on a large node does not cost a list of all of it. Raises CriUnavailable as ``inventory`` does.
        """
        found, pods = api.ListContainersResponse(), api.ListPodSandboxResponse()
        with Connection(self._path, self._timeout) as connection:
            for container in containers:
                self._ask(connection, api.ListContainersRequest(filter=api.ContainerFilter(id=container)), found)
            sandboxes = {one.id: one.pod_sandbox_id for one in found.containers}
            wanted = [api.PodSandboxFilter(id=one) for one in {sandboxes.get(one, one) for one in containers}]
            wanted += [api.PodSandboxFilter(label_selector={_POD_UID: uid}) for uid in pod_uids]
            for one in wanted:
                self._ask(connection, api.ListPodSandboxRequest(filter=one), pods)
        return Inventory(_containers(found), _pods(pods))

    def _ask(self, connection: Connection, request: Message, answer: Message) -> None:
        """Make one call, of the name that its request has, and add what it says to ``answer``."""
        method = type(request).__name__.removesuffix("Request")
        data = connection.call(f"/runtime.v1.RuntimeService/{method}", request.SerializeToString())
        try:
            answer.MergeFromString(memoryview(data))  # type: ignore[arg-type]  # typeshed names bytes only
        except DecodeError as e:
            message = f"The container runtime at {self._path} gave an answer that is no CRI message"
            raise CriUnavailable(message, "Name the socket of containerd or CRI-O with --cri") from e


# protobuf makes a new string each time that a field is read, and a runtime says most words several times: an id is also a
# reference, a uid also a label. Interned, each is in memory once.


def _containers(answer: api.ListContainersResponse) -> dict[str, ContainerInfo]:
    made = (
        ContainerInfo(intern(one.id), intern(one.metadata.name), intern(one.pod_sandbox_id))
        for one in answer.containers
    )
    return {container.id: container for container in made}


def _pods(answer: api.ListPodSandboxResponse) -> dict[str, PodInfo]:
    """The pods by sandbox id."""
    made = (
        PodInfo(
            intern(pod.id),
            intern(pod.metadata.uid),
            intern(pod.metadata.namespace),
            intern(pod.metadata.name),
            {intern(key): intern(value) for key, value in pod.labels.items()},
            {intern(key): value for key, value in pod.annotations.items() if key.startswith(_OURS)},
            pod.created_at,
        )
        for pod in answer.items
    )
    return {pod.sandbox_id: pod for pod in made}
