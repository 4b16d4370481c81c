"""Profiles in the hands of runc: each call in a real container gets the answer that the profile says, and programs still start.

Every errno of a profile is marked, so that an answer says whether the filter or the kernel gave it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from errno import EACCES, EAFNOSUPPORT, ENOSPC, ENOSYS
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from agent.errors import WeirError
from agent.node import profiles
from agent.policy import find
from agent.policy.model import Mode
from agent.seccomp import base, oci
from agent.seccomp.merge import merge
from tests import need
from tests.kernel.test_seccomp import KILLED, MARK, build, lines
from tests.node import remains
from tests.node.containerd import Containerd
from tests.node.kubelet import Kubelet
from tests.node.runc import Runc
from tests.seccomp_oci import verdicts

DEBIAN = Path("/usr/share/containers/seccomp.json")
Json = dict[str, Any]

HIGH = 1 << 32
SOCKETS = [
    ("socket", family, type_, protocol)
    for family in (0, 1, 2, 3, 10, 16, 17, 38, 40, 1 << 31, HIGH | 2, HIGH | 16)
    for type_ in (1, 2, 3, 5, 10, 0x80801, HIGH | 2)
    for protocol in (0, 6, 9, 17, 58, 132, 262, HIGH | 6)
]
OTHERS = [
    *(("socketpair", family, 1, 0) for family in (1, 2, 16, HIGH | 1)),
    ("bind", 3, 0, 16),
    ("listen", 3, 1),
    ("accept", 3, 0, 0),
    ("accept4", 3, 0, 0, 0),
    ("io_uring_setup", 0, 0),
    ("io_uring_enter", 3, 1, 0, 0, 0, 0),
    ("io_uring_register", 3, 0, 0, 0),
    ("pidfd_getfd", 3, 0, 0),
    ("ptrace", 99, 1, 0, 0),
    ("request_key", 0, 0, 0, 0),
    ("add_key", 0, 0, 0, 0, 0),
    ("keyctl", 99, 0, 0),
    ("getppid",),
]
CALLS = [*SOCKETS, *OTHERS]


class Containers(Runc):
    """One-shot containers under a profile, each in a network namespace of its own."""

    def __init__(self, directory: Path, parent: str) -> None:
        calls = build("seccomp_calls.c", directory / "calls", "-static")
        super().__init__(directory, parent, {"/bin/calls": calls})

    def under(self, profile: Json | None, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program to its end under a profile, with runc."""
        command = self.command("seccomp", argv)
        config = self._directory / "bundles/seccomp/config.json"
        spec = json.loads(config.read_bytes())
        spec["linux"]["namespaces"].append({"type": "network"})
        if profile is not None:
            spec["linux"]["seccomp"] = profile
        config.write_text(json.dumps(spec))
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)

    def podman(self, directory: Path, profile: Path, *argv: str, stdin: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end under a profile, with Podman; what it keeps is in the directory."""
        places = {"--root": "storage", "--runroot": "run", "--tmpdir": "tmp"}
        options = [f"{option}={directory / name}" for option, name in places.items()]
        options += ["--cgroup-manager=cgroupfs", "--runtime=runc", "--storage-driver=vfs", "--events-backend=none"]
        # Podman asks for more than a process without CAP_SYS_RESOURCE may have.
        limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]
        security = [f"--security-opt=seccomp={profile}", "--security-opt=apparmor=unconfined"]
        run = ["run", "--rm", "--interactive", "--network=none", f"--cgroup-parent={self._parent}", *limits, *security]
        command = [need.command("podman"), *options, *run, "--rootfs", str(self._rootfs), *argv]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    made = Containers(tmp_path_factory.mktemp("seccomp"), f"/weir-test-{os.getpid()}-seccomp")
    yield made
    made.remove()


def on_debian() -> Path:
    if not DEBIAN.exists():
        need.skip("needs /usr/share/containers/seccomp.json (golang-github-containers-common)")
    return DEBIAN


def profile_of(name: str, base_file: Path | None) -> Json:
    """The profile of a shipped policy, made to refuse when the policy only audits."""
    return profiles.profile_of(replace(find.load(name), mode=Mode.ENFORCE), base_file)


def marked(profile: Json) -> Json:
    copy: Json = json.loads(json.dumps(profile))
    for entry in [e for e in copy["syscalls"] if e["action"] == oci.ERRNO]:
        entry["errnoRet"] = entry.get("errnoRet", 1) + MARK
    return copy


@pytest.mark.parametrize("name", find.shipped())
@pytest.mark.parametrize("onto", ["nothing", "Debian's"])
def test_each_call_gets_the_answer_of_the_profile(containers: Containers, name: str, onto: str) -> None:
    profile = profile_of(name, on_debian() if onto == "Debian's" else None)
    done = containers.under(marked(profile), "/bin/calls", stdin=lines(CALLS))
    assert done.returncode == 0, done.stderr
    got = [int(answer) for answer in done.stdout.split()]
    wrong = []
    for call, answer in zip(CALLS, got, strict=True):
        ((action, errno),) = verdicts(profile, str(call[0]), [*map(int, call[1:]), 0, 0, 0, 0, 0, 0])
        if action == oci.ALLOW:
            good = answer < MARK
        elif (action, errno) == (oci.ERRNO, profile.get("defaultErrnoRet")):
            good = answer in (errno, MARK + (errno or 0))  # the default is not marked: runc itself needs it as it is
        else:
            good = answer == MARK + (errno or 0)
        if not good:
            wrong.append((call, answer, errno))
    assert wrong == []


@pytest.mark.parametrize("name", find.shipped())
@pytest.mark.parametrize("onto", ["nothing", "Debian's"])
def test_programs_start_and_open_tcp_and_udp(containers: Containers, name: str, onto: str) -> None:
    profile = profile_of(name, on_debian() if onto == "Debian's" else None)
    done = containers.under(profile, "/bin/busybox", "true")
    assert (done.returncode, done.stderr) == (0, "")
    opened = [
        ("socket", family, type_, protocol)
        for family in (2, 10)
        for type_, protocol in ((1, 0), (1, 6), (2, 0), (2, 17))
    ]
    opened.append(("socket", 1, 1, 0))
    assert containers.under(profile, "/bin/calls", stdin=lines(opened)).stdout.split() == ["0"] * len(opened)


@pytest.mark.parametrize("onto", ["nothing", "Debian's"])
def test_foreign_architectures_are_refused(containers: Containers, onto: str) -> None:
    if platform.machine() != "x86_64":
        need.skip("needs x86_64: only it has int 0x80 and the x32 bit")
    profile = profile_of("appengine", on_debian() if onto == "Debian's" else None)
    for call in (("int80", 359, 2, 1, 0), ("int80", 102, 1, 0), ("x32", "socket", 2, 1, 0), ("x32", "getppid")):
        assert containers.under(None, "/bin/calls", stdin=lines([call])).returncode == 0
        done = containers.under(profile, "/bin/calls", stdin=lines([("getppid",), call]))
        # runc puts a filter of its own in front of one that does not allow by default: it takes x32 for a new call.
        new_call = onto != "nothing" and call[0] == "x32" and (done.returncode, done.stdout) == (0, f"0\n{ENOSYS}\n")
        assert new_call or (done.returncode, done.stdout) == (KILLED, "0\n"), done


def test_podman_reads_it(containers: Containers, tmp_path: Path) -> None:
    """Its reader is containers/common's, which looks for the fields of its own format too."""
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(marked(profile_of("appengine", on_debian()))))
    calls = lines([("socket", 16, 3, 0), ("socket", 2, 1, 6), ("listen", 3, 1)])
    with TemporaryDirectory(prefix="weir-test-") as directory:  # Podman wants paths of at most 50 characters
        done = containers.podman(Path(directory), profile, "/bin/calls", stdin=calls)
        remains.unmount_below(Path(directory))
    assert done.stdout.split() == [str(MARK + EAFNOSUPPORT), "0", str(MARK + EACCES)], done.stderr


