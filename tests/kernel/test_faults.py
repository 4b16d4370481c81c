"""What weir says and leaves when something is missing, full, forbidden or gone: one clear sentence, a hint, exit 1, no change."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.kernel.pins import Pins
from tests import need
from tests.kernel.prefixes import as_nobody, without
from tests.kernel.site import ROOT, Site, one_line, site

CHANGING = [["load", "--force"], ["run", "--", "true"], ["attach", "CGROUP", "-p", "audit"], ["detach", "CGROUP"]]
READING = [["status"], ["events"]]


@pytest.fixture(name="here")
def _here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as made:
        yield made


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
    assert here.state() == []


@pytest.mark.parametrize("arguments", [*CHANGING, *READING, ["unload"]], ids=lambda arguments: str(arguments[0]))
def test_no_cgroup2(here: Site, arguments: list[str]) -> None:
    here.ok("load")
    before = here.state()
    with here.cgroup() as cgroup:
        gone = without(f"umount -l {here.place.root}")
        said = one_line(here.weir(*verbs(arguments, cgroup), prefix=gone))
    assert "cgroup2 is not mounted" in said["message"]
    assert "mount -t cgroup2" in said["hint"]
    assert here.state() == before


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "not-loaded"])
@pytest.mark.parametrize("arguments", CHANGING, ids=lambda arguments: str(arguments[0]))
def test_no_privilege(here: Site, arguments: list[str], loaded: bool) -> None:
    if loaded:
        here.ok("load")
    before = here.state()
    with here.cgroup() as cgroup:
        said = one_line(here.weir(*verbs(arguments, cgroup), prefix=as_nobody()))
    assert "cannot use BPF: Operation not permitted" in said["message"]
    assert said["hint"].startswith("Run as root")
    assert here.state() == before


@pytest.mark.parametrize("arguments", [*READING, ["unload"]], ids=lambda arguments: str(arguments[0]))
def test_no_privilege_to_read(here: Site, arguments: list[str]) -> None:
    """Never "nothing is loaded" to one who may not look."""
    here.ok("load")
    before = here.state()
    said = one_line(here.weir(*arguments, prefix=as_nobody()))
    assert "not permitted" in said["message"] or "Permission denied" in said["message"]
    assert here.state() == before


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
    assert "rules in force (abi-99)" in one_line(here.weir("unload"))["message"]
    assert "rules in force here (abi-99)" in here.ok("status")
    here.ok("unload", "--force")
    assert not here.place.pins.root.exists()


def test_pins_of_another_version_beside_ours(here: Site) -> None:
    """Whatever that version has in force stays: a load of ours must not sweep it away."""
    here.ok("load")
    other = here.place.pins.root / "abi-99" / "maps"
    other.mkdir(parents=True)
    for arguments in (["load"], ["load", "--force"]):
        assert "another version of weir (abi-99)" in one_line(here.weir(*arguments))["message"]
        assert other.exists()


def test_unload_beside_an_agent_that_is_stuck(here: Site, tmp_path: Path) -> None:
    """Who frees a node by force waits for nobody."""
    here.ok("load")
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.bind(str(tmp_path / "agent.sock"))
        stuck.listen()
        done = here.weir("unload", "--force", env={**here.environment, "WEIR_SOCKET": str(tmp_path / "agent.sock")})
    assert (done.returncode, done.stdout) == (0, "unloaded\n")
    assert "an agent runs here" in done.stderr
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
    compile_and_load(Pins(Path(sys.argv[1])), folder, text.replace(entry, entry + sys.argv[2]), compiler_flags(8, has_retval=False))
except WeirError as e:
    print(e)
"""


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (
            "if (*(volatile int *)((long)ctx * 3)) return 1;",
            ["refuses the program bind4", "pointer arithmetic with *="],
        ),
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
