"""The kit itself: containers that run, where the kernel says they are, with what was asked for; and nothing left."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from tests import need
from tests.node import remains
from tests.node.containerd import Containerd, containerd
from tests.node.images import BUSYBOX, PAUSE, compiled
from tests.node.kubelet import Kubelet, Mount
from tests.node.podman import podman
from tests.node.runc import Runc
from tests.world import Side, World

PROGRAM = """
#include <stdio.h>
int main(void) { puts("hello from C"); return 7; }
"""

SECCOMP = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
}


@pytest.fixture
def parent() -> str:
    """A cgroup of the test's own, made by whoever is given it."""
    return f"/weir-test-{secrets.token_hex(4)}"


def left(path: str) -> list[Path]:
    """The cgroups of this path that there are, of all hierarchies."""
    return [root / path.strip("/") for root in remains.hierarchies() if (root / path.strip("/")).exists()]


def test_container(kubelet: Kubelet) -> None:
    pod = kubelet.pod("shop", "web-0")
    container = kubelet.container(pod, "front")
    cgroup = kubelet.cgroup(container)
    assert cgroup == f"{pod.cgroup}/{container.id}"
    assert left(cgroup), "no such cgroup"
    # cgroup2 too, on hybrid hosts: its line ends /proc/PID/cgroup
    seen = kubelet.exec(container, ["/bin/cat", "/proc/self/cgroup"])
    assert seen.stdout.splitlines()[-1] == f"0::{cgroup}"
    assert kubelet.exec(container, ["/bin/sh", "-c", "echo no >&2; exit 5"]) == (5, "", "no\n")
    kubelet.remove(container)
    assert not left(cgroup)
    kubelet.remove_pod(pod)
    assert not left(pod.cgroup)


def test_end_and_output(node: Containerd, kubelet: Kubelet, tmp_path: Path) -> None:
    image = node.image("weir.test/program:1", {"/bin/program": compiled(PROGRAM, tmp_path / "program")})
    assert all(kubelet.has_image(name) for name in (image, BUSYBOX, PAUSE))
    assert not kubelet.has_image("weir.test/absent:1")
    pod = kubelet.pod("batch", "job")
    container = kubelet.container(pod, "once", image, ["/bin/program"])
    assert kubelet.wait(container) == 7
    kubelet.writes(container, "hello from C\n")
    kubelet.remove_pod(pod)


def test_what_was_asked_for(kubelet: Kubelet, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("a file of the host\n")
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(SECCOMP))
    pod = kubelet.pod("shop", "bound")
    container = kubelet.container(
        pod,
        "front",
        env={"COLOUR": "green"},
        mounts=[Mount(tmp_path, "/given", readonly=True)],
        add=["NET_ADMIN"],
        drop=["ALL"],
        seccomp=profile,
        readonly=True,
        no_new_privs=True,
    )

    def says(script: str) -> str:
        return kubelet.exec(container, ["/bin/sh", "-c", f"{script} 2>&1"]).stdout

    assert says("echo $COLOUR") == "green\n"
    assert says("cat /given/given") == "a file of the host\n"
    assert "Read-only" in says("touch /given/new")
    assert "Read-only" in says("touch /new")
    assert "Function not implemented" in says("mkdir /dev/shm/new")
    status = dict(line.split(":\t") for line in says("cat /proc/self/status").splitlines() if ":\t" in line)
    assert int(status["CapBnd"], 16) == 1 << 12  # CAP_NET_ADMIN of linux/capability.h
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    kubelet.remove_pod(pod)


def test_pods_of_a_network_namespace(tmp_path: Path) -> None:
    need.root()
    with (
        World() as world,
        containerd(tmp_path, netns=Path("/run/netns", world.name(Side.CLIENT))) as c,
        Kubelet(c) as kubelet,
    ):
        pod = kubelet.pod("shop", "out")
        job = kubelet.container(pod, "job", command=["/bin/wget", "-qO-", "http://93.184.216.34/"])
        assert kubelet.wait(job) == 0, kubelet.logs(job)
        assert [(got.address, got.port) for got in world.received()] == [("93.184.216.34", 80)]


def test_nothing_is_left(tmp_path: Path) -> None:
    with containerd(tmp_path) as c:
        with Kubelet(c) as kubelet:
            container = kubelet.container(kubelet.pod("shop", "left"), "front")
            pid = kubelet.pid(container)
        assert remains.started_with(str(c.socket))
        assert left(c.cgroups)
        sockets = [Path(line.split()[-1]) for line in Path("/proc/net/unix").read_text().splitlines()]
        shims = [socket for socket in sockets if socket.parent == Path("/run/containerd/s")]
        assert shims
    assert not remains.alive(pid)
    assert not remains.started_with(str(c.socket))
    assert not left(c.cgroups)
    listening = Path("/proc/net/unix").read_text()
    assert not [socket for socket in shims if socket.exists() and str(socket) not in listening]
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_runc(tmp_path: Path, parent: str) -> None:
    runc = Runc(tmp_path, f"{parent}/kubepods")
    done = runc.run("once", ["/bin/sh", "-c", "tail -n1 /proc/self/cgroup; echo $COLOUR; exit 4"], {"COLOUR": "green"})
    assert (done.returncode, done.stdout) == (4, f"0::{parent}/kubepods/once\ngreen\n"), done.stderr
    with runc.started("long") as pid:
        assert remains.cgroup_of(pid) == runc.cgroup("long") == f"{parent}/kubepods/long"
        inside = runc.exec("long", ["/bin/tail", "-n1", "/proc/self/cgroup"])
        assert inside.stdout == f"0::{runc.cgroup('long')}\n"
    assert not remains.alive(pid)
    runc.remove()
    assert not left(f"{parent}/kubepods")
    remains.remove_cgroups(parent)


def test_podman(tmp_path: Path, parent: str) -> None:
    with podman(tmp_path, parent) as container:
        assert container.cgroup == remains.cgroup_of(container.pid) == f"{parent}/libpod-{container.id}"
        assert left(container.cgroup)
        # The runtime's own program becomes the container's a moment after it has said that it runs.
        remains.wait("sleep", lambda: Path(f"/proc/{container.pid}/comm").read_text() == "sleep\n")
    assert not remains.alive(container.pid)
    assert not left(parent)
