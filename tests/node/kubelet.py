"""What a kubelet does, through the CRI socket: pods, their containers, commands in them, their logs and their ends.

pod = kubelet.pod("shop", "web-0", labels={"app": "web"})
job = kubelet.container(pod, "job", command=["/bin/wget", "-O-", "http://93.184.216.34/"])
assert kubelet.wait(job) == 0
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import grpc

from tests.node import api_pb2 as api
from tests.node import images, remains
from tests.node.containerd import Containerd
from tests.node.cri import TIMEOUT, Calls

FOREVER = ("/bin/sleep", "1000000000")
"""A command that runs until it is killed."""


@dataclass(frozen=True)
class Pod:
    """A sandbox that runs. ``cgroup`` is its cgroup's path from the root of each hierarchy."""

    id: str
    uid: str
    namespace: str
    name: str
    cgroup: str
    config: api.PodSandboxConfig


@dataclass(frozen=True)
class Container:
    """A container that was made, running or not. ``log`` is the file of its output, in the CRI's format."""

    id: str
    name: str
    pod: Pod
    log: Path


@dataclass(frozen=True)
class Mount:
    """A directory or file of the host in a container."""

    host: Path
    container: str
    readonly: bool = False
    propagation: api.MountPropagation = api.PROPAGATION_PRIVATE


class Said(NamedTuple):
    """How a command in a container ended, and what it said."""

    code: int
    stdout: str
    stderr: str


