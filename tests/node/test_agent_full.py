"""Something is full: a disk, a pipe, a table of the kernel. It is told, nothing is open for it, and room is used when it is back."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from ctypes import c_uint32, c_uint64
from pathlib import Path

import pytest

from agent.controller import Controller, compiled
from agent.kernel import abi, libbpf
from agent.kernel.abi import MAX_POLICIES, Hook, Reason
from agent.policy.model import Action, Mode, Policy
from tests.node.agent import Running
from tests.node.faults import Node, ended, id_of, plain_node
from tests.node.probe import Peer, closed
from tests.policies import OPEN_SOCKETS


@pytest.fixture(name="here")
def _here(tmp_path: Path, probe: Path, door: Peer, wall: Peer) -> Iterator[Node]:
    with plain_node(tmp_path, probe, door, wall) as made:
        yield made


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, *files: Path) -> None:
        """Take every byte and every inode; the page that each of ``files`` ends in is filled with empty lines."""
        (self.path / "filler").mkdir()
        for number in range(1000):
            try:
                with (self.path / "filler" / str(number)).open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            except OSError:
                if not (self.path / "filler" / str(number)).exists():
                    break
        for path in files:
            with path.open("ab", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"\n" * 4096)

    def free(self) -> None:
        """Give back what fill() took."""
        subprocess.run(["rm", "-r", self.path / "filler"], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "tmpfs", path], check=True)
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


def test_policy_directory(here: Node, disk: Disk) -> None:
    """A file that was cut off by the end of the disk changes nothing."""
    (disk.path / "closed.yaml").write_text(closed("closed", here.door.port))
    here.site.options["--policies"] = str(disk.path)
    with here.agent() as agent:
        before = here.settled(agent)
        disk.fill()
        with pytest.raises(OSError, match="No space"):
            (disk.path / "closed.yaml").write_text("# longer than the page that the file has\n" * 200)
        agent.until(lambda: agent.metric("weir_policy_file_invalid", file="closed.yaml") == 1)
        assert "closed.yaml" in agent.status()["node"]["reloads"]["failures"]
        here.works("web")
        disk.free()
        (disk.path / "closed.yaml").write_text(closed("closed", here.door.port, rule="again"))
        agent.until(lambda: not agent.status()["node"]["reloads"]["failures"])
        here.works("web")
        here.await_exact(agent)
        here.leaks_nothing(agent, before, watches=1, versions=1)
        here.lives(agent)


def test_seccomp_directory(here: Node, disk: Disk) -> None:
    """The old profiles stay as they are, whole."""
    here.site.options["--seccomp-dir"] = str(disk.path)
    with here.agent() as agent:
        profile = disk.path / "weir/closed.json"
        old = profile.read_text()
        before = here.settled(agent)
        disk.fill()
        here.site.write("other", closed("other", here.door.port, "{containers: [other]}"))
        here.await_reason(agent, "No space left on device")
        here.works("web")
        assert profile.read_text() == old
        disk.free()
        agent.ready()
        assert json.loads((disk.path / "weir/other.json").read_text())
        assert not list((disk.path / "weir").glob("*.new"))
        here.works("web")
        here.await_exact(agent)
        here.leaks_nothing(agent, before, watches=1, versions=1)
        here.lives(agent)


def test_socket_directory(here: Node, disk: Disk) -> None:
    """An agent that cannot have its socket says so and ends; what is in force stays."""
    with here.agent() as agent:
        here.works("web")
        assert agent.end() == 0
    here.site.options["--socket"] = str(disk.path / "run/agent.sock")
    disk.fill()
    with here.agent(ready=False) as agent:
        assert ended(agent) == 1
    assert f"weir: cannot listen at {disk.path}/run/agent.sock: No space left on device" in here.site.log.read_text()
    here.works("web")
    disk.free()
    with here.agent() as agent:
        here.await_exact(agent)
        here.lives(agent)


def test_logs_on_a_full_disk(here: Node, disk: Disk) -> None:
    """Neither log nor events find room; nothing else suffers, and both go on when there is room."""
    err, out = disk.path / "err", disk.path / "out"
    with outputs(here, err, out) as agent:
        before = here.settled(agent)
        disk.fill(err, out)
        for number in range(5):
            here.works(f"while-full-{number}")
        here.await_exact(agent)
        agent.until(lambda: agent.metric("weir_events_total", outcome="suppressed") >= 5)
        disk.free()
        written = out.stat().st_size
        here.works("later")
        agent.until(lambda: f"cgroup={here.label('later')}" in err.read_text(), err.read_text)
        agent.until(lambda: out.stat().st_size > written)
        whole = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n") and line.strip()]
        assert all(isinstance(json.loads(line), dict) for line in whole)
        here.await_exact(agent)
        here.leaks_nothing(agent, before, watches=6)
        here.lives(agent)
        assert "Traceback" not in err.read_text()
        assert agent.end() == 0


@contextmanager
def outputs(here: Node, err: Path, out: Path) -> Iterator[Running]:
    """An agent with its log and its events in these files."""
    with here.agent(prefix=["sh", "-c", f'exec "$@" 2>>{err} >>{out}', "sh"]) as agent:
        yield agent


def test_logs_nowhere(here: Node) -> None:
    with outputs(here, Path("/dev/full"), Path("/dev/full")) as agent:
        for name in ("one", "two"):
            here.works(name)
        here.await_exact(agent)
        here.lives(agent)
        assert agent.end() == 0


def test_events_closed(here: Node) -> None:
    """Standard output was closed before the agent began."""
    with here.agent(prefix=["sh", "-c", 'exec "$@" >&-', "sh"]) as agent:
        for name in ("one", "two"):
            here.works(name)
        here.await_exact(agent)
        here.lives(agent)
        assert agent.end() == 0


def test_pipes_that_nobody_reads(here: Node) -> None:
    """Log and events wait in full pipes for ever; the agent does not."""
    with ExitStack() as stack:
        pipes = [os.pipe() for _ in range(2)]
        for pipe in pipes:
            for end in pipe:
                stack.callback(os.close, end)
        for _, end in pipes:
            os.set_blocking(end, False)
            while select.select((), (end,), (), 0)[1]:
                os.write(end, bytes(4096))
            os.set_blocking(end, True)
        names = [Path(f"/proc/{os.getpid()}/fd/{end}") for _, end in pipes]
        with outputs(here, *names) as agent:
            for name in ("one", "two", "three"):
                here.works(name)
            here.await_exact(agent)
            here.lives(agent)
            assert agent.end() == 0


def test_no_room_for_cgroups(here: Node) -> None:
    """More containers than places: each is under the policy all the same, and counts with the parent."""
    here.site.options["--max-containers"] = "16"
    names = [f"web-{number}" for number in range(24)]
    for name in names:
        here.cgroup(name)
    with here.agent(ready=False) as agent:
        here.await_reason(agent, "have no place of their own")
        assert agent.metric("weir_map_capacity", map="cgroups") == 16
        before = here.settled(agent)
        for name in names:
            here.works(name)
        here.await_counted(agent)
        here.lives(agent)
        for name in names[2:]:
            here.cgroup(name).rmdir()
        here.cgroup("first").rmdir()
        agent.ready()
        counted = [here.counted(agent, name)() for name in names[:2]]
        for name in names[:2]:
            here.works(name)
        for name, (sent, refused) in zip(names[:2], counted, strict=True):
            agent.until(lambda n=name, s=sent, r=refused: here.counted(agent, n)() == (s + 3 * 38, r + 1))
        here.leaks_nothing(agent, before)
        here.lives(agent)
        assert agent.end() == 0
    here.is_tidy()


def open_policy(number: int) -> Policy:
    return Policy(f"other-{number}", Mode.ENFORCE, OPEN_SOCKETS, (), Action.ALLOW, "o.yaml", "0" * 64, "")


def test_no_room_for_policies(here: Node) -> None:
    """All versions are in use by others: what is in force stays, and the new one comes when there is room."""
    with here.agent() as agent:
        before = here.settled(agent)
        with here.kernel() as kernel, ExitStack() as stack:
            controller = Controller(kernel, here.site.weir.place.root)
            others = [stack.enter_context(here.site.weir.cgroup()) for _ in range(MAX_POLICIES)]
            with here.site.weir.place.locked():
                for number in range(MAX_POLICIES - len(kernel.versions())):
                    controller.enrol(others[number], compiled(open_policy(number)))
            here.site.write("closed", closed("closed", here.door.port, rule="new"))
            here.await_reason(agent, f"already holds {MAX_POLICIES} policy versions")
            assert agent.metric("weir_map_entries", map="policies") == MAX_POLICIES
            here.works("web")
            here.lives(agent)
            with here.site.weir.place.locked():
                controller.withdraw_all([id_of(path) for path in others])
        agent.ready()
        agent.until(lambda: agent.metric("weir_map_entries", map="policies") <= 2)
        here.works("web")
        here.await_exact(agent)
        here.leaks_nothing(agent, before, watches=1, versions=1)
        here.lives(agent)
        assert agent.end() == 0
    here.is_tidy()


@pytest.mark.parametrize("name", ["addresses", "clauses"])
def test_no_room_for_the_tables_of_a_policy(here: Node, name: str) -> None:
    """Half of a new version finds room: the old one stays in force, and the next agent clears away what is nobody's."""
    with here.agent() as agent:
        here.works("web")
        with pinned(here, name) as outer:
            number = next(libbpf.keys(outer, c_uint32))
            inner = c_uint32()
            assert libbpf.lookup(outer, number, inner)
            with (
                open(libbpf.map_by_id(inner.value), "rb") as one,
                pytest.raises(OSError, match="Argument list too long"),
            ):
                for index in range(MAX_POLICIES):
                    libbpf.update(outer, c_uint32(1 << 20 | index), c_uint32(one.fileno()))
        here.site.write("closed", closed("closed", here.door.port, rule="new"))
        here.await_reason(agent, "cannot write the policy closed: Argument list too long")
        here.works("web")
        here.works("born-meanwhile")
        here.await_exact(agent)
        here.lives(agent)
        agent.end(signal.SIGKILL)
    with here.agent() as agent:
        here.works("web")
        here.await_exact(agent)
        with here.kernel() as kernel:
            assert [rule.name for version in kernel.versions().values() for rule in version.rules][-1] == "new"
        here.lives(agent)
        assert agent.end() == 0
    here.is_tidy()


