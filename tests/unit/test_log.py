"""The agent's log, as it is written."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.errors import WeirError
from agent.node.log import MOST, QUIET, Quiet, log, set_up


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    """Where it is written; the process's logging is as before afterwards."""
    root, own = logging.getLogger(), logging.getLogger("weir")
    before = root.handlers[:], root.level, own.level
    yield io.StringIO()
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    own.setLevel(before[2])


def as_json(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_json(out: io.StringIO) -> None:
    set_up("json", "info", out)
    log.info("container found", container="php", policy="appengine", processes=3, path=Path("/a"), ready=False)
    (line,) = as_json(out)
    time = line.pop("time")
    assert line == {
        "level": "info",
        "message": "container found",
        "container": "php",
        "policy": "appengine",
        "processes": 3,
        "path": "/a",
        "ready": False,
    }
    assert time.endswith("Z")
    assert len(time) == len("2026-11-21T12:00:00.000Z")


def test_text(out: io.StringIO) -> None:
    set_up("text", "info", out)
    log.info("container found", container="php", pod="a b", problem="", count=3)
    time, _, rest = out.getvalue().partition(" ")
    assert time.endswith("Z")
    assert rest == 'info container found container=php pod="a b" problem="" count=3\n'


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("name", ["x\nerror all is lost", "\x1b[2J", "a\u2028b", "a\x9bb", 'x" level="error', "\udcff"])
def test_no_name_can_fake_a_line_or_move_the_cursor(form: str, name: str, out: io.StringIO) -> None:
    """Whoever starts a container chooses its names."""
    set_up(form, "info", out)
    log.info("container found", container=name)
    log.warning(f"what a library says of {name}")
    text = out.getvalue()
    assert len(text.splitlines()) == 2
    assert all(line.isprintable() for line in text.splitlines())
    text.encode()
    if form == "json":
        assert as_json(out)[0]["container"] == name
    else:
        assert text.splitlines()[0].endswith(f"container={json.dumps(name)}")


def test_an_error_of_weirs_has_its_hint_beside_it(out: io.StringIO) -> None:
    set_up("json", "info", out)
    log.warning("policy not read", error=WeirError("line 3 is wrong", "Write it otherwise."))
    log.warning("another", error=WeirError("no hint"), hint="its own")
    first, second = as_json(out)
    assert (first["error"], first["hint"]) == ("line 3 is wrong", "Write it otherwise.")
    assert (second["error"], second["hint"]) == ("no hint", "its own")


def test_fields_cannot_replace_what_every_line_has(out: io.StringIO) -> None:
    set_up("json", "info", out)
    log.info("container found", level="debug", time="never")
    assert as_json(out)[0]["level"] == "info"
    assert as_json(out)[0]["time"] != "never"


def test_levels(out: io.StringIO) -> None:
    set_up("text", "warning", out)
    log.info("not written")
    log.warning("written")
    assert out.getvalue().count("\n") == 1
    set_up("text", "debug", out)
    log.debug("written too")
    assert out.getvalue().count("\n") == 2, "set up twice, written once"


def test_libraries_are_heard_from_warnings_up(out: io.StringIO) -> None:
    set_up("json", "debug", out)
    logging.getLogger("library").info("no")
    logging.getLogger("library").warning("%d things", 3)
    assert [line["message"] for line in as_json(out)] == ["3 things"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_bug_shows_where_it_is(form: str, out: io.StringIO) -> None:
    set_up(form, "info", out)
    try:
        int("lost")
    except ValueError as e:
        log.bug("a bug", error=e)
    assert "test_a_bug_shows_where_it_is" in out.getvalue()
    assert "ValueError" in out.getvalue()


def record(message: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("weir", level, "", 0, message, None, None)


def test_a_warning_is_written_once_a_minute_with_what_was_left_out() -> None:
    now = [1000.0]
    quiet = Quiet(lambda: now[0])
    assert quiet.filter(record("full"))
    assert not quiet.filter(record("full"))
    now[0] += QUIET - 1
    assert not quiet.filter(record("full"))
    assert quiet.filter(record("another"))
    assert quiet.filter(record("full", logging.ERROR))
    now[0] += 1
    again = record("full")
    assert quiet.filter(again)
    assert again.__dict__["fields"] == {"left_out": 2}
    assert not quiet.filter(record("full"))
    now[0] += QUIET
    third = record("full")
    assert quiet.filter(third)
    assert third.__dict__["fields"] == {"left_out": 1}


def test_what_is_no_warning_is_always_written() -> None:
    quiet = Quiet(lambda: 0.0)
    assert all(quiet.filter(record("container found", logging.INFO)) for _ in range(3))


def test_the_first_warning_after_boot_is_written() -> None:
    """CLOCK_MONOTONIC begins near 0."""
    assert Quiet(lambda: 1.0).filter(record("full"))


def test_the_fields_of_a_warning_make_no_other_message(out: io.StringIO) -> None:
    set_up("json", "info", out)
    for number in range(50):
        log.warning("annotation names no policy", container=number)
    assert [line["container"] for line in as_json(out)] == [0]


def test_messages_made_of_data_take_no_memory_for_ever() -> None:
    quiet = Quiet(lambda: 0.0)
    for number in range(2 * MOST):
        quiet.filter(record(str(number)))
    assert len(quiet._seen) == MOST


def test_it_is_written_to_stderr() -> None:
    code = "from agent.node.log import log, set_up; set_up('text', 'info'); log.info('here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.endswith(" info here\n")
    assert done.stdout == ""
