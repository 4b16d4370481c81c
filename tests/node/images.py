"""Root file systems and images made on the spot: busybox, and whatever files a test gives. No registry, no network."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import need

BUSYBOX = "weir.test/busybox:1"
"""The image of every container that names no other: busybox with all its commands, and /tmp."""

PAUSE = "weir.test/pause:1"
"""What holds a pod's namespaces, as registry.k8s.io/pause does: sleeps until it is killed."""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # the names of the OCI image specification


def rootfs(directory: Path, files: Mapping[str, Path] | None = None) -> Path:
    """Fill ``directory`` with busybox and ``files`` (path inside → file here; modes are kept); returns it.

    Skips the running test when busybox-static is not installed.
    """
    busybox = need.command("busybox")
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "var"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "tmp").chmod(0o1777)
    shutil.copy2(busybox, directory / "bin/busybox")
    commands = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for name in commands:
        if name != "busybox":
            (directory / "bin" / name).symlink_to("busybox")
    (directory / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
    (directory / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    for inside, here in (files or {}).items():
        target = directory / inside.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(here, target)
    return directory


def compiled(source: str, output: Path) -> Path:
    """A static program from the text of a C file; returns ``output``. Skips the running test without gcc."""
    command = [need.command("gcc"), "-static", "-O2", "-Wall", "-Werror", "-o", str(output), "-x", "c", "-"]
    subprocess.run(command, input=source, text=True, check=True)
    return output


def archive(tree: Path, tar: Path, name: str, command: Sequence[str] = ("/bin/sh",)) -> Path:
    """Make an image ``name`` of one layer of ``tree``, in the format of `docker save`; returns ``tar``.

    containerd (`ctr images import`) and Podman (`podman load`) take it.
    """

    def of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as file:
        for path in sorted(tree.iterdir()):
            file.add(path, arcname=path.name, filter=of_root)
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Cmd": list(command), "Env": ["PATH=/bin"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    parts = {
        "manifest.json": json.dumps(manifest).encode(),
        "config.json": json.dumps(config).encode(),
        "layer.tar": layer.getvalue(),
    }
    with tarfile.open(tar, mode="w") as file:
        for part, data in parts.items():
            member = tarfile.TarInfo(part)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return tar