def test_no_room_for_names(here: Node) -> None:
    """A container that cannot be given its names for the next agent is ruled and counted like any other."""
    here.site.options["--max-containers"] = "32"
    with here.agent() as agent:
        before = here.settled(agent)
        fillers = [c_uint64(1 << 40 | index) for index in range(32)]
        with pinned(here, "labels") as labels:
            with pytest.raises(OSError, match="Argument list too long"):
                for filler in fillers:
                    libbpf.update(labels, filler, abi.Labels(b"{}"))
            here.works("web")
            here.await_reason(agent, f"cannot name cgroup {id_of(here.cgroup('web'))}: Argument list too long")
            assert agent.metric("weir_enforced", layer="hooks", cgroup=here.label("web")) == 1
            here.works("web")
            here.await_exact(agent)
            here.lives(agent)
            for filler in fillers[4:]:
                libbpf.delete(labels, filler)
        agent.ready()
        here.works("web")
        here.await_exact(agent)
        here.leaks_nothing(agent, before, watches=1)
        agent.end(signal.SIGKILL)
    here.cgroup("web").rmdir()
    with here.agent() as agent:  # and this one knows it by what was written down late; what is nobody's it clears away
        here.await_exact(agent)
        with here.kernel() as kernel:
            assert kernel.labels().keys() <= kernel.enrolments().keys()
        here.lives(agent)
        assert agent.end() == 0
    here.is_tidy()


