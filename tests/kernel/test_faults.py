"""What weir says and leaves when something is missing, full, forbidden or gone: one clear sentence, a hint, exit 1, no change."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.kernel import abi, libbpf
from agent.kernel.pinned import PinnedKernel
from agent.kernel.pins import Pins
from agent.kernel.seam import Enrolment
from tests import need
from tests.kernel.knocker import doors, forbidden_command
from tests.kernel.prefixes import as_nobody, without
from tests.kernel.site import ROOT, Site, one_line, site, wait_until_blocked

CHANGING = [["load", "--force"], ["run", "--", "true"], ["attach", "CGROUP", "-p", "audit"], ["detach", "CGROUP"]]
READING = [["status"], ["events"]]


@pytest.fixture(name="here")
def _here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as made:
        yield made


def state(made: Site) -> list[str]:
    """All that weir has put on this host: pins, cgroups of the slice, and what the tables say of them."""
    pins = made.place.pins
    found = [str(path) for path in pins.root.rglob("*")] + [str(path) for path in made.place.slice.rglob("*/")]
    if not (pins.maps / "config").exists():
        return sorted(found)
    kernel = PinnedKernel(pins)
    try:
        tables = [str(kernel.enrolments()), str(kernel.attached()), str(list(kernel.versions()))]
    finally:
        kernel.close()
    return sorted(found) + tables


def library(name: str) -> Path:
    """The file of a shared library that this process could load."""
    handle = ctypes.CDLL(name)
    assert handle
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(Path(line.split()[5]) for line in lines if line.rpartition("/")[2].startswith(name.partition(".so")[0]))


def verbs(arguments: Sequence[str], cgroup: Path) -> list[str]:
    return [str(cgroup) if argument == "CGROUP" else argument for argument in arguments]


@pytest.mark.parametrize("arguments", CHANGING, ids=lambda arguments: str(arguments[0]))
def test_no_bpffs(here: Site, arguments: list[str]) -> None:
    with here.cgroup() as cgroup:
        said = one_line(here.weir(*verbs(arguments, cgroup), prefix=without("umount -l /sys/fs/bpf")))
    assert "is not on a BPF file system" in said["message"]
    assert "mount -t bpf" in said["hint"]
    assert state(here) == []


@pytest.mark.parametrize("arguments", [*CHANGING, *READING, ["unload"]], ids=lambda arguments: str(arguments[0]))
def test_no_cgroup2(here: Site, arguments: list[str]) -> None:
    here.ok("load")
    before = state(here)
    with here.cgroup() as cgroup:
        gone = without(f"umount -l {here.place.root}")
        said = one_line(here.weir(*verbs(arguments, cgroup), prefix=gone))
    assert "cgroup2 is not mounted" in said["message"]
    assert "mount -t cgroup2" in said["hint"]
    assert state(here) == before


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "not-loaded"])
@pytest.mark.parametrize("arguments", CHANGING, ids=lambda arguments: str(arguments[0]))
def test_no_privilege(here: Site, arguments: list[str], loaded: bool) -> None:
    if loaded:
        here.ok("load")
    before = state(here)
    with here.cgroup() as cgroup:
        said = one_line(here.weir(*verbs(arguments, cgroup), prefix=as_nobody()))
    assert "cannot use BPF: Operation not permitted" in said["message"]
    assert said["hint"].startswith("Run as root")
    assert state(here) == before


@pytest.mark.parametrize("arguments", [*READING, ["unload"]], ids=lambda arguments: str(arguments[0]))
def test_no_privilege_to_read(here: Site, arguments: list[str]) -> None:
    """Never "nothing is loaded" to one who may not look."""
    here.ok("load")
    before = state(here)
    said = one_line(here.weir(*arguments, prefix=as_nobody()))
    assert "not permitted" in said["message"] or "Permission denied" in said["message"]
    assert state(here) == before


def test_pins_of_someone_else(here: Site) -> None:
    """A bpffs mounted without options lets everyone make the directory before weir does."""
    here.place.pins.root.mkdir()
    os.chown(here.place.pins.root, 65534, 65534)
    said = one_line(here.weir("load"))
    assert "belongs to user 65534" in said["message"]
    os.chown(here.place.pins.root, 0, 0)


def test_pins_of_another_version(here: Site) -> None:
    (here.place.pins.root / "abi-99" / "maps").mkdir(parents=True)
    said = one_line(here.weir("load"))
    assert "another version of weir (abi-99)" in said["message"]
    assert "weir unload" in said["hint"]
    here.ok("unload")
    assert not here.place.pins.root.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('raise ImportError("no such library")', "BCC's Python binding cannot be imported: no such library"),
        ("attrs = 'a lattice'", "is not the BPF Compiler Collection"),
        ("import os\nos.kill(os.getpid(), 9)", "the loader ended with status -9 and no answer"),
    ],
    ids=["missing", "another-library", "dies"],
)
def test_bcc(here: Site, tmp_path: Path, content: str, message: str) -> None:
    """weir says which one it found; and the next load, with the right one, works."""
    (tmp_path / "bcc.py").write_text(content)
    said = one_line(here.weir("load", env={**here.environment, "PYTHONPATH": str(tmp_path)}))
    assert message in said["message"]
    assert "python3-bpfcc" in said["hint"] or "weir load" in said["hint"]
    here.ok("load")


@pytest.mark.parametrize(
    ("name", "arguments", "message", "package"),
    [
        ("libbpf.so.1", ["load"], "libbpf cannot be loaded", "libbpf1"),
        ("libbcc.so.0", ["load"], "BCC's Python binding cannot be imported", "python3-bpfcc"),
        ("libseccomp.so.2", ["run", "--", "true"], "libseccomp cannot be loaded", "libseccomp2"),
    ],
)
def test_a_library_is_missing(here: Site, name: str, arguments: list[str], message: str, package: str) -> None:
    try:
        path = library(name).resolve()
    except (OSError, StopIteration):
        need.skip(f"needs {name}, to take it away")
    said = one_line(here.weir(*arguments, prefix=without(f"mount --bind /dev/null {path}")))
    assert message in said["message"]
    assert package in said["hint"]
    assert here.rest() == []
    if here.place.pins.root.exists():
        here.ok("load")


def test_no_headers(here: Site) -> None:
    said = one_line(here.weir("load", prefix=without("mount -t tmpfs none /usr/include")))
    assert "UAPI headers are not installed" in said["message"]
    assert "linux-libc-dev" in said["hint"]


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
                kernel.enrol(1 << 40 | number, Enrolment(number - 900, number, abi.Flag(0)))
        finally:
            os.close(fd)
            kernel.close()
        said = one_line(here.weir("attach", cgroup, "-p", "untrusted"))
        assert f"already holds {abi.MAX_POLICIES} policy versions" in said["message"]
        assert here.policy_of(cgroup) == "audit"


def test_a_cgroup_that_vanishes_half_way(here: Site) -> None:
    """weir waits for the lock with the cgroup looked up already; meanwhile it is removed."""
    here.ok("load")
    before = state(here)
    with here.cgroup() as cgroup:
        with here.place.locked():
            waiting = here.start("attach", cgroup, "-p", "audit", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            wait_until_blocked(waiting.pid)
            cgroup.rmdir()
        _, complaint = waiting.communicate(timeout=300)
        done = subprocess.CompletedProcess(waiting.args, waiting.returncode, "", complaint)
    assert "is no cgroup" in one_line(done)["message"]
    assert state(here) == before


@pytest.mark.parametrize("name", ["/no/such/cgroup", "..", "/tmp", "../../../tmp"])
def test_no_such_cgroup(here: Site, name: str) -> None:
    here.ok("load")
    before = state(here)
    for verb in (["attach", name, "-p", "audit"], ["detach", name]):
        assert "no cgroup below" in one_line(here.weir(*verb))["message"]
    assert state(here) == before


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
        before = state(here)
        for policy in ["nonsense", "/no/such.yaml", str(tmp_path), *(str(tmp_path / f"{name}.yaml") for name in files)]:
            arguments = ["run", "-p", policy, "--", "true"] if verb == "run" else ["attach", str(cgroup), "-p", policy]
            said = one_line(here.weir(*arguments))
            assert Path(policy).stem in said["message"]
            assert state(here) == before


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


BROKEN = """
import sys
from pathlib import Path
from agent.errors import WeirError
from agent.kernel import source
from agent.kernel.loader import compile_and_load, compiler_flags
from agent.kernel.pins import Pins
folder, text = source.directory(), source.text(source.directory())
entry = "int weir_bind4(struct bpf_sock_addr *ctx)\\n{\\n"
assert entry in text
try:
    compile_and_load(folder, text.replace(entry, entry + sys.argv[2]), compiler_flags(Pins(Path(sys.argv[1])), 8, False))