@final
class Kubelet:
    """A kubelet of one containerd. Close it, or use it by `with`."""

    def __init__(self, c: Containerd) -> None:
        self._c = c
        self._call = Calls(c.socket)

    def __enter__(self) -> Kubelet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; pods run on."""
        self._call.close()

    def pod(
        self,
        namespace: str,
        name: str,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        *,
        cgroup_parent: str | None = None,
        uid: str | None = None,
        attempt: int = 0,
        host_pid: bool = False,
    ) -> Pod:
        """Start a pod on the host's network.

        ``cgroup_parent`` is the pod's own cgroup, by default CGROUPS/kubepods/besteffort/podUID as the cgroupfs driver
        of a kubelet has it, below the containerd's own. The labels that a kubelet adds are added. ``attempt`` counts the
        sandboxes of one pod (one uid).
        """
        uid = uid or str(uuid.uuid4())
        cgroup = cgroup_parent or f"{self._c.cgroups}/kubepods/besteffort/pod{uid}"
        assert cgroup.startswith(self._c.cgroups), f"{cgroup} would stay behind: use a path below {self._c.cgroups}"
        own = {
            "io.kubernetes.pod.name": name,
            "io.kubernetes.pod.namespace": namespace,
            "io.kubernetes.pod.uid": uid,
        }
        namespaces = api.NamespaceOption(network=api.NODE, pid=api.NODE if host_pid else api.CONTAINER)
        logs = self._c.directory / "logs" / uid
        logs.mkdir(parents=True, exist_ok=True)
        config = api.PodSandboxConfig(
            metadata=api.PodSandboxMetadata(name=name, uid=uid, namespace=namespace, attempt=attempt),
            log_directory=str(logs),
            labels={**own, **(labels or {})},
            annotations=annotations or {},
            linux=api.LinuxPodSandboxConfig(
                cgroup_parent=cgroup, security_context=api.LinuxSandboxSecurityContext(namespace_options=namespaces)
            ),
        )
        answer = self._call("RunPodSandbox", api.RunPodSandboxRequest(config=config), api.RunPodSandboxResponse)
        return Pod(answer.pod_sandbox_id, uid, namespace, name, cgroup, config)

    def container(
        self,
        pod: Pod,
        name: str,
        image: str = images.BUSYBOX,
        command: Sequence[str] = FOREVER,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        mounts: Sequence[Mount] = (),
        add: Sequence[str] = (),
        drop: Sequence[str] = (),
        seccomp: Path | None = None,
        default_seccomp: bool = False,
        memory: int = 0,
        readonly: bool = False,
        no_new_privs: bool = False,
        privileged: bool = False,
        annotations: Mapping[str, str] | None = None,
        start: bool = True,
    ) -> Container:
        """Make a container and, unless told otherwise, start it.

        ``add`` and ``drop`` are capabilities without CAP_; "ALL" is all. ``seccomp`` is a profile's file (the kubelet's
        localhostProfile, whole path), ``default_seccomp`` the runtime's own, by default there is no filter. ``readonly`` is
        the root file system. Without a command it is the image's, followed by ``args``. ``memory`` is a limit in bytes.
        """
        assert image, "name an image"
        profile = api.SecurityProfile(profile_type=api.SecurityProfile.Unconfined)
        if seccomp is not None:
            profile = api.SecurityProfile(profile_type=api.SecurityProfile.Localhost, localhost_ref=str(seccomp))
        elif default_seccomp:
            profile = api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault)
        config = api.ContainerConfig(
            metadata=api.ContainerMetadata(name=name),
            image=api.ImageSpec(image=image),
            command=command,
            args=args,
            envs=[api.KeyValue(key=key, value=value) for key, value in (env or {}).items()],
            mounts=[
                api.Mount(
                    host_path=str(mount.host),
                    container_path=mount.container,
                    readonly=mount.readonly,
                    propagation=mount.propagation,
                )
                for mount in mounts
            ],
            labels={
                "io.kubernetes.container.name": name,
                "io.kubernetes.pod.name": pod.name,
                "io.kubernetes.pod.namespace": pod.namespace,
                "io.kubernetes.pod.uid": pod.uid,
            },
            annotations=annotations or {},
            log_path=f"{name}.log",
            linux=api.LinuxContainerConfig(
                resources=api.LinuxContainerResources(memory_limit_in_bytes=memory),
                security_context=api.LinuxContainerSecurityContext(
                    capabilities=api.Capability(add_capabilities=add, drop_capabilities=drop),
                    privileged=privileged,
                    namespace_options=pod.config.linux.security_context.namespace_options,
                    readonly_rootfs=readonly,
                    no_new_privs=no_new_privs,
                    seccomp=profile,
                ),
            ),
        )
        request = api.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
        answer = self._call("CreateContainer", request, api.CreateContainerResponse)
        made = Container(answer.container_id, name, pod, Path(pod.config.log_directory) / f"{name}.log")
        if start:
            self.start(made)
        return made

    def start(self, container: Container) -> None:
        """Start a container that was made with ``start=False``."""
        self._call("StartContainer", api.StartContainerRequest(container_id=container.id), api.StartContainerResponse)

    def status(self, container: Container) -> api.ContainerStatusResponse:
        """What the runtime says of a container; ``info`` has more, as JSON."""
        request = api.ContainerStatusRequest(container_id=container.id, verbose=True)
        return self._call("ContainerStatus", request, api.ContainerStatusResponse)

    def pid(self, container: Container) -> int:
        """The pid, on the host, of a running container's first process."""
        return int(json.loads(self.status(container).info["info"])["pid"])

    def cgroup(self, container: Container) -> str:
        """The cgroup2 path of a running container, from the root of the tree: the line 0:: of its /proc/PID/cgroup."""
        return remains.cgroup_of(self.pid(container))

    def wait(self, container: Container) -> int:
        """Wait until a container has ended; its exit code."""
        end = time.monotonic() + TIMEOUT
        while True:
            status = self.status(container).status
            if status.state == api.CONTAINER_EXITED:
                return status.exit_code
            assert time.monotonic() < end, f"container {container.name} has not ended"
            time.sleep(0.01)

    def logs(self, container: Container) -> str:
        """What a container has written, standard output and standard error as they came.

        The runtime writes it down a moment later, also when the container has ended meanwhile.
        """
        # A line is TIME STREAM TAG TEXT; tag P says that the line goes on (the CRI's logging format).
        lines = container.log.read_text().splitlines(keepends=True)
        parts = [line.rstrip("\n").split(" ", 3) for line in lines if line.endswith("\n")]
        return "".join(text + ("" if tag == "P" else "\n") for _, _, tag, text in parts)

    def writes(self, container: Container, text: str) -> None:
        """Wait until a container's output is this text."""
        remains.wait(f"{container.name} to write {text!r}", lambda: self.logs(container) == text)

    def exec(self, container: Container, command: Sequence[str]) -> Said:
        """Run a command in a running container, as `kubectl exec` does; how it ended."""
        request = api.ExecSyncRequest(container_id=container.id, cmd=command, timeout=int(TIMEOUT))
        answer = self._call("ExecSync", request, api.ExecSyncResponse)
        return Said(answer.exit_code, answer.stdout.decode(), answer.stderr.decode())

    def has_image(self, name: str) -> bool:
        """True when the runtime has an image."""
        request = api.ImageStatusRequest(image=api.ImageSpec(image=name))
        return bool(self._call("ImageStatus", request, api.ImageStatusResponse, "ImageService").image.id)

    def stop(self, container: Container, grace: int = 0) -> None:
        """Stop a container: SIGTERM and, after ``grace`` seconds, SIGKILL."""
        request = api.StopContainerRequest(container_id=container.id, timeout=grace)
        self._call("StopContainer", request, api.StopContainerResponse)

    def remove(self, container: Container) -> None:
        """Stop a container and forget it."""
        request = api.RemoveContainerRequest(container_id=container.id)
        self._call("RemoveContainer", request, api.RemoveContainerResponse)

    def stop_pod(self, pod: Pod) -> None:
        """Stop a pod and its containers; the runtime still lists them."""
        self._call("StopPodSandbox", api.StopPodSandboxRequest(pod_sandbox_id=pod.id), api.StopPodSandboxResponse)

    def remove_pod(self, pod: Pod) -> None:
        """Stop a pod, forget it and its containers, and remove its cgroup unless a newer sandbox of the pod is in it.

        Like a kubelet it tries again: containerd hears of a container's end a moment later than it stops the sandbox.
        """
        remains.wait(f"{pod.name} to be removed", lambda: self._is_removed(pod))
        remains.remove_empty_cgroups(pod.cgroup)

    def _is_removed(self, pod: Pod) -> bool:
        request = api.RemovePodSandboxRequest(pod_sandbox_id=pod.id)
        try:
            self.stop_pod(pod)
            self._call("RemovePodSandbox", request, api.RemovePodSandboxResponse)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNKNOWN:  # "container is still running", "failed to kill container"
                return False
            raise
        return True
