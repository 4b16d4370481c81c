"""Which cgroups are managed parents."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from agent.cgroups.roots import DEFAULT, find, is_worth_watching, parse, root_of, select
from agent.errors import WeirError

C = "0ca2b3cd20e5f55a2bbe8d4aa3f811cf7963b40f0542ad147054b0fcb60fc400"


def paths(*names: str) -> tuple[PurePosixPath, ...]:
    return tuple(PurePosixPath(name) for name in names)


@pytest.mark.parametrize(
    ("globs", "there", "found"),
    [
        (DEFAULT, ["kubepods.slice", "system.slice"], ["kubepods.slice"]),
        (DEFAULT, ["kubepods", "kubepods/burstable"], ["kubepods"]),
        (DEFAULT, ["kubelet.slice/kubelet-kubepods.slice"], ["kubelet.slice/kubelet-kubepods.slice"]),
        (DEFAULT, ["kubelet/kubepods"], ["kubelet/kubepods"]),
        (DEFAULT, [f"system.slice/docker-{C}.scope/kubepods"], []),
        (["tenant-*"], ["tenant-a", "tenant-b", "tenants"], ["tenant-a", "tenant-b"]),
        (["*"], ["a/b"], []),
        (["*/kubepods"], ["a/kubepods", "a/b/kubepods", "kubepods"], ["a/kubepods"]),
        (["/jobs/"], ["jobs"], ["jobs"]),
        (["job[12]"], ["job1", "job2", "job3"], ["job1", "job2"]),
        (["[[]x"], ["[x", "x"], ["[x"]),
        (["Jobs"], ["jobs"], []),
    ],
)
def test_select(globs: list[str], there: list[str], found: list[str]) -> None:
    assert select(paths(*there), parse(globs)).found == paths(*found)


def test_of_two_that_lie_in_each_other_the_outer_is_kept_and_it_is_told() -> None:
    roots = select(paths("a/b/c", "a/b", "a/b2", "z"), parse(["a/b/*", "a/b", "a/b2", "y"]))
    assert roots.found == paths("a/b", "a/b2")
    assert roots.covered == {PurePosixPath("a/b/c"): PurePosixPath("a/b")}
    assert roots.missing == ("y",)


@pytest.mark.parametrize(
    "glob", ["", "/", "//", "a//b", ".", "a/../b", "**", "a/**/b", "a[b", "a\0", "/sys/fs/cgroup/kubepods"]
)
def test_a_bad_glob(glob: str) -> None:
    with pytest.raises(WeirError) as caught:
        parse([glob])
    assert caught.value.hint


def test_find_in_a_tree(tmp_path: Path) -> None:
    for name in ("kubepods/burstable/pod1", "system.slice/a.service", "system.slice/b.service"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "system.slice/c.service").write_text("")
    roots = find(tmp_path, parse(["kubepods", "system.slice/*.service", "kubepods.slice"]))
    assert roots.found == paths("kubepods", "system.slice/a.service", "system.slice/b.service")
    assert roots.missing == ("kubepods.slice",)
    (tmp_path / "kubepods.slice").mkdir()
    assert paths("kubepods.slice")[0] in find(tmp_path, parse(["kubepods.slice"])).found


def test_root_of_is_the_outermost_that_matches() -> None:
    patterns = parse(["a/*/c", "a/b"])
    assert root_of(PurePosixPath("a/b/c/d"), patterns) == PurePosixPath("a/b")
    assert root_of(PurePosixPath("a/x/c"), patterns) == PurePosixPath("a/x/c")
    assert root_of(PurePosixPath("a/x"), patterns) is None


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        (".", True),
        ("kubepods.slice", True),
        ("kubepods.slice/kubepods-burstable.slice", True),
        (f"kubepods.slice/kubepods-pod1.slice/cri-containerd-{C}.scope", False),
        ("kubelet", True),
        ("kubelet/other", False),
        ("system.slice", False),
    ],
)
def test_the_way_to_a_root_that_is_not_there_yet_is_watched_and_no_more(path: str, answer: bool) -> None:
    assert is_worth_watching(PurePosixPath(path), parse(DEFAULT)) is answer