except WeirError as e:
    print(e)
"""


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("if (*(volatile int *)((long)ctx * 3)) return 1;", ["refuses the program bind4", "R1 pointer arithmetic"]),
        ("int x = nonsense;", ["cannot compile", "bpf/bind.c", "use of undeclared identifier 'nonsense'"]),
    ],
    ids=["verifier", "compiler"],
)
def test_a_program_that_is_refused(tmp_path: Path, statement: str, expected: list[str]) -> None:
    """The error names the program and shows the last lines of the log, not all of it."""
    need.root()
    pins = Pins(Path("/sys/fs/bpf") / f"weir-test-{os.getpid()}-broken")
    pins.make()
    try:
        command = [sys.executable, "-c", BROKEN, str(pins.root), statement]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    finally:
        pins.remove()
    for words in expected:
        assert words in done.stdout
    assert len(done.stdout.splitlines()) < 18
    assert done.stdout.splitlines()[-1].strip()


def test_a_network_socket_for_standard_input(here: Site) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as given:
        said = one_line(here.weir("run", "--", "cat", stdin=given))
    assert "standard input" in said["message"]
    assert "--inherit-fds" in said["hint"]
    assert state(here) == []


def test_the_errors_of_the_kernel_have_hints() -> None:
    """The numbers that an unprivileged or crowded host gives lead to a hint of their own."""
    from agent.kernel.pins import HINTS

    assert {errno.EPERM, errno.EACCES, errno.E2BIG, errno.ENOSPC, errno.ENOMEM} <= HINTS.keys()


def test_mount_from_text() -> None:
    """Hybrid and pure hosts, and an escaped space in the path."""
    line = "41 31 0:38 / {} rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
    v1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    assert tree.mount(v1 + line.format("/sys/fs/cgroup/unified")) == Path("/sys/fs/cgroup/unified")
    assert tree.mount(line.format("/a\\040b")) == Path("/a b")
