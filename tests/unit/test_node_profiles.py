"""The folder of profiles that the agent keeps: what is written, what is left alone, what is removed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import WeirError
from agent.node.profiles import profile_of, write
from agent.policy import find
from agent.policy.model import Mode

A, B = {"defaultAction": "SCMP_ACT_ALLOW"}, {"defaultAction": "SCMP_ACT_LOG"}


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in (directory / "weir").iterdir() if not file.name.startswith("."))


def test_a_profile_is_a_file_that_everybody_may_read(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        assert write(tmp_path, {"a": A, "b": B}) == ("a", "b")
    finally:
        os.umask(old)
    assert names(tmp_path) == ["a.json", "b.json"]
    file = tmp_path / "weir/a.json"
    assert json.loads(file.read_bytes()) == A
    assert file.stat().st_mode & 0o777 == 0o644
    assert file.parent.stat().st_mode & 0o777 == 0o755


def test_what_is_right_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {"a": A, "b": B})
    before = {file.name: file.stat().st_ino for file in (tmp_path / "weir").iterdir()}
    assert write(tmp_path, {"a": A, "b": A}) == ("b",)
    after = {file.name: file.stat().st_ino for file in (tmp_path / "weir").iterdir()}
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["b.json"]
    (tmp_path / "weir/a.json").write_bytes(b"\xff")
    assert write(tmp_path, {"a": A, "b": A}) == ("a",)


def test_a_reader_keeps_the_file_that_it_has_opened(tmp_path: Path) -> None:
    """Replaced, not written over."""
    write(tmp_path, {"a": A})
    with (tmp_path / "weir/a.json").open() as reader:
        write(tmp_path, {"a": B})
        assert json.load(reader) == A


def test_only_our_files_are_removed(tmp_path: Path) -> None:
    write(tmp_path, {"a": A, "b": B})
    (tmp_path / "weir/other.json").write_text("{}")
    (tmp_path / "b.json").write_text("{}")
    assert write(tmp_path, {"a": A}) == ()
    assert names(tmp_path) == ["a.json", "other.json"]
    assert (tmp_path / "b.json").exists()
    (tmp_path / "weir/a.json").unlink()
    assert write(tmp_path, {}) == ()
    assert names(tmp_path) == ["other.json"]


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_killed_between_two_steps_nothing_of_ours_is_forgotten(tmp_path: Path, done: int) -> None:
    """A child ends at its n-th rename; the next call still knows which files are ours."""
    write(tmp_path, {"a": A})
    child = os.fork()
    if child == 0:
        rename, left = os.replace, [done]

        def end(*paths: Path) -> None:
            if not left[0]:
                os._exit(0)
            left[0] -= 1
            rename(*paths)

        os.replace = end  # type: ignore[assignment]
        write(tmp_path, {"b": A, "c": B})
        os._exit(1 if done < 4 else 0)
    assert os.waitpid(child, 0)[1] == 0
    write(tmp_path, {"d": A})
    assert names(tmp_path) == ["d.json"]
    assert (tmp_path / "weir/.written-by-weir").read_text() == "d\n"


def test_a_missing_directory_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        WeirError, match=r"nowhere/weir cannot be kept up to date: No such file or directory\."
    ) as failure:
        write(tmp_path / "nowhere", {"a": A})
    assert str(tmp_path / "nowhere") in failure.value.hint


def test_a_file_in_the_way_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "weir").write_text("")
    with pytest.raises(WeirError, match="cannot be kept up to date"):
        write(tmp_path, {"a": A})


def test_a_policy_in_audit_mode_refuses_nothing() -> None:
    policy = find.load("appengine")
    assert profile_of(policy, machine="x86_64")["syscalls"]
    assert profile_of(replace(policy, mode=Mode.AUDIT), machine="x86_64")["syscalls"] == []


def test_a_machine_without_a_filter_is_an_error() -> None:
    with pytest.raises(WeirError, match="riscv64") as failure:
        profile_of(find.load("appengine"), machine="riscv64")
    assert failure.value.hint
