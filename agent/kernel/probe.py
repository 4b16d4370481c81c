"""Facts about this kernel and host, found by trying, each with its reason. Leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.cgroups import tree
from agent.cgroups.classid import require_cgroup_of_sockets
from agent.errors import WeirError
from agent.kernel import libbpf, source
from agent.kernel.abi import PROGRAMS
from agent.kernel.load import run_loader
from agent.kernel.pinned import PinnedKernel
from agent.kernel.pins import Pins, require_bpffs
from agent.seccomp.filter import Filter

CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_PERFMON": 38, "CAP_BPF": 39}
"""Numbers of include/uapi/linux/capability.h. CAP_SYS_ADMIN includes the last two."""

SYS_ADMIN = 21

BPF_MAP_TYPE_RINGBUF = 27
RINGBUF_BYTES = 4096


@dataclass(frozen=True)
class Fact:
    """``holds`` is None where it could not be tried; ``reason`` is how it is known, or why it does not hold."""

    name: str
    holds: bool | None
    reason: str

    @property
    def needed(self) -> bool:
        """Whether weir cannot work without it."""
        return self.name not in OPTIONAL


OPTIONAL = ("bpf_set_retval", "BPF LSM", "BPF LSM listed", "seccomp", "libseccomp")
"""Facts without which weir still does its work, or all but a part of it."""


def can_work(found: Sequence[Fact]) -> bool:
    """Whether weir can put rules in force on this host: no fact that it needs fails or is unknown."""
    return all(fact.holds for fact in found if fact.needed)


def facts(pins: Pins) -> Iterator[Fact]:
    """Every fact, in the order in which they depend on each other. ``pins``: throw-away pins are made beside these."""
    mountinfo = Path("/proc/self/mountinfo").read_text()
    yield (privileged := capabilities(Path("/proc/self/status").read_text()))
    yield (cgroup2 := cgroups(mountinfo))
    yield holds("sockets keep their cgroup", require_cgroup_of_sockets, "nothing sets net_cls or net_prio of cgroup v1")
    yield (bpffs := holds("bpffs", lambda: require_bpffs(pins.root), f"{pins.root} is on a BPF file system"))
    yield (library := holds("libbpf", libbpf.library, "libbpf.so.1 loads"))
    yield (headers := uapi_headers())
    bcc, lsm = ask_bcc()
    yield bcc
    needed = (privileged, cgroup2, bpffs, library, headers, bcc)
    missing = [fact.name for fact in needed if not fact.holds]
    if missing:
        reason = f"not tried without: {', '.join(missing)}"
        yield from (Fact(name, None, reason) for name in ("ring buffer", *map(program, PROGRAMS), "bpf_set_retval"))
    else:
        yield ring_buffer()
        yield from programs(pins)
    yield lsm_listed(Path("/sys/kernel/security/lsm"))
    yield lsm if privileged.holds else Fact("BPF LSM", None, "not tried without: privilege")
    yield from seccomp()


def holds(name: str, check: Callable[[], object], reason: str) -> Fact:
    """A fact from a function that raises WeirError when it does not hold."""
    try:
        check()
    except WeirError as e:
        return Fact(name, False, sentence(e))
    return Fact(name, True, reason)


def sentence(error: WeirError) -> str:
    """An error as a reason: what is wrong; what to do."""
    return f"{error.message}; {error.hint}" if error.hint else error.message


def capabilities(status: str) -> Fact:
    """From the text of /proc/PID/status."""
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    present = {name for name, number in CAPABILITIES.items() if effective >> number & 1}
    if effective >> SYS_ADMIN & 1:
        present |= {"CAP_PERFMON", "CAP_BPF"}
    missing = [name for name in CAPABILITIES if name not in present]
    if missing:
        return Fact("privilege", False, f"{' and '.join(missing)} missing; run as root")
    return Fact("privilege", True, ", ".join(CAPABILITIES))


def cgroups(mountinfo: str) -> Fact:
    """From the text of /proc/self/mountinfo."""
    try:
        path = tree.mount(mountinfo)
    except WeirError as e:
        return Fact("cgroup2", False, sentence(e))
    legacy = any(line.partition(" - ")[2].split()[0] == "cgroup" for line in mountinfo.splitlines())
    return Fact("cgroup2", True, f"mounted at {path}" + (" (hybrid: cgroup v1 is mounted, too)" if legacy else ""))


def uapi_headers() -> Fact:
    """Whether BCC's compiler will find the kernel's UAPI headers."""

    def try_it() -> None:
        with source.header_tree(source.directory()):
            pass

    return holds("UAPI headers", try_it, "linux/, asm/ and asm-generic/ are in /usr/include")


def ask_bcc() -> tuple[Fact, Fact]:
    """BCC itself, and BPF LSM by loading a tiny program through it; in another process, which the memory leaves with."""
    command = [sys.executable, "-m", "agent.kernel.probe_bcc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        tail = done.stderr.strip().rpartition("\n")[2]
        return Fact("BCC", False, f"it ended with status {done.returncode}: {tail}"), Fact("BPF LSM", None, "needs BCC")
    if "error" in answer:
        return Fact("BCC", False, f"{answer['error']}; {answer['hint']}"), Fact(
            "BPF LSM", None, "not tried without BCC"
        )
    bcc = Fact("BCC", True, f"version {answer['version']}")
    if answer["lsm"]:
        return bcc, Fact("BPF LSM", False, f"a program of this kind is refused: {answer['lsm']}")
    return bcc, Fact("BPF LSM", True, "a program of this kind loads and attaches")


def lsm_listed(path: Path) -> Fact:
    """Whether the kernel was started with BPF among its security modules; ``path`` is securityfs's list."""
    try:
        listed = path.read_text().strip()
    except OSError as e:
        return Fact("BPF LSM listed", None, f"{path}: {e.strerror} (mount -t securityfs none /sys/kernel/security)")
    return Fact("BPF LSM listed", "bpf" in listed.split(","), f"{path}: {listed}")


