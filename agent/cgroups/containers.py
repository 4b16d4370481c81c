"""Which container a cgroup belongs to, from its path alone; pure.

Where the names come from, by project and file:
  kubelet         pkg/kubelet/cm/cgroup_manager_linux.go (systemd: - becomes _, parts joined by -), pod_container_manager_linux.go
  containerd      internal/cri/server/helpers.go: getCgroupsPath; pkg/oci/spec.go: /NAMESPACE/ID when no path is given
  CRI-O           internal/config/cgmgr: crio-ID(.scope), crio-conmon-ID(.scope), the empty crio-ID of a dropped sandbox (with its
                  cgroupfs manager it looks like a container and is taken for one, POD); recorded in tests/node/cri_o.json
  Podman          libpod/container_internal_linux.go: libpod-ID(.scope), libpod-payload-ID; pod_internal_linux.go; libpod/container.go
  crun, systemd   whatever they make below a container's cgroup is that container's
  cAdvisor        lib/container/crio/factory.go and Tetragon pkg/sensors/exec/procevents/proc_test.go: the same paths, met in the wild
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from sys import intern


class Kind(str, Enum):
    """What a cgroup below a managed parent is. STRUCTURE holds containers, or is a runtime's own (conmon)."""

    CONTAINER = "container"
    POD = "pod"
    STRUCTURE = "structure"
    CGROUP = "cgroup"


@dataclass(frozen=True, slots=True)
class Identity:
    """``runtime`` is "" where the path does not tell: a bare id below a pod is containerd's or cri-dockerd's.

    ``pod_uid`` is as the CRI's label io.kubernetes.pod.uid has it: dashes and lower case, or a static pod's 32 hex digits.
    """

    kind: Kind
    runtime: str = ""
    id: str = ""
    pod_uid: str = ""


@dataclass(frozen=True)
class Found:
    """``path`` is the cgroup that the answer is about, below the mount: the one asked for, or what it belongs to."""

    path: PurePosixPath
    identity: Identity


CRI_RUNTIMES = frozenset({"containerd", "cri-o", ""})
"""Ask the CRI about containers of these only: the names of the others can be made up by users of the host (``_OWNED``)."""

_RUNTIMES = {
    "cri-containerd": "containerd",
    "crio": "cri-o",
    "docker": "docker",
    "libpod": "podman",
    "libpod-payload": "podman",
}
"""Prefix of a cgroup's name → runtime; any other prefix (nerdctl, runc) is the runtime's name."""

_OWNED = {"docker", "nerdctl", "podman"}
"""Runtimes that put containers below a systemd service: rootless ones below user@UID.service, Podman's --cgroups=split.

Whoever a service belongs to can name cgroups as he likes; so nothing there is taken for a container of the CRI or a pod.
"""

_CONTAINERD_NAMESPACES = {"default", "k8s.io", "moby"}
_QOS = {"burstable", "besteffort", "guaranteed"}
_DEEPEST = 8
"""Levels below a root where containers are looked for; real layouts need 6 (a pod of rootless Podman below user.slice)."""

_CONTAINER = re.compile(r"(?:(?P<prefix>[a-z][a-z0-9_-]*)-)?(?P<id>[0-9a-f]{64})(?P<scope>\.scope)?")
_CONMON = re.compile(r"(?:[a-z]+-)?conmon(?:-[0-9a-f]{64})?(?:\.scope)?")
_POD_SLICE = re.compile(r"(?:.+-)?kubepods(?:-(?:burstable|besteffort|guaranteed))?-pod(?P<uid>[0-9A-Za-z_.]+)\.slice")
_POD_DIRECTORY = re.compile(r"pod(?P<uid>[0-9A-Za-z_.-]+)")
_STRUCTURE_SLICE = re.compile(
    r"(?:.+-)?kubepods(?:-(?:burstable|besteffort|guaranteed))?\.slice|(?:.+-)?libpod_pod_[0-9a-f]{64}\.slice"
)


def identify(relative: PurePosixPath, root: PurePosixPath) -> Found | None:
    """What a cgroup is, or the outermost container below ``root`` that it lies in. Both paths are below the mount.

    What is no container and no structure belongs to a plain cgroup: the outermost one below ``root`` that is not
    structure. None for ``root`` itself and for what is not below it.
    """
    walked = _walk(relative, root)
    return walked[0] if walked else None


