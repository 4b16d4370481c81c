"""The pod of deploy/kubernetes/daemonset.yaml in a test's containerd: every field as a kubelet sends it to the CRI.

with deployed(kubelet, node, folder) as made:
    agent = made.start()
    agent.ready()

What is otherwise than on a node is in `_differences` and `_sources`, and nowhere else.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deploy.manifests import agent_container, daemonset
from tests.node import api_pb2 as api
from tests.node import remains
from tests.node.agent import PATIENCE, Page
from tests.node.containerd import Containerd
from tests.node.kubelet import Container, Kubelet, Mount, Pod, Said
from tests.node.ports import reserve

PROPAGATION = {"HostToContainer": api.PROPAGATION_HOST_TO_CONTAINER, "None": api.PROPAGATION_PRIVATE}
UNITS = {"Mi": 1 << 20}


REGISTRY = "weir.test"
"""In front of the manifest's image, as an overlay puts the own registry there; nobody is asked for it."""


@dataclass
class Deployed(Page):
    """One agent's container."""

    kubelet: Kubelet
    container: Container

    def ready(self) -> None:
        """Wait until its readiness probe holds; fails when it has ended."""
        self.until(lambda: self.get("/readyz")[0] == 200, lambda: self.get("/readyz")[1])

    def until(self, holds: Callable[[], object], otherwise: Callable[[], object] = lambda: "it never came") -> None:
        """Wait for something to hold."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            if self.ended or time.monotonic() > deadline:
                raise AssertionError(f"{otherwise()}\n{self.log[-4000:]}")
            time.sleep(0.05)

    @property
    def ended(self) -> bool:
        """Whether its process has."""
        return self.kubelet.status(self.container).status.state == api.CONTAINER_EXITED

    @property
    def log(self) -> str:
        """What it has written, events and log."""
        return self.kubelet.logs(self.container)

    def exec(self, *command: str) -> Said:
        """`kubectl exec` in it."""
        return self.kubelet.exec(self.container, command)

    def status(self) -> dict[str, Any]:
        """What `weir status --json` says in it."""
        said = self.exec("weir", "status", "--json")
        assert said.code == 0, said
        answer: dict[str, Any] = json.loads(said.stdout)
        return answer

    def end(self) -> int:
        """SIGTERM, as the kubelet ends a pod; its exit status."""
        self.kubelet.stop(
            self.container, grace=daemonset()["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        )
        return self.kubelet.wait(self.container)


@dataclass
class Place:
    """Where the pod's containers keep their things, and how they start."""

    kubelet: Kubelet
    node: Containerd
    folder: Path
    mounts: Path
    pod: Pod
    kept: ExitStack
    made: list[Container] = field(default_factory=list)

    @property
    def root(self) -> str:
        """The managed parent, below the cgroup2 mount: the pod is below it as every other."""
        return f"{self.node.cgroups}/kubepods".strip("/")

    @property
    def bpffs(self) -> Path:
        """A BPF file system of the test's own."""
        return self.mounts / "bpffs"

    @property
    def profiles(self) -> Path:
        """The seccomp directory of the kubelet."""
        return self.folder / "seccomp"

    def write(self, name: str, text: str) -> None:
        """Put a file into the ConfigMap, as a kubelet does: a new directory, then one link is moved to it."""
        volume = self.folder / "policies"
        volume.mkdir(exist_ok=True)
        old, new = volume / "..data", volume / f"..{secrets.token_hex(4)}"
        new.mkdir()
        for file in old.iterdir() if old.exists() else ():
            (new / file.name).write_bytes(file.read_bytes())
        (new / f"{name}.yaml").write_text(text)
        moved = volume / "..data_tmp"
        moved.symlink_to(new.name)
        moved.rename(old)
        link = volume / f"{name}.yaml"
        if not link.is_symlink():
            link.symlink_to(f"..data/{name}.yaml")

    def start(
        self, *arguments: str, without: Sequence[str] = (), add: Sequence[str] = (), seccomp: bool = True
    ) -> Deployed:
        """Start the container of the manifest; with fewer or more capabilities, or without a seccomp filter, if told so."""
        port = reserve(self.kept)
        manifest = agent_container()
        context = manifest["securityContext"]
        environment = {"HOST_IP": "127.0.0.1"}
        assert [item["name"] for item in manifest["env"]] == list(environment)
        arguments_ = [argument.replace("$(HOST_IP)", environment["HOST_IP"]) for argument in manifest["args"]]
        assert context["runAsUser"] == context["runAsGroup"] == 0 and not context["privileged"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        container = self.kubelet.container(
            self.pod,
            f"{manifest['name']}-{len(self.made)}",
            f"{REGISTRY}/{manifest['image']}",
            (),
            args=[*arguments_, *self._differences(port), *arguments],
            env=environment,
            mounts=[self._mount(mount) for mount in manifest["volumeMounts"]],
            add=[*(name for name in context["capabilities"]["add"] if name not in without), *add],
            drop=context["capabilities"]["drop"],
            default_seccomp=seccomp,
            readonly=context["readOnlyRootFilesystem"],
            no_new_privs=not context["allowPrivilegeEscalation"],
            memory=amount(manifest["resources"]["limits"]["memory"]),
        )
        self.made.append(container)
        return Deployed(port, self.kubelet, container)

    def _differences(self, port: int) -> list[str]:
        """What this node has elsewhere than a real one. The default refuses: the manifest's own counts only."""
        return [
            f"--listen=127.0.0.1:{port}",
            f"--root={self.root}",
            f"--cri=/run/containerd/{self.node.socket.name}",
            "--default=closed",
            "--reconcile=2s",
        ]

    def _mount(self, mount: dict[str, Any]) -> Mount:
        propagation = PROPAGATION[mount.get("mountPropagation", "None")]
        source = self._sources()[mount["name"]]
        return Mount(source, mount["mountPath"], mount.get("readOnly", False), propagation)

    def _sources(self) -> dict[str, Path]:
        """Volume → what stands for it. Mounts of other machines are shared, this one's may not be."""
        return {
            "bpffs": self.bpffs,
            **{name: self.mounts / name for name in ("cgroups", "containerd", "crio")},
            "run": self.folder / "run",
            "seccomp": self.profiles / "weir",
            "policies": self.folder / "policies",
            "tmp": self.mounts / "tmp",
        }

    def mount(self) -> None:
        """Make the volumes."""
        real = {volume["name"]: volume for volume in daemonset()["spec"]["template"]["spec"]["volumes"]}
        for directory in self._sources().values():
            directory.mkdir(parents=True, exist_ok=True)
        (self.folder / "no-crio").mkdir()
        # Not what containers have mounted below containerd's: in this namespace it would not go with them.
        self._bind("--bind", self.node.directory, "containerd")
        self._bind("--bind", self.folder / "no-crio", "crio")
        self._bind("--rbind", real["cgroups"]["hostPath"]["path"], "cgroups")
        run("mount", "-t", "bpf", "bpf", str(self.bpffs))
        run("mount", "--make-shared", str(self.bpffs))
        size = amount(real["tmp"]["emptyDir"]["sizeLimit"])
        run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self._sources()["tmp"]))

    def _bind(self, how: str, source: Path | str, name: str) -> None:
        """Have a directory a second time, shared as on a node, where it is not."""
        target = str(self._sources()[name])
        run("mount", how, str(source), target)
        run("mount", "--make-rprivate", target)  # or else what is unmounted below it would go from its source, too
        run("mount", "--make-rshared", target)


