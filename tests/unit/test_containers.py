"""Paths of real hosts → what they are. The ids are made up, the shapes are from the files that containers.py names."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from agent.cgroups.containers import CRI_RUNTIMES, Found, Identity, Kind, identify, may_hold

C = "0ca2b3cd20e5f55a2bbe8d4aa3f811cf7963b40f0542ad147054b0fcb60fc400"
D = "84e9ffffe97fea4c5a0f01d401611cbafbf7e559fc6190ed74abfc2b25e889d4"
UID = "29349498-197c-4919-b13f-9a928e7d001b"
ESCAPED = UID.replace("-", "_")
STATIC = "09a70ae9ccc491e651e5c773579b3490"
"""A static pod's: the kubelet's hash of the manifest."""

BURSTABLE = f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{ESCAPED}.slice"
KIND = f"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{ESCAPED}.slice"
NODE = f"system.slice/docker-{D}.scope"
USER = "user.slice/user-1000.slice/user@1000.service"

# (root, below it, what of that is the container, runtime, id, pod)
CONTAINERS = [
    # the kubelet's systemd driver
    ("kubepods.slice", f"{BURSTABLE}/cri-containerd-{C}.scope", "", "containerd", C, UID),
    ("kubepods.slice", f"{BURSTABLE}/crio-{C}.scope", "", "cri-o", C, UID),
    ("kubepods.slice", f"{BURSTABLE}/crio-{C}.scope/container", f"{BURSTABLE}/crio-{C}.scope", "cri-o", C, UID),
    ("kubepods.slice", f"{BURSTABLE}/docker-{C}.scope", "", "docker", C, UID),
    ("kubepods.slice", f"kubepods.slice/kubepods-pod{ESCAPED}.slice/cri-containerd-{C}.scope", "", "containerd", C, UID),
    (
        "kubepods.slice",
        f"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{ESCAPED.upper()}.slice/crio-{C}.scope",
        "",
        "cri-o",
        C,
        UID,
    ),
    (
        "kubepods.slice",
        f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/cri-containerd-{C}.scope",
        "",
        "containerd",
        C,
        STATIC,
    ),
    # the kubelet's cgroupfs driver
    ("kubepods", f"kubepods/burstable/pod{UID}/{C}", "", "", C, UID),
    ("kubepods", f"kubepods/besteffort/pod{UID}/{C}", "", "", C, UID),
    ("kubepods", f"kubepods/pod{UID}/{C}", "", "", C, UID),
    ("kubepods", f"kubepods/burstable/pod{STATIC}/{C}", "", "", C, STATIC),
    ("kubepods", f"kubepods/pod{UID}/crio-{C}", "", "cri-o", C, UID),
    ("kubepods", f"kubepods/besteffort/pod{UID}/crio-{C}/container", f"kubepods/besteffort/pod{UID}/crio-{C}", "cri-o", C, UID),
    # --cgroup-root, kind inside its node and seen from the host, minikube
    ("container.slice", f"container.slice/{BURSTABLE}/cri-containerd-{C}.scope", "", "containerd", C, UID),
    ("kubelet.slice/kubelet-kubepods.slice", f"{KIND}/cri-containerd-{C}.scope", "", "containerd", C, UID),
    ("kubelet.slice", f"{KIND}/cri-containerd-{C}.scope", "", "containerd", C, UID),
    ("kubelet/kubepods", f"kubelet/kubepods/burstable/pod{STATIC}/{C}", "", "", C, STATIC),
    ("kubelet", f"kubelet/kubepods/pod{UID}/{C}", "", "", C, UID),
    (f"{NODE}/kubelet", f"{NODE}/kubelet/kubepods/pod{UID}/{C}", "", "", C, UID),
    (NODE, f"{NODE}/kubelet/kubepods/pod{UID}/{C}", "", "", C, UID),
    (NODE, f"{NODE}/{KIND}/cri-containerd-{C}.scope", "", "containerd", C, UID),
    # the same kind node, when the host's own containers are managed: all of it is the node
    ("system.slice", f"{NODE}/{KIND}/cri-containerd-{C}.scope", NODE, "docker", D, ""),
    ("system.slice", f"{NODE}/init.scope", NODE, "docker", D, ""),
    ("system.slice", f"{NODE}/system.slice/containerd.service", NODE, "docker", D, ""),
    # a root that is a pod, or lies in one
    (BURSTABLE, f"{BURSTABLE}/cri-containerd-{C}.scope", "", "containerd", C, UID),
    (f"kubepods/pod{UID}", f"kubepods/pod{UID}/{C}", "", "", C, UID),
    # nested: systemd in a container, Docker in a pod, a shell of exec in a cgroup of its own
    ("kubepods.slice", f"{BURSTABLE}/cri-containerd-{C}.scope/init.scope", f"{BURSTABLE}/cri-containerd-{C}.scope", "containerd", C, UID),
    ("kubepods", f"kubepods/pod{UID}/{C}/docker/{D}", f"kubepods/pod{UID}/{C}", "", C, UID),
    ("kubepods", f"kubepods/pod{UID}/{C}/kubepods/pod{STATIC}/{D}", f"kubepods/pod{UID}/{C}", "", C, UID),
    ("docker", f"docker/{C}/docker/{D}", f"docker/{C}", "docker", C, ""),
    # Docker
    ("docker", f"docker/{C}", "", "docker", C, ""),
    ("system.slice", f"system.slice/docker-{C}.scope", "", "docker", C, ""),
    ("actions_job", f"actions_job/{C}", "", "", C, ""),
    (USER, f"{USER}/user.slice/docker-{C}.scope", "", "docker", C, ""),
    # Podman
    ("machine.slice", f"machine.slice/libpod-{C}.scope", "", "podman", C, ""),
    ("machine.slice", f"machine.slice/libpod-{C}.scope/container", f"machine.slice/libpod-{C}.scope", "podman", C, ""),
    ("machine.slice", f"machine.slice/machine-libpod_pod_{D}.slice/libpod-{C}.scope", "", "podman", C, ""),
    ("libpod_parent", f"libpod_parent/libpod-{C}", "", "podman", C, ""),
    ("libpod_parent", f"libpod_parent/{D}/libpod-{C}", "", "podman", C, ""),
    ("user.slice", f"{USER}/user.slice/libpod-{C}.scope/container", f"{USER}/user.slice/libpod-{C}.scope", "podman", C, ""),
    ("user.slice", f"{USER}/user.slice/user-libpod_pod_{D}.slice/libpod-{C}.scope", "", "podman", C, ""),
    ("system.slice", f"system.slice/web.service/libpod-payload-{C}", "", "podman", C, ""),
    # containerd alone
    ("default", "default/redis", "", "containerd", "redis", ""),
    ("k8s.io", f"k8s.io/{C}", "", "containerd", C, ""),
    ("system.slice", f"system.slice/nerdctl-{C}.scope", "", "nerdctl", C, ""),
]  # fmt: skip

# (root, path, the cgroup that it belongs to, kind, pod)
OTHERS = [
    ("kubepods.slice", "kubepods.slice/kubepods-burstable.slice", "", Kind.STRUCTURE, ""),
    ("kubepods.slice", BURSTABLE, "", Kind.POD, UID),
    ("kubepods.slice", f"{BURSTABLE}/crio-conmon-{C}.scope", "", Kind.STRUCTURE, ""),
    ("kubepods.slice", f"{BURSTABLE}/crio-{C}", "", Kind.STRUCTURE, ""),
    ("kubepods.slice", f"{BURSTABLE}/stranger", "", Kind.CGROUP, ""),
    ("kubepods", "kubepods/besteffort", "", Kind.STRUCTURE, ""),
    ("kubepods", f"kubepods/besteffort/pod{UID}", "", Kind.POD, UID),
    ("kubepods", f"kubepods/pod{STATIC}", "", Kind.POD, STATIC),
    ("kubepods", f"kubepods/pod{UID}/crio-conmon-{C}", "", Kind.STRUCTURE, ""),
    ("kubelet.slice", "kubelet.slice/kubelet-kubepods.slice", "", Kind.STRUCTURE, ""),
    ("machine.slice", f"machine.slice/libpod-conmon-{C}.scope", "", Kind.STRUCTURE, ""),
    ("machine.slice", f"machine.slice/machine-libpod_pod_{D}.slice", "", Kind.STRUCTURE, ""),
    ("libpod_parent", "libpod_parent/conmon", "", Kind.STRUCTURE, ""),
    ("libpod_parent", f"libpod_parent/{D}", "", Kind.STRUCTURE, ""),
    ("system.slice", "system.slice/ssh.service", "", Kind.CGROUP, ""),
    ("system.slice", "system.slice/ssh.service/worker/1", "system.slice/ssh.service", Kind.CGROUP, ""),
    ("system.slice", "system.slice/system-getty.slice/getty@tty1.service", "system.slice/system-getty.slice", Kind.CGROUP, ""),
    ("jobs", "jobs/build-7", "", Kind.CGROUP, ""),
    ("jobs", "jobs/build-7/init.scope", "jobs/build-7", Kind.CGROUP, ""),
    ("user.slice", f"{USER}/app.slice/bus.service", "user.slice/user-1000.slice", Kind.CGROUP, ""),
    # not 64 digits
    ("docker", f"docker/{C[:-1]}", "", Kind.CGROUP, ""),
    ("docker", f"docker/{C}0", "", Kind.CGROUP, ""),
    ("docker", f"docker/{C.upper()}", "", Kind.CGROUP, ""),
    ("system.slice", f"system.slice/docker-{C}.mount", "", Kind.CGROUP, ""),
    # names that anybody could give: below a plain cgroup, and the CRI's below a service
    ("jobs", f"jobs/build-7/docker-{C}.scope", "jobs/build-7", Kind.CGROUP, ""),
    ("jobs", f"jobs/build-7/{BURSTABLE}/cri-containerd-{C}.scope", "jobs/build-7", Kind.CGROUP, ""),
    ("system.slice", "system.slice/web.service/kubepods.slice", "system.slice/web.service", Kind.CGROUP, ""),
    ("system.slice", f"system.slice/web.service/cri-containerd-{C}.scope", "system.slice/web.service", Kind.CGROUP, ""),
    ("system.slice", f"system.slice/web.service/{BURSTABLE}/libpod-{C}.scope/x/{C}", None, Kind.CONTAINER, ""),
    ("user.slice", f"{USER}/kubepods/pod{UID}/{C}", "user.slice/user-1000.slice", Kind.CGROUP, ""),
]  # fmt: skip


@pytest.mark.parametrize(("root", "path", "own", "runtime", "container", "pod"), CONTAINERS)
def test_containers(root: str, path: str, own: str, runtime: str, container: str, pod: str) -> None:
    expected = Found(PurePosixPath(own or path), Identity(Kind.CONTAINER, runtime, container, pod))
    assert identify(PurePosixPath(path), PurePosixPath(root)) == expected
    assert not may_hold(PurePosixPath(path), PurePosixPath(root)), "nothing in a container is watched"


@pytest.mark.parametrize(("root", "path", "own", "kind", "pod"), OTHERS)
def test_what_is_no_container_of_a_runtime(root: str, path: str, own: str | None, kind: Kind, pod: str) -> None:
    found = identify(PurePosixPath(path), PurePosixPath(root))
    assert found is not None
    assert found.identity.kind is kind
    assert found.identity.pod_uid == pod
    if own is not None:
        assert found.path == PurePosixPath(own or path)


def test_a_service_cannot_pass_for_a_container_of_the_cri() -> None:
    for name in (f"cri-containerd-{C}.scope", f"crio-{C}.scope", C, f"docker-{C}.scope", f"libpod-{C}.scope"):
        found = identify(PurePosixPath("system.slice/web.service") / name, PurePosixPath("system.slice"))
        assert found is not None
        assert found.identity.kind is Kind.CGROUP or found.identity.runtime not in CRI_RUNTIMES
        assert not found.identity.pod_uid


@pytest.mark.parametrize("path", [".", "kubepods.slice", "kubepods.slice2/x", "system.slice/x"])
def test_the_root_and_what_lies_elsewhere_is_nothing(path: str) -> None:
    assert identify(PurePosixPath(path), PurePosixPath("kubepods.slice")) is None


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("kubepods.slice", True),
        (BURSTABLE, True),
        (f"{BURSTABLE}/crio-conmon-{C}.scope", False),
        (f"{BURSTABLE}/stranger", False),
        ("elsewhere", False),
        ("kubepods.slice/" + "/".join(["a.slice"] * 7), True),
        ("kubepods.slice/" + "/".join(["a.slice"] * 8), False),
    ],
)
def test_may_hold(path: str, answer: bool) -> None:
    assert may_hold(PurePosixPath(path), PurePosixPath("kubepods.slice")) is answer
