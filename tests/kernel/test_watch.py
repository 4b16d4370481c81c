"""Births and deaths in the real cgroup2 tree, each test below a cgroup of its own."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pytest

from agent.cgroups import tree
from agent.cgroups.containers import may_hold
from agent.cgroups.parents import Parents
from agent.cgroups.roots import is_worth_watching, parse
from agent.cgroups.watch import Changes, Watch
from tests import need
from tests.kernel.cage import PATIENCE, Link, fork

MAX_QUEUED = Path("/proc/sys/fs/inotify/max_queued_events")
LIMIT = Path("/proc/sys/user/max_inotify_watches")
_CLONE_NEWUSER = 0x10000000


@pytest.fixture(name="mount")
def _mount() -> Path:
    need.root()
    return tree.mount()


@pytest.fixture
def own(mount: Path) -> Iterator[PurePosixPath]:
    """A new cgroup, by its path below the mount; emptied and removed afterwards."""
    path = PurePosixPath(f"weir-watch-{os.getpid()}")
    (mount / path).mkdir()
    yield path
    for directory, _, _ in os.walk(mount / path, topdown=False):
        os.rmdir(directory)


@pytest.fixture
def watch(mount: Path, own: PurePosixPath) -> Iterator[Watch]:
    """Watches the test's own cgroup and what is in it, but nothing called leaf."""
    with closing(Watch(mount, lambda path: path.name != "leaf")) as made:
        made.add_tree(own)
        yield made


def watched(watch: Watch) -> int:
    """How many watches the kernel holds for it."""
    return Path(f"/proc/self/fdinfo/{watch.fileno()}").read_text().count("inotify wd:")


