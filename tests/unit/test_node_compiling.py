"""The process that compiles a node's policies: what is too big, too slow or deadly is one file's problem."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from agent.node.compiling import Compiling, Task
from agent.node.policies import Directory
from agent.policy import sets
from agent.policy.yamlfile import MAX_BYTES

HEAD = "apiVersion: weir.dev/v1\nkind: SocketPolicy\nmetadata: {name: %s}\n"


def write(path: Path, name: str, text: str = "spec: {}\n") -> Task:
    file = path / f"{name}.yaml"
    file.write_text(HEAD % name + text)
    return Task(file.name, str(file))


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A policy that is never compiled to its end: a set that it names waits for a writer."""
    policies = tmp_path / "policies"
    shutil.copytree(sets.POLICIES, policies)
    os.mkfifo(policies / "sets" / "endless.txt")
    monkeypatch.setenv("WEIR_POLICIES", str(policies))
    return write(tmp_path, "slow", "spec: {egress: [{name: a, action: deny, to: [{set: endless}]}]}\n")


def finish(compiling: Compiling) -> Compiling:
    while not compiling.ended():
        time.sleep(0.005)
    return compiling


def wait_for_an_answer(compiling: Compiling) -> int:
    """Return the process's id once it has written its first words."""
    child = compiling._child
    assert child is not None
    while os.fstat(child._out.fileno()).st_size < 1000:
        assert not compiling.ended()
        time.sleep(0.005)
    return child._process.pid


def test_no_tasks_need_no_process() -> None:
    compiling = Compiling([], None)
    assert compiling.ended()
    assert (compiling.answers, compiling.failure) == ({}, "")


def test_known_bytes_get_no_answer(tmp_path: Path) -> None:
    task = write(tmp_path, "a")
    first = finish(Compiling([task], None)).answers["a.yaml"]
    assert first.loaded and not first.problem
    again = finish(Compiling([Task(task.key, task.file, first.digest)], None)).answers["a.yaml"]
    assert (again.digest, again.loaded, again.problem) == (first.digest, None, "")


def test_what_cannot_be_read_is_a_problem_of_its_own(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "dir.yaml").mkdir()
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    tasks = [Task(name, str(tmp_path / f"{name}.yaml")) for name in ("fifo", "dir", "gone", "loop", "zero")]
    answers = finish(Compiling([*tasks, write(tmp_path, "good")], None)).answers
    assert {name: answer.problem.split("yaml ")[-1].split("\n")[0] for name, answer in answers.items()} == {
        "fifo": "is no regular file", "dir": "is no regular file", "gone": "cannot be read: No such file or directory",
        "loop": "cannot be read: Too many levels of symbolic links", "zero": "is no regular file", "good.yaml": "",
    }  # fmt: skip


def test_ten_megabytes_and_bombs_are_refused(tmp_path: Path) -> None:
    layers = "".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    tasks = [
        write(tmp_path, "big", "# " + "x" * 10_000_000),
        write(tmp_path, "aliases", f"spec:\n  a0: &a0 [x]\n{layers}"),
        write(tmp_path, "deep", "spec: " + "[" * 400_000),
        write(tmp_path, "binary", "\0" * 1000),
        write(tmp_path, "good"),
    ]
    answers = finish(Compiling(tasks, None)).answers
    assert f"the file is over {MAX_BYTES:,} bytes" in answers["big.yaml"].problem
    assert "aliases are not read" in answers["aliases.yaml"].problem
    assert "nested deeper" in answers["deep.yaml"].problem
    assert "a control character" in answers["binary.yaml"].problem
    assert answers["good.yaml"].loaded


def test_a_file_full_of_mistakes_is_reported_in_part(tmp_path: Path) -> None:
    """The agent keeps a page of 99,901 problems, and the process has memory for all of them."""
    task = write(tmp_path, "wrong", f"spec: {{egress: [{'a,' * 99_900}]}}\n")
    answers = finish(Compiling([task, write(tmp_path, "good")], None)).answers
    assert "99901 problems" in answers["wrong.yaml"].problem
    assert len(answers["wrong.yaml"].problem) < 5000
    assert answers["good.yaml"].loaded


def test_a_slow_file_is_given_up_and_the_others_are_not(tmp_path: Path, slow: Task) -> None:
    tasks = [write(tmp_path, "before"), slow, write(tmp_path, "after")]
    compiling = finish(Compiling(tasks, None, seconds=3))
    assert compiling.failure == ""
    assert compiling.answers["slow.yaml"].problem == (
        f"{tmp_path}/slow.yaml: compiling it failed: the process took longer than 3 s"
    )
    assert compiling.answers["before.yaml"].loaded
    assert compiling.answers["after.yaml"].loaded


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_dies_is_one_files_problem(tmp_path: Path, slow: Task, number: signal.Signals) -> None:
    compiling = Compiling([write(tmp_path, "before"), slow, write(tmp_path, "after")], None)
    os.kill(wait_for_an_answer(compiling), number)
    finish(compiling)
    assert compiling.answers["slow.yaml"].problem.endswith(f"the process was killed by signal {number.value}")
    assert compiling.answers["before.yaml"].loaded
    assert compiling.answers["after.yaml"].loaded


def test_closing_ends_the_process(tmp_path: Path, slow: Task) -> None:
    compiling = Compiling([write(tmp_path, "before"), slow], None)
    pid = wait_for_an_answer(compiling)
    compiling.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_cannot_begin_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "base")
    policies = Directory(tmp_path, "base")
    policies.read()
    loaded = dict(policies.loaded)
    write(tmp_path, "shop")
    for variable, value, reason in (
        ("PYTHONHOME", "/nowhere", "policies cannot be compiled: the process for it ended with status 1"),
        ("WEIR_POLICIES", "", ""),
    ):
        monkeypatch.setenv(variable, value)
        policies._not_before = 0.0
        changed = policies.read()
        if reason:
            assert not changed
            assert policies.loaded == loaded
            assert policies.reloads.failures[str(tmp_path)].startswith(reason)
            assert not policies.refresh()  # and not at once again
            assert policies.reloads.failures_total == 1
            monkeypatch.delenv(variable)
        else:
            assert changed
            assert ([*policies.loaded], policies.reloads.failures) == (["base", "shop"], {})