def may_hold(relative: PurePosixPath, root: PurePosixPath) -> bool:
    """True when containers can lie below this cgroup, so that it is worth watching."""
    walked = _walk(relative, root)
    return walked[1] if walked else relative == root


def _walk(relative: PurePosixPath, root: PurePosixPath) -> tuple[Found, bool] | None:
    """The answer, and whether one of its descendants could have another."""
    names, start = relative.parts, len(root.parts)
    if len(names) <= start or names[:start] != root.parts:
        return None
    pod_uid = _pod_of(names[:start])
    plain, kind, service = -1, Kind.STRUCTURE, False
    for i in range(start, len(names)):
        above, name = names[:i], names[i]
        if _is_plumbing(above, name):
            return Found(_first(relative, i + 1), Identity(Kind.STRUCTURE)), False
        container = _container(above, name)
        if container and (not service or container[0] in _OWNED):
            identity = Identity(Kind.CONTAINER, intern(container[0]), intern(container[1]), intern(pod_uid))
            return Found(_first(relative, i + 1), identity), False
        uid = "" if service else _pod(above, name)
        if uid:
            pod_uid, kind = uid, Kind.POD
        elif not service and _is_structure(above, name):
            kind = Kind.STRUCTURE
        else:
            kind, plain = Kind.CGROUP, i if plain < 0 else plain
            service = service or name.endswith(".service")
            if not name.endswith((".slice", ".service")) and name != "kubelet":
                return Found(_first(relative, plain + 1), Identity(Kind.CGROUP)), False
    deeper = len(names) - start < _DEEPEST
    if kind is Kind.CGROUP:
        return Found(_first(relative, plain + 1), Identity(Kind.CGROUP)), deeper
    return Found(relative, Identity(kind, pod_uid=intern(pod_uid))), deeper


def _first(path: PurePosixPath, count: int) -> PurePosixPath:
    """The first names of a path."""
    return path if count == len(path.parts) else PurePosixPath(*path.parts[:count])


def _container(above: tuple[str, ...], name: str) -> tuple[str, str] | None:
    """(runtime, id) when the name is a container's. ``above``: the names from the mount to its parent."""
    parent = above[-1] if above else ""
    match = _CONTAINER.fullmatch(name)
    if match:
        prefix = match["prefix"]
        if prefix:
            return _RUNTIMES.get(prefix, prefix), match["id"]
        if parent == "libpod_parent":
            return None
        return "containerd" if parent in _CONTAINERD_NAMESPACES else "docker" if parent == "docker" else "", match["id"]
    if len(above) == 1 and parent in _CONTAINERD_NAMESPACES:
        return "containerd", name
    return None


def _is_plumbing(above: tuple[str, ...], name: str) -> bool:
    """True for a container monitor's cgroup, and for the empty one that CRI-O makes beside the scopes for cAdvisor."""
    match = _CONTAINER.fullmatch(name)
    empty = match is not None and match["prefix"] == "crio" and not match["scope"] and above[-1:] != ()
    return _CONMON.fullmatch(name) is not None or (empty and above[-1].endswith(".slice"))


def _is_structure(above: tuple[str, ...], name: str) -> bool:
    """True for kubepods, its QoS levels, and Podman's pods."""
    parent = above[-1] if above else ""
    if name == "kubepods" or (name in _QOS and parent == "kubepods"):
        return True
    return _STRUCTURE_SLICE.fullmatch(name) is not None or (
        parent == "libpod_parent" and _CONTAINER.fullmatch(name) is not None
    )


def _pod(above: tuple[str, ...], name: str) -> str:
    """The uid of the pod whose cgroup this is, else ""."""
    match = _POD_SLICE.fullmatch(name)
    if match:
        return match["uid"].replace("_", "-").lower()
    if above[-1:] == ("kubepods",) or (above[-2:-1] == ("kubepods",) and above[-1] in _QOS):
        match = _POD_DIRECTORY.fullmatch(name)
    return match["uid"].lower() if match else ""


def _pod_of(names: tuple[str, ...]) -> str:
    """The pod that a root lies in or is, else ""."""
    return next((uid for i in range(len(names) - 1, -1, -1) if (uid := _pod(names[:i], names[i]))), "")