def until(watch: Watch, enough: Callable[[Changes], bool]) -> Changes:
    """The first answer that is enough; others are of no interest to the test."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        changes = watch.read(1)
        if enough(changes):
            return changes
    pytest.fail("nothing came")


def test_a_birth_and_a_death_are_told(watch: Watch, mount: Path, own: PurePosixPath) -> None:
    assert watch.read(0) == Changes()
    (mount / own / "a").mkdir()
    assert select.select([watch], [], [], PATIENCE)[0] == [watch]
    assert watch.read(0) == Changes(created=(own / "a",))
    (mount / own / "a").rmdir()
    assert watch.read(10) == Changes(removed=(own / "a",))
    assert watched(watch) == 1


def test_files_are_no_births(watch: Watch, mount: Path, own: PurePosixPath) -> None:
    (mount / own / "cgroup.procs").read_text()
    (mount / own / "cgroup.max.depth").write_text("7")
    assert watch.read(0) == Changes()


def test_children_older_than_the_watch_are_found_once(watch: Watch, mount: Path, own: PurePosixPath) -> None:
    (mount / own / "a/b/c").mkdir(parents=True)
    first = watch.read(10)
    assert first.created == (own / "a", own / "a/b", own / "a/b/c")
    (mount / own / "a/b/d").mkdir()
    assert watch.read(10) == Changes(created=(own / "a/b/d",))
    assert watch.read(0) == Changes()


def test_what_is_there_at_the_start_is_found(mount: Path, own: PurePosixPath) -> None:
    (mount / own / "a/b").mkdir(parents=True)
    with closing(Watch(mount, lambda _: True)) as watch:
        assert watch.add_tree(own) == Changes(created=(own / "a", own / "a/b"))
        assert watch.add_tree(own / "absent") == Changes()


def test_what_is_not_wanted_is_not_watched(watch: Watch, mount: Path, own: PurePosixPath) -> None:
    (mount / own / "leaf/inner").mkdir(parents=True)
    assert watch.read(10) == Changes(created=(own / "leaf",))
    assert watched(watch) == 1
    (mount / own / "leaf/other").mkdir()
    assert watch.read(0) == Changes()


def test_born_and_dead_between_two_reads_has_passed_and_a_successor_is_both(
    watch: Watch, mount: Path, own: PurePosixPath
) -> None:
    (mount / own / "a").mkdir()
    (mount / own / "a").rmdir()
    assert watch.read(10) == Changes(passed=(own / "a",))
    (mount / own / "a").mkdir()
    watch.read(10)
    (mount / own / "a").rmdir()
    (mount / own / "a/b").mkdir(parents=True)
    assert watch.read(10) == Changes(created=(own / "a", own / "a/b"), removed=(own / "a",))
    (mount / own / "a/c").mkdir()
    assert watch.read(10) == Changes(created=(own / "a/c",)), "the successor is watched"


def test_no_watch_stays_behind(watch: Watch, mount: Path, own: PurePosixPath) -> None:
    """kernfs does not take the watch of a removed cgroup back by itself."""
    for _ in range(500):
        (mount / own / "a/b").mkdir(parents=True)
        watch.read(0)
        (mount / own / "a/b").rmdir()
        (mount / own / "a").rmdir()
        watch.read(0)
    assert watched(watch) == 1
    assert (len(watch._paths), len(watch._watches), watch._children) == (1, 1, {own: set()})


def test_a_storm_while_it_is_read(watch: Watch, mount: Path, own: PurePosixPath) -> None:
    """2,000 births and deaths, read at every seventh: the sum of what is told is the truth."""
    known: set[PurePosixPath] = set()

    def take(changes: Changes) -> None:
        known.difference_update(changes.removed)
        known.update(changes.created)

    living: list[Path] = []
    for i in range(2000):
        path = mount / own / f"p{i}"
        path.mkdir()
        (path / "leaf").mkdir()
        living.append(path)
        if i % 3:
            gone = living.pop(0)
            (gone / "leaf").rmdir()
            gone.rmdir()
        if i % 7 == 0:
            take(watch.read(0))
    take(watch.read(0))
    assert known == tree.scan(mount, own).keys() - {own}
    assert len(known) == 2 * len(living)
    assert watched(watch) == 1 + len(living)


def test_a_storm_beside_the_reader(watch: Watch, mount: Path, own: PurePosixPath) -> None:
    """Another process makes and removes under the same ten names, so that what is listed is ahead of what is told."""

    def job(link: Link) -> None:
        dice = random.Random(7)
        for _ in range(4000):
            pod = mount / own / f"p{dice.randrange(10)}"
            if not pod.exists():
                pod.mkdir()
            elif (pod / "leaf").exists():
                (pod / "leaf").rmdir()
                if dice.random() < 0.8:
                    pod.rmdir()
            else:
                (pod / "leaf").mkdir()

    known: set[PurePosixPath] = set()
    with fork(job, lambda: None) as link:
        over = False
        while not over:
            over = link._connection.poll()
            changes = watch.read(0)
            assert known >= set(changes.removed)
            known.difference_update(changes.removed)
            assert not known & set(changes.created)
            known.update(changes.created)
        link.receive()
    assert known == tree.scan(mount, own).keys() - {own}
    assert watched(watch) == 1 + sum(path.name != "leaf" for path in known)


def test_what_follows_the_watch_knows_what_a_scan_finds(mount: Path, own: PurePosixPath) -> None:
    """Also which cgroup has a name now: the ids, while another process makes the same names again and again."""

    def job(link: Link) -> None:
        dice = random.Random(11)
        for _ in range(4000):
            service = mount / own / f"s{dice.randrange(5)}.service"
            inside = service / f"c{dice.randrange(3)}"
            if not service.exists():
                service.mkdir()
            elif not inside.exists():
                inside.mkdir()
            else:
                inside.rmdir()
                if dice.random() < 0.5:
                    with suppress(OSError):
                        service.rmdir()

    parents = Parents(mount)
    with closing(Watch(mount, lambda path: is_worth_watching(path, parse([own.name])))) as watch:
        watch.add_tree(own)
        looks = [parents.below(own)]
        with fork(job, lambda: None) as link:
            over = False
            while not over:
                over = link._connection.poll()
                parents.follow(watch.read(0))
                looks.append({**parents.below(own)})
            link.receive()
    found = tree.scan(mount, own, lambda path: may_hold(path, own))
    assert parents.below(own) == found
    assert len(found) > 1
    assert sum(one != other for one, other in pairwise(looks)) > 20, "it changed under the eyes of the reader"
    parents.follow(Changes(overflowed=True))
    assert parents.below(own) == found
    parents.follow(Changes(removed=(own,), created=(own,)))
    assert parents.below(own) == found
    assert parents.below(own / "absent") == {}


def test_an_overflow_is_told_and_nothing_is_missed(watch: Watch, mount: Path, own: PurePosixPath) -> None:
    (mount / own / "old/leaf").mkdir(parents=True)
    watch.read(10)
    for i in range(int(MAX_QUEUED.read_text()) // 2 + 10):
        (mount / own / f"n{i % 10}").mkdir()
        (mount / own / f"n{i % 10}").rmdir()
    (mount / own / "old/leaf").rmdir()
    (mount / own / "old").rmdir()
    (mount / own / "new/leaf").mkdir(parents=True)
    changes = watch.read(10)
    assert changes.overflowed
    assert changes.created == (own / "new", own / "new/leaf")
    assert changes.removed == (own / "old", own / "old/leaf")
    (mount / own / "new/other").mkdir()
    assert watch.read(10) == Changes(created=(own / "new/other",))
    assert watched(watch) == 3


def test_a_successor_that_came_unnoticed_is_found_by_retry(mount: Path, own: PurePosixPath) -> None:
    """A watched top has no watched parent, so that nobody tells of its end."""
    (mount / own / "top/leaf").mkdir(parents=True)
    with closing(Watch(mount, lambda path: path.name != "leaf")) as watch:
        watch.add_tree(own / "top")
        (mount / own / "top/leaf").rmdir()
        (mount / own / "top").rmdir()
        (mount / own / "top/leaf").mkdir(parents=True)
        changes = watch.retry()
        assert own / "top/leaf" in changes.created
        assert own / "top/leaf" in changes.removed
        assert watched(watch) == 1


def test_no_more_watches_is_visible_and_retry_finds_what_was_missed(mount: Path, own: PurePosixPath) -> None:
    """In a user namespace of its own, which may have one watch, later ten."""

    def enter() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "unshare")
        LIMIT.write_text("1")

    def job(link: Link) -> None:
        with closing(Watch(mount, lambda _: True)) as watch:
            watch.add_tree(own)
            link.send()
            link.receive()
            link.send((watch.read(10), watch.limited))
            link.receive()
            link.send((watch.read(0), watch.retry(), watch.limited))
            LIMIT.write_text("10")
            link.send((watch.retry(), watch.limited))
            link.receive()
            link.send(watch.read(10))

    with fork(job, enter) as link:
        link.receive()
        (mount / own / "a/b").mkdir(parents=True)
        link.send()
        changes, limited = link.receive()
        assert changes.created == (own / "a", own / "a/b"), "what is there already is found all the same"
        assert "fs.inotify.max_user_watches" in limited
        (mount / own / "a/c").mkdir()
        link.send()
        changes, again, limited = link.receive()
        assert changes == Changes()
        assert again == Changes(created=(own / "a/c",))
        assert limited
        assert link.receive() == (Changes(), "")
        (mount / own / "a/d").mkdir()
        link.send()
        assert link.receive() == Changes(created=(own / "a/d",))


def test_without_a_descriptor_nothing_is_taken_for_gone(watch: Watch, mount: Path, own: PurePosixPath) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    (mount / own / "a/b").mkdir(parents=True)
    try:
        with ExitStack() as stack:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
            with suppress(OSError):
                while True:
                    stack.callback(os.close, os.dup(0))
            assert watch.read(10) == Changes(created=(own / "a",))
            assert "Too many open files" in watch.limited
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert watch.retry() == Changes(created=(own / "a/b",))
    assert not watch.limited


def test_a_root_that_comes_later_is_found_with_its_containers(mount: Path, own: PurePosixPath) -> None:
    """As the agent uses it: from the mount down, only where the patterns lead."""
    patterns = parse([f"{own}/kube/kubepods"])
    container = own / "kube/kubepods/burstable/pod1" / ("ab" * 32)
    with closing(Watch(mount, lambda path: is_worth_watching(path, patterns))) as watch:
        watch.add_tree(PurePosixPath())
        (mount / own / "other/deep").mkdir(parents=True)
        (mount / container).mkdir(parents=True)
        (mount / container / "init.scope").mkdir()
        changes = until(watch, lambda changes: container in changes.created)
        assert container.parent in changes.created
        assert not {container / "init.scope", own / "other/deep"} & set(changes.created)


def test_scan_is_the_tree_as_stat_knows_it(mount: Path, own: PurePosixPath) -> None:
    for name in ("a/b/c", "a/d", "leaf/x"):
        (mount / own / name).mkdir(parents=True)
    found = tree.scan(mount, own, lambda path: path.name != "leaf")
    assert set(found) == {own, *(own / name for name in ("a", "a/b", "a/b/c", "a/d", "leaf"))}
    assert found == {path: tree.cgroup_id(mount / path) for path in found}
    everything = [mount / own, *tree.descendants(mount / own)]
    assert {mount / path for path in tree.scan(mount, own)} == set(everything)
    assert tree.paths_by_id(mount / own) == {tree.cgroup_id(path): path for path in everything}
    assert tree.scan(mount, own / "absent") == {}
