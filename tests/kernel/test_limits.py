"""What weir says and leaves when a table is full, a cgroup vanishes, or it is given nonsense: one sentence, exit 1, no change."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.kernel import abi, libbpf
from agent.kernel.pinned import PinnedKernel
from agent.kernel.seam import Enrolment
from tests.kernel.knocker import doors, forbidden_command
from tests.kernel.prefixes import as_nobody
from tests.kernel.site import ROOT, TIMEOUT, Site, one_line, site, wait_until_blocked


@pytest.fixture(name="here")
def _here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as made:
        yield made


def test_more_cgroups_than_places(here: Site) -> None:
    here.ok("load", "--max-containers", "3")
    with here.cgroup() as one, here.cgroup() as two, here.cgroup() as three:
        here.ok("attach", one, "-p", "audit")
        here.ok("attach", two, "-p", "audit")
        before = here.status()["cgroups"]
        said = one_line(here.weir("attach", three, "-p", "untrusted"))
        assert "all 2 places for cgroups are taken" in said["message"]
        assert "--max-containers" in said["hint"]
        assert here.status()["cgroups"] == before
        said = one_line(here.weir("run", "--", "true"))
        assert "all 2 places" in said["message"]
        assert here.rest() == []
        here.ok("attach", two, "-p", "untrusted")  # a switch needs no place
        here.ok("detach", one)
        here.ok("attach", three, "-p", "audit")


def test_another_size_than_loaded(here: Site) -> None:
    here.ok("load", "--max-containers", "8")
    said = one_line(here.weir("load", "--max-containers", "9"))
    assert "loaded for 8 containers" in said["message"]
    assert "unload" in said["hint"]


def test_no_room_for_refusals(here: Site, tmp_path: Path) -> None:
    """A full table of refusal counters costs a counter, never a refusal; what found no room is counted."""
    here.ok("load", "--max-containers", "8")
    pins = here.place.pins
    fd = libbpf.obj_get(pins.maps / "refusals")
    try:
        with pytest.raises(OSError, match="Argument list too long"):
            for number in range(abi.MAX_REFUSALS + 1):
                key = abi.Refusal(policy=number, slot=7, hook=abi.Hook.CONNECT, reason=abi.Reason.RULE)
                libbpf.update(fd, key, ctypes.c_uint64(1))
    finally:
        os.close(fd)
    witness = tmp_path / "it-got-through"
    with doors() as listening, here.cgroup() as cgroup:
        policy = here.policy("first", listening.ports[1])
        here.ok("attach", cgroup, "-p", policy)
        script = 'echo $$ > "$1"; shift; exec "$@"'
        command = forbidden_command(listening.ports[0], witness)
        subprocess.run(["bash", "-c", script, "bash", str(cgroup / "cgroup.procs"), *command], check=True)
        (row,) = here.status()["cgroups"]
        assert not witness.exists()
        assert (row["refusals_uncounted"], row["refused"]) == (1, [])
        maps = here.status()["maps"]
        assert maps["refusals"]["entries"] == maps["refusals"]["capacity"] == abi.MAX_REFUSALS
        assert "NEARLY FULL: map refusals" in here.ok("status")


def test_more_policies_than_places(here: Site) -> None:
    """All versions in use: the next policy is refused and the cgroup stays under the one it had."""
    here.ok("load", "--max-containers", "300")
    with here.cgroup() as cgroup:
        here.ok("attach", cgroup, "-p", "audit")
        kernel = PinnedKernel(here.place.pins)
        header, key = abi.Policy(name=b"other"), ctypes.c_uint32()
        fd = libbpf.obj_get(here.place.pins.maps / "policies")
        try:
            for number in range(1000, 1000 + abi.MAX_POLICIES - 1):
                key.value = number
                libbpf.update(fd, key, header)
                kernel.enrol({1 << 40 | number: Enrolment(number - 900, number, abi.Flag(0))})
        finally:
            os.close(fd)
            kernel.close()
        said = one_line(here.weir("attach", cgroup, "-p", "untrusted"))
        assert f"already holds {abi.MAX_POLICIES} policy versions" in said["message"]
        assert here.policy_of(cgroup) == "audit"


def test_a_cgroup_that_vanishes_half_way(here: Site) -> None:
    """weir waits for the lock with the cgroup looked up already; meanwhile it is removed."""
    here.ok("load")
    before = here.state()
    with here.cgroup() as cgroup:
        with here.place.locked():
            waiting = here.start("attach", cgroup, "-p", "audit", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            wait_until_blocked(waiting.pid)
            cgroup.rmdir()
        _, complaint = waiting.communicate(timeout=TIMEOUT)
        done = subprocess.CompletedProcess(waiting.args, waiting.returncode, "", complaint)
    assert "is no cgroup" in one_line(done)["message"]
    assert here.state() == before


@pytest.mark.parametrize("name", ["/no/such/cgroup", "..", "/tmp", "../../../tmp"])
def test_no_such_cgroup(here: Site, name: str) -> None:
    here.ok("load")
    before = here.state()
    for verb in (["attach", name, "-p", "audit"], ["detach", name]):
        assert "no cgroup below" in one_line(here.weir(*verb))["message"]
    assert here.state() == before


def test_detach_of_what_is_not_attached(here: Site) -> None:
    here.ok("load")
    with here.cgroup() as cgroup:
        assert "under no policy of its own" in one_line(here.weir("detach", cgroup))["message"]
    assert "under no policy of its own" in one_line(here.weir("detach", "12345678"))["message"]


@pytest.mark.parametrize("verb", ["run", "attach"])
def test_bad_policies_change_nothing(here: Site, tmp_path: Path, verb: str) -> None:
    """An unknown name, a missing file, a directory, garbage, 10 MB, too many rules, unknown keys."""
    here.ok("load")
    rules = "".join(f"    - {{name: r{n}, action: deny, ports: [{n + 1}]}}\n" for n in range(600))
    text = here.policy("fine", 80).read_text()
    files = {
        "large": b"a" * 10_000_000,
        "binary": bytes(range(256)),
        "key": text.replace("default", "defualt").encode(),
        "rules": text.replace("  default", f"{rules}  default").encode(),
        "address": text.replace("127.0.0.1", "127.0.0.1/8").encode(),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
    with here.cgroup() as cgroup:
        before = here.state()
        for policy in ["nonsense", "/no/such.yaml", str(tmp_path), *(str(tmp_path / f"{name}.yaml") for name in files)]:
            arguments = ["run", "-p", policy, "--", "true"] if verb == "run" else ["attach", str(cgroup), "-p", policy]
            said = one_line(here.weir(*arguments))
            assert Path(policy).stem in said["message"]
            assert here.state() == before


def test_a_policy_that_may_not_be_read(here: Site) -> None:
    with tempfile_of_root() as policy:
        done = here.weir("policy", "check", policy, prefix=as_nobody())
        assert done.returncode == 1
        assert "cannot be read: Permission denied" in done.stderr


def tempfile_of_root() -> TemporaryPolicy:
    return TemporaryPolicy()


class TemporaryPolicy:
    """A file that only root may read, in a directory that everyone may enter."""

    def __enter__(self) -> Path:
        self._path = Path("/tmp") / f"weir-test-{os.getpid()}.yaml"
        shutil.copy(ROOT / "policies/audit.yaml", self._path)
        self._path.chmod(0o600)
        return self._path

    def __exit__(self, *_: object) -> None:
        self._path.unlink()


def test_a_network_socket_for_standard_input(here: Site) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as given:
        said = one_line(here.weir("run", "--", "cat", stdin=given))
    assert "standard input" in said["message"]
    assert "--inherit-fds" in said["hint"]
    assert here.state() == []
