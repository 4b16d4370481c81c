"""Debian's containerd for one test: its own root, state, socket and cgroups; nothing of it is left at the end.

    with containerd(tmp_path) as c:
        kubelet = Kubelet(c)

The images BUSYBOX and PAUSE of tests/node/images.py are there. Pods use the host's network, or that of the namespace
that containerd was started in: no CNI plugin is needed.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc

from tests import need
from tests.node import images, remains
from tests.node.api_pb2 import VersionRequest, VersionResponse
from tests.node.cri import Calls

_PATIENCE = 300.0  # seconds until it answers; a free machine needs less than one

_CONFIG = """\
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs"]

[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  # A lower value than containerd's own needs CAP_SYS_RESOURCE, which some virtual machines withhold from root.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{directory}/cni"
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = "{directory}/runc"
        SystemdCgroup = false
"""


class Containerd:
    """One containerd. ``cgroups`` is the cgroup that all its containers are below, in every hierarchy."""

    def __init__(self, directory: Path, prefix: Sequence[str], snapshotter: str) -> None:
        self.directory = directory
        self.socket = directory / "c.sock"
        self.cgroups = f"/weir-test-{os.getpid()}-{secrets.token_hex(2)}"
        self._snapshotter = snapshotter
        self._config = directory / "config.toml"
        self._command = [*prefix, need.command("containerd"), "--config", str(self._config)]
        self._process: subprocess.Popen[bytes] | None = None
        self._config.write_text(
            _CONFIG.format(directory=directory, socket=self.socket, pause=images.PAUSE, snapshotter=snapshotter)
        )

    @property
    def pid(self) -> int:
        """The daemon's pid; it must be running."""
        assert self._process is not None, "containerd is not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has written since the first start."""
        return (self.directory / "log").read_text()

    def start(self) -> None:
        """Start it and wait until its CRI answers."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + _PATIENCE
        with Calls(self.socket) as call:
            while True:
                try:
                    call("Version", VersionRequest(), VersionResponse)
                except grpc.RpcError as e:
                    assert self._process.poll() is None, f"containerd ended:\n{self.log}"
                    assert time.monotonic() < end, f"containerd does not answer: {e}\n{self.log}"
                    time.sleep(0.02)
                else:
                    return

    def stop(self) -> None:
        """End it as systemd does; its containers run on."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        """Kill it; its containers run on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """stop() and start()."""
        self.stop()
        self.start()

    def ctr(self, *arguments: str | Path) -> str:
        """What `ctr` says, in the namespace of the CRI."""
        command = ["ctr", "--address", str(self.socket), "--namespace", "k8s.io", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def load(self, tar: Path, name: str) -> None:
        """Import the image ``name`` from an archive of images.archive, and wait until the CRI knows it."""
        self.ctr("images", "import", "--snapshotter", self._snapshotter, tar)
        # The CRI hears of it by an event, and then marks it.
        mark = "io.cri-containerd.image=managed"
        remains.wait(f"the CRI to see {name}", lambda: mark in self.ctr("images", "list", f"name=={name}"))

    def image(self, name: str, files: dict[str, Path], command: Sequence[str] = ("/bin/sh",)) -> str:
        """Make and load an image of busybox and ``files`` (see images.rootfs); returns its name."""
        stem = name.replace("/", "-").replace(":", "-")
        tree = images.rootfs(self.directory / "images" / stem, files)
        self.load(images.archive(tree, self.directory / f"{stem}.tar", name, command), name)
        return name

    def remove(self) -> None:
        """End everything of it: the daemon, its shims, their containers, mounts and cgroups."""
        self.kill()
        shims = remains.started_with(str(self.socket))
        remains.kill([pid for shim in shims for pid in remains.descendants(shim)])
        remains.kill(shims)
        self._remove_shim_sockets()
        remains.unmount_below(self.directory)
        remains.remove_cgroups(self.cgroups)

    def _remove_shim_sockets(self) -> None:
        """The one thing outside the directory: /run/containerd/s, whatever the configuration says, for all containerds."""
        for address in self.directory.glob("state/io.containerd.runtime.v2.task/*/*/address"):
            socket = Path(address.read_text().removeprefix("unix://"))
            socket.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: another's are there
                socket.parent.rmdir()


@contextmanager
def containerd(directory: Path, *, netns: Path | None = None, snapshotter: str = "overlayfs") -> Iterator[Containerd]:
    """A containerd that runs, in ``directory`` and, when given, in the network namespace at ``netns`` (/run/netns/…).

    ``snapshotter``: "native" where the directory's file system is an overlay itself. Skips the running test when
    containerd, runc or busybox is missing, or without root.
    """
    need.root()
    for command in ("containerd", "ctr", "runc", "busybox"):
        need.command(command)
    c = Containerd(directory, [] if netns is None else ["nsenter", f"--net={netns}"], snapshotter)
    try:
        c.start()
        c.image(images.PAUSE, {}, ["/bin/sleep", "1000000000"])
        c.image(images.BUSYBOX, {})
        yield c
    finally:
        c.remove()