@contextmanager
def pinned(here: Node, name: str) -> Iterator[int]:
    """A table of the site's, by its descriptor."""
    fd = libbpf.obj_get(here.site.weir.place.pins.maps / name)
    try:
        yield fd
    finally:
        os.close(fd)


def test_no_room_for_refusals(here: Node) -> None:
    """What cannot be counted by its kind is refused all the same, and counted as uncounted."""
    with here.agent() as agent:
        before = here.settled(agent)
        (version,) = {row["sha256"] for row in agent.status()["cgroups"]}
        assert version
        with pinned(here, "refusals") as refusals, here.kernel() as kernel:
            number = next(iter(kernel.versions()))
            fillers = [
                abi.Refusal(number, 4000 + index // 500, index % 500, Hook.CONNECT, Reason.RULE, 0, 0)
                for index in range(abi.MAX_REFUSALS)
            ]
            with pytest.raises(OSError, match="Argument list too long"):
                for filler in fillers:
                    libbpf.update(refusals, filler, c_uint64(1))
            agent.until(lambda: agent.metric("weir_map_entries", map="refusals") == abi.MAX_REFUSALS)
            here.send("web", 3)
            here.is_refused("web")
            here.refusals["web"] -= 1
            agent.until(lambda: agent.metric("weir_refusals_uncounted_total") == 1)
            here.await_exact(agent)
            assert agent.status()["cgroups"]
            here.lives(agent)
            for filler in fillers:
                libbpf.delete(refusals, filler)
        here.works("web")
        here.await_exact(agent)
        here.leaks_nothing(agent, before, watches=1)
        here.lives(agent)
