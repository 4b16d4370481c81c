"""Which containers' processes have a seccomp filter: directories that stand for cgroups, and real processes."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from agent.cgroups.containers import Identity, Kind
from agent.node import filters
from agent.node.choose import Choice, Why
from agent.node.filters import Processes
from agent.node.members import Member, Names


def container(root: Path, name: str, number: int, *pids: int) -> Member:
    (root / name).mkdir()
    (root / name / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    identity = Identity(Kind.CONTAINER, "containerd", name)
    return Member(PurePosixPath(name), number, identity, Names(), Choice("base", Why.DEFAULT))


def test_a_new_container_is_looked_at_until_it_has_a_process(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    old = container(tmp_path, "old", 1, os.getpid())
    processes.look([old])
    new = container(tmp_path, "new", 2)
    for _ in range(2):
        processes.greet({1: old, 2: new})
        assert not processes.look_at_young()
        assert processes.of(2).processes == 0
    (tmp_path / "new/cgroup.procs").write_text(f"{os.getpid()}\n")
    assert processes.look_at_young()
    assert processes.of(2).processes == processes.of(1).processes == 1
    (tmp_path / "new/cgroup.procs").write_text("")
    assert not processes.look_at_young(), "the full look sees to it from here"
    processes.look([old])
    assert processes.of(2).processes == 0


def test_one_that_never_has_a_process_is_left_to_the_full_look(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    late = container(tmp_path, "late", 2)
    processes.greet({2: late})
    assert not processes._young, "there at the start"
    other = container(tmp_path, "other", 1)
    processes.look([other])
    processes.greet({1: other, 2: late})
    ((number, (member, until)),) = processes._young.items()
    processes._young[number] = (member, until - filters.YOUNG)
    (tmp_path / "late/cgroup.procs").write_text(f"{os.getpid()}\n")
    assert not processes.look_at_young()
    for _ in range(filters.TURNS):
        processes.look([late])
    assert processes.of(2).processes == 1


def test_who_is_gone_is_forgotten_at_once(tmp_path: Path) -> None:
    """A node can have thousands of births between two full looks."""
    processes = Processes(tmp_path)
    old, brief = container(tmp_path, "old", 1), container(tmp_path, "brief", 2)
    processes.look([old])
    processes.greet({1: old, 2: brief})
    processes.greet({1: old})
    assert processes._known.keys() == {1}
    assert not processes._young
