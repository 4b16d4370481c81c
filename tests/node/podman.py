"""One container by Podman: cgroupfs, its own storage, nothing pulled, the caller's network.

with podman(tmp_path, parent="/weir-test-1/machine") as container:
    container.pid, container.cgroup
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import need
from tests.node import images, remains
from tests.node.kubelet import FOREVER


@dataclass(frozen=True)
class Container:
    """A container that runs. ``cgroup`` is its cgroup2 path, from the root of the tree."""

    id: str
    pid: int
    cgroup: str


@contextmanager
def podman(
    directory: Path, parent: str, command: Sequence[str] = FOREVER, name: str = "weir-test"
) -> Iterator[Container]:
    """A container of busybox below the cgroup ``parent``, which is a test's own (/weir-test-…).

    Skips the running test when podman, runc or busybox is missing, or without root.
    """
    need.root()
    need.command("runc")
    base = [need.command("podman"), "--root", str(directory / "storage"), "--runroot", str(directory / "run"),
            "--tmpdir", str(directory / "tmp"), "--cgroup-manager", "cgroupfs", "--runtime", "runc",
            "--storage-driver", "vfs", "--events-backend", "file"]  # fmt: skip

    def run(*arguments: str) -> str:
        done = subprocess.run([*base, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr}"
        return done.stdout.strip()

    # Podman's own limits are higher than a root without CAP_SYS_RESOURCE may set.
    limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]
    tree = images.rootfs(directory / "rootfs")
    try:
        identity = run("run", "--detach", "--name", name, "--cgroup-parent", parent, "--network", "host", *limits,
                       "--security-opt", "apparmor=unconfined", "--rootfs", str(tree), *command)  # fmt: skip
        pid = int(run("inspect", "--format", "{{.State.Pid}}", name))
        yield Container(identity, pid, remains.cgroup_of(pid))
    finally:
        run("rm", "--all", "--force", "--time", "0")
        remains.unmount_below(directory)
        remains.remove_cgroups(parent)
