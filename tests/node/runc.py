"""runc alone: one-shot containers from a bundle, without a daemon; the fastest way to make one.

runc = Runc(tmp_path, "/weir-test-1/kubepods")
done = runc.run("a", ["/bin/wget", "-O-", "http://93.184.216.34/"])
with runc.started("b") as pid: ...
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests import need
from tests.node import images, remains
from tests.node.kubelet import FOREVER

_CAPABILITIES = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
]

_MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
    {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]},
]


class Runc:
    """Containers below one cgroup, which is a test's own: /weir-test-…. They share one read-only root file system.

    ``netns``: the path of the network namespace they run in (/run/netns/…), by default the caller's. Skips the running
    test when runc or busybox is missing, or without root.
    """

    def __init__(
        self, directory: Path, parent: str, files: Mapping[str, Path] | None = None, netns: Path | None = None
    ) -> None:
        need.root()
        self._runc = [need.command("runc"), "--root", str(directory / "runc")]
        self._directory = directory
        self._parent = parent
        self._netns = netns
        self._rootfs = images.rootfs(directory / "rootfs", files)

    def cgroup(self, name: str) -> str:
        """The cgroup of a container, from the root of each hierarchy."""
        return f"{self._parent}/{name}"

    def bundle(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> Path:
        """Write the bundle of a container; `run` and `started` do it by themselves."""
        namespaces: list[dict[str, str]] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
        if self._netns is not None:
            namespaces.append({"type": "network", "path": str(self._netns)})
        spec = {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": list(command),
                "env": [f"{key}={value}" for key, value in {"PATH": "/bin", **(env or {})}.items()],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            },
            "root": {"path": str(self._rootfs), "readonly": True},
            "mounts": _MOUNTS,
            "linux": {"cgroupsPath": self.cgroup(name), "namespaces": namespaces},
        }
        bundle = self._directory / "bundles" / name
        bundle.mkdir(parents=True, exist_ok=True)
        (bundle / "config.json").write_text(json.dumps(spec))
        return bundle

    def command(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """The command line that runs a container to its end, for a test that starts many itself."""
        return [*self._runc, "run", "--bundle", str(self.bundle(name, command, env)), name]

    def run(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a container to its end: its exit code and output. runc removes it and its cgroup."""
        return subprocess.run(self.command(name, command, env), capture_output=True, text=True, check=False)

    def exec(self, name: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in a running container to its end, as `runc exec` does."""
        return subprocess.run([*self._runc, "exec", name, *command], capture_output=True, text=True, check=False)

    @contextmanager
    def started(self, name: str, command: Sequence[str] = FOREVER) -> Iterator[int]:
        """A container that runs until the end of the `with`; gives the pid of its first process."""
        arguments = ["--detach", "--bundle", str(self.bundle(name, command)), name]
        null = subprocess.DEVNULL  # the container keeps what it inherits
        subprocess.run([*self._runc, "run", *arguments], stdin=null, stdout=null, stderr=null, check=True)
        try:
            yield int(json.loads(subprocess.check_output([*self._runc, "state", name]))["pid"])
        finally:
            subprocess.run([*self._runc, "delete", "--force", name], check=True)

    def remove(self) -> None:
        """Take away what a killed test would leave: mounts and every cgroup below the parent."""
        remains.remove_cgroups(self._parent)
        remains.unmount_below(self._directory)
