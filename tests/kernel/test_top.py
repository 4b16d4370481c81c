"""`weir top` on the real kernel: what it counts, the keys, and the terminal afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.kernel.knocker import doors
from tests.kernel.site import Site, site
from tests.kernel.terminal import ALTERNATE, HIDDEN, ORDINARY, SHOWN, Terminal, terminal

KNOCK = (
    'echo 0 > "$0"; while :; do for p in "$@"; do (exec 3<>/dev/tcp/127.0.0.1/$p) 2>/dev/null; done; sleep 0.02; done'
)


@pytest.fixture(scope="module", name="here")
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("top")) as made:
        made.ok("load")
        yield made


@pytest.fixture(scope="module", name="busy")
def _busy(here: Site) -> Iterator[tuple[str, str]]:
    """Two cgroups under a policy each, at work: one connects to an open door, the other to a shut one."""
    with doors() as listening, ExitStack() as stack:
        found = []
        for name, port in (("sends", listening.ports[1]), ("knocks", listening.ports[0])):
            cgroup = stack.enter_context(here.cgroup())
            here.ok("attach", cgroup, "-p", here.policy(name, listening.ports[1]))
            stack.enter_context(running(cgroup, port))
            found.append(f"/{cgroup.name}")
        yield found[0], found[1]


@contextmanager
def running(cgroup: Path, port: int) -> Iterator[None]:
    process = subprocess.Popen(["bash", "-c", KNOCK, str(cgroup / "cgroup.procs"), str(port)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_once_for_machines(here: Site, busy: tuple[str, str]) -> None:
    data = json.loads(here.ok("top", "--once", "--json", "--interval", "1s", "--sort", "refused"))
    knocks, sends = (row for row in data["rows"] if row["name"] in busy)
    assert (sends["name"], knocks["name"]) == busy
    assert data["seconds"] >= 1
    assert sends["loopback"] > 0 and sends["refused"] == 0 and sends["public"] == 0
    assert knocks["loopback"] == 0 and knocks["refused"] > 0
    (rule,) = knocks["rules"]
    assert (rule["rule"], rule["policy"], rule["hook"], rule["per_second"]) == (
        "default",
        "knocks",
        "connect",
        knocks["refused"],
    )
    assert (knocks["policy"], knocks["mode"], knocks["hooks"]) == ("knocks", "enforce", True)


def test_a_rate_is_what_is_counted_in_between(here: Site, busy: tuple[str, str]) -> None:
    """Against the counters before and after, which enclose both of its readings."""

    def total() -> int:
        (row,) = [row for row in here.status()["cgroups"] if row["cgroup"] == busy[0]]
        return int(row["bytes"]["loopback"])

    before = total()
    data = json.loads(here.ok("top", "--once", "--json", "--interval", "1s"))
    between = total() - before
    (row,) = [row for row in data["rows"] if row["name"] == busy[0]]
    assert 0 < row["loopback"] * data["seconds"] <= between


def test_once_for_people(here: Site, busy: tuple[str, str]) -> None:
    lines = here.ok("top", "--once", "--interval", "2s", "--sort", "loopback").splitlines()
    assert "LOOPBACK/S ▼" in lines[0]
    assert lines[1].startswith(busy[0])
    (knocks,) = [line for line in lines if line.startswith(busy[1])]
    assert re.search(r"default \d+\.\d .* knocks +enforce +hooks, seccomp 0/\d", knocks)


def test_a_table_that_moves_needs_a_terminal(here: Site) -> None:
    done = here.weir("top")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--once" in done.stderr


def first(screen: Terminal, busy: tuple[str, str]) -> str:
    """Which of the two is above the other on the screen."""
    return next((line.split()[0] for line in screen.frame() if line.startswith(busy)), "")


def clean(screen: Terminal, status: int) -> None:
    """After the end: the exit status, and a terminal that is as it was."""
    screen.until(lambda: re.search(r"after=[0-9a-f:]+\.", screen.text))
    before, after = (re.search(rf"{word}=([0-9a-f:]+)", screen.text) for word in ("before", "after"))
    assert before and after and before[1] == after[1]
    assert f"status={status}\r" in screen.text
    assert screen.text.rindex(ORDINARY) > screen.text.rindex(ALTERNATE)
    assert screen.text.rindex(SHOWN) > screen.text.rindex(HIDDEN)
    assert "Traceback" not in screen.text


def test_keys_sort_filter_and_quit(here: Site, busy: tuple[str, str]) -> None:
    sends, knocks = busy
    with terminal(here.command("top", "--interval", "0.2s"), here.environment) as screen:
        screen.until(lambda: any("PUBLIC/S ▼" in line for line in screen.frame()))
        screen.type("r")
        screen.until(lambda: "REFUSED/S ▼" in "".join(screen.frame()) and first(screen, busy) == knocks)
        screen.type("l")
        screen.until(lambda: "LOOPBACK/S ▼" in "".join(screen.frame()) and first(screen, busy) == sends)
        screen.type("n")
        screen.until(lambda: "NAME ▼" in "".join(screen.frame()) and first(screen, busy) == min(busy))
        screen.type("/" + knocks[-6:] + "\r")
        screen.until(lambda: "1 in all" in "".join(screen.frame()) and first(screen, busy) == knocks)
        screen.type("\x1b")
        screen.until(lambda: "1 in all" not in "".join(screen.frame()) and first(screen, busy) == min(busy))
        assert "status=" not in screen.text
        screen.type("q")
        clean(screen, 0)


@pytest.mark.parametrize(("how", "status"), [("\x03", 130), ("\x04", 0), ("TERM", 143)])
def test_every_way_out_leaves_the_terminal_clean(here: Site, how: str, status: int) -> None:
    with terminal(here.command("top", "--interval", "60s"), here.environment) as screen:
        screen.until(screen.frame)
        if how == "TERM":
            (pid,) = screen.pids()
            os.kill(pid, signal.SIGTERM)
        else:
            screen.type(how)
        clean(screen, status)


def test_ctrl_z_does_not_leave_it_stopped(here: Site) -> None:
    """A stopped program would leave the shell with this one's screen; keys typed afterwards still count."""
    with terminal(here.command("top", "--interval", "60s"), here.environment) as screen:
        screen.until(screen.frame)
        screen.type("\x1an")
        screen.until(lambda: "NAME ▼" in "".join(screen.frame()))
        screen.type("q")
        clean(screen, 0)


def test_it_goes_on_when_everything_is_unloaded(tmp_path: Path) -> None:
    with site(tmp_path) as made:
        made.ok("load")
        with terminal(made.command("top", "--interval", "0.2s"), made.environment) as screen:
            screen.until(lambda: "NAME" in "".join(screen.frame()))
            made.ok("unload")
            screen.until(lambda: "weir is not loaded" in "".join(screen.frame()))
            made.ok("load")
            screen.until(lambda: "NAME" in "".join(screen.frame()))
            screen.type("q")
            clean(screen, 0)