def ring_buffer() -> Fact:
    """Whether there are ring buffers (Linux 5.8)."""
    try:
        os.close(libbpf.map_create(BPF_MAP_TYPE_RINGBUF, "probe", 0, 0, RINGBUF_BYTES))
    except OSError as e:
        return Fact("ring buffer", False, f"a map of this type is refused: {e.strerror}")
    return Fact("ring buffer", True, "a map of this type can be made")


def program(name: str) -> str:
    """The name of the fact that a program loads and links."""
    return f"program {name}"


def programs(pins: Pins) -> Iterator[Fact]:
    """Load all of them with pins of their own and link each to a cgroup of its own, and take everything away again."""
    own = Pins(pins.root.with_name(f"{pins.root.name}-probe-{os.getpid()}"))
    cgroup = tree.mount() / f"weir-probe-{os.getpid()}"
    kernel = PinnedKernel(own)
    try:
        own.make()
        run_loader(own, 2)
        try:
            cgroup.mkdir()
        except OSError as e:  # in the agent's container the tree is read-only, and links are all the same
            reason = f"loads; its link is not tried: cannot make the cgroup {cgroup}: {e.strerror}"
            yield from (Fact(program(name), True, reason) for name in PROGRAMS)
        else:
            yield from (linked(own, name, cgroup) for name in PROGRAMS)
        build = kernel.build()
        retval = bool(build and build.has_retval)
        yield Fact("bpf_set_retval", retval, f"a refused call answers {'EACCES' if retval else 'EPERM'}")
    except WeirError as e:
        for name in PROGRAMS:
            named = f"the program {name}\n" in e.message
            yield Fact(program(name), False if named else None, sentence(e) if named else "the load stopped before")
        yield Fact("bpf_set_retval", None, sentence(e))
    finally:
        kernel.close()
        own.remove()
        if cgroup.exists():
            cgroup.rmdir()


def linked(pins: Pins, name: str, cgroup: Path) -> Fact:
    """Whether a loaded program can be linked to a cgroup."""
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = libbpf.obj_get(pins.programs / name)
        try:
            os.close(libbpf.link_create(fd, directory, PROGRAMS[name][1]))
        finally:
            os.close(fd)
    except OSError as e:
        return Fact(program(name), False, f"loads, but the kernel refuses its link: {e.strerror}")
    finally:
        os.close(directory)
    return Fact(program(name), True, "loads and links")


def seccomp() -> Iterator[Fact]:
    """libseccomp by building a filter, seccomp by loading it in a child."""
    try:
        nothing = Filter(())
    except WeirError as e:
        yield Fact("libseccomp", False, sentence(e))
        yield Fact("seccomp", None, "not tried without libseccomp")
        return
    yield Fact("libseccomp", True, "builds a filter")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            nothing.load()
            status = 0
        finally:
            os._exit(status)
    refused = os.waitpid(pid, 0)[1]
    yield Fact("seccomp", not refused, "the kernel refuses a filter" if refused else "a filter loads")