def test_a_pod_names_it_as_localhost_profile(node: Containerd, kubelet: Kubelet, tmp_path: Path) -> None:
    """Written by the agent's own function, read by containerd."""
    profiles.write(tmp_path, {"appengine": marked(profile_of("appengine", on_debian()))})
    image = node.image("weir.test/calls:1", {"/bin/calls": build("seccomp_calls.c", tmp_path / "calls", "-static")})
    pod = kubelet.pod("shop", "seccomp-0")
    script = "(echo native socket 16 3 0; echo native socket 2 1 6; echo native listen 3 1) | /bin/calls"
    command = ["/bin/sh", "-c", script]
    container = kubelet.container(pod, "calls", image, command, seccomp=tmp_path / "weir/appengine.json")
    assert kubelet.wait(container) == 0
    kubelet.writes(container, f"{MARK + EAFNOSUPPORT}\n0\n{MARK + EACCES}\n")
    kubelet.remove_pod(pod)


def test_debians_profile_alone_reads_as_its_merge_with_nothing(containers: Containers) -> None:
    """What weir makes of includes and excludes is what Podman makes of them for a container without capabilities."""
    this = oci.machine(platform.machine())
    alone = merge((), base.load(on_debian(), this), this)
    done = containers.under(marked(alone), "/bin/calls", stdin=lines([("socket", 16, 3, 9), ("socket", 16, 3, 0)]))
    assert done.stdout.split() == [str(MARK + 22), "0"], done.stderr


def test_a_full_disk_leaves_the_old_profile_whole(tmp_path: Path) -> None:
    need.root()
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "weir-test", disk], check=True)
    try:
        old = profile_of("appengine", None)
        assert profiles.write(disk, {"appengine": old}) == ("appengine",)
        (disk / "filler").write_bytes(bytes(150_000))
        with pytest.raises(WeirError, match=os.strerror(ENOSPC)) as failure:
            profiles.write(disk, {"appengine": profile_of("audit", None)})
        assert str(disk) in failure.value.hint
        assert json.loads((disk / "weir/appengine.json").read_bytes()) == old
        (disk / "filler").unlink()
        assert profiles.write(disk, {"appengine": profile_of("audit", None)}) == ("appengine",)
        assert sorted(file.name for file in (disk / "weir").iterdir()) == [".written-by-weir", "appengine.json"]
    finally:
        subprocess.run(["umount", disk], check=True)