def amount(text: str) -> int:
    """Bytes of a quantity of Kubernetes: 16Mi."""
    return int(text[:-2]) * UNITS[text[-2:]]


def run(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True)


def remove_directories(mounts: Path) -> None:
    """Remove a directory of empty ones; one that something is mounted on is not."""
    for directory in mounts.iterdir():
        directory.rmdir()
    mounts.rmdir()


@contextmanager
def deployed(kubelet: Kubelet, node: Containerd, folder: Path) -> Iterator[Place]:
    """The pod, without its container. At the end all of it is gone."""
    spec = daemonset()["spec"]["template"]
    assert spec["spec"]["hostPID"] and spec["spec"]["hostNetwork"]
    folder.mkdir()
    pod = kubelet.pod(
        daemonset()["metadata"]["namespace"],
        f"weir-{secrets.token_hex(3)}",
        labels=spec["metadata"]["labels"],
        annotations=spec["metadata"].get("annotations", {}),
        host_pid=True,
    )
    # Not below pytest's directories: it removes old ones whole, whatever is mounted there.
    mounts = Path(tempfile.mkdtemp(prefix="weir-test-", dir="/run"))
    with ExitStack() as stack:
        stack.callback(remove_directories, mounts)
        stack.callback(kubelet.remove_pod, pod)
        stack.callback(remains.unmount_below, mounts)
        place = Place(kubelet, node, folder, mounts, pod, stack)
        place.mount()
        yield place
    bugs = [line for made in place.made for line in kubelet.logs(made).splitlines() if "Traceback" in line]
    assert not bugs, bugs
