"""`weir run` as a stranger types it: exit status, signals, the terminal, streams, users, the summary."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import need
from tests.kernel.knocker import doors, forbidden_command
from tests.kernel.site import TIMEOUT, Site, one_line, site


@pytest.fixture(scope="module", name="here")
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One site for all: the commands leave it as they found it, and test_nothing_is_left checks that."""
    with site(tmp_path_factory.mktemp("cli")) as made:
        made.ok("load")
        yield made


def summary(text: str) -> dict[str, Any]:
    """The summary that `weir run --json` writes: the last line of standard error."""
    answer: dict[str, Any] = json.loads(text.splitlines()[-1])
    return answer


def run(here: Site, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`weir run` of a command, audited and without a word of its own."""
    return here.weir("run", "--quiet", "--policy", "audit", "--", *command, **options)


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 23", 23), ("kill -TERM $$", 143), ("kill -KILL $$", 137), ("kill -SEGV $$", 139)],
)
def test_exit_status(here: Site, script: str, status: int) -> None:
    done = run(here, "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_command_that_is_not_there(here: Site, tmp_path: Path) -> None:
    assert run(here, "no-such-command-of-weir").returncode == 127
    (tmp_path / "file").write_text("")
    assert run(here, str(tmp_path / "file")).returncode == 126


def test_streams_are_the_commands_own(here: Site) -> None:
    """Every byte in, every byte out, nothing added; the exit status is that of the command."""
    data = bytes(range(256)) * 4096
    command = here.command("run", "--quiet", "-p", "audit", "--", "sh", "-c", "cat; printf complaint >&2; exit 7")
    done = subprocess.run(command, input=data, capture_output=True, env=here.environment, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, data, b"complaint")


def test_options_after_the_command_are_the_commands(here: Site) -> None:
    done = here.weir("run", "-q", "-p", "audit", "echo", "--json", "--help", "-p", "x")
    assert (done.returncode, done.stdout) == (0, "--json --help -p x\n")


def test_a_closed_pipe_ends_the_command(here: Site) -> None:
    """As in `weir run -- yes | head -1`: SIGPIPE has its default meaning in the command."""
    command = here.start("run", "-q", "-p", "audit", "--", "yes", stdout=subprocess.PIPE)
    assert command.stdout
    assert command.stdout.readline() == "y\n"
    command.stdout.close()
    assert command.wait(TIMEOUT) == 128 + signal.SIGPIPE


def test_summary_for_people(here: Site) -> None:
    with doors() as listening:
        policy = here.policy("strict", listening.ports[1])
        done = here.weir("run", "-p", policy, "--", *forbidden_command(listening.ports[0], Path("/dev/full")))
    assert done.stdout == ""
    assert "weir: policy strict (enforce)" in done.stderr
    assert "refused  1 × rule default" in done.stderr


def test_summary_for_machines(here: Site) -> None:
    with doors() as listening:
        policy = here.policy("strict", listening.ports[1])
        code = f"exec 3<>/dev/tcp/127.0.0.1/{listening.ports[1]}; ! exec 4<>/dev/tcp/127.0.0.1/{listening.ports[0]}"
        done = here.weir("run", "--json", "-p", policy, "--", "bash", "-c", f"({code}) 2>/dev/null; exit 5")
    data = summary(done.stderr)
    assert (done.returncode, data["status"], data["policy"], data["mode"]) == (5, 5, "strict", "enforce")
    (refused,) = data["refused"]
    assert (refused["hook"], refused["reason"], refused["rule"], refused["count"]) == ("connect", "rule", "default", 1)
    assert data["egress"]["loopback"]["bytes"] > 0
    assert data["egress"]["public"] == data["egress"]["private"] == {"bytes": 0, "packets": 0}
    assert data["seccomp"] is True


def test_user(here: Site) -> None:
    done = here.weir(
        "run", "-q", "-p", "appengine", "--user", "nobody", "--", "sh", "-c", "id -un; grep CapEff /proc/self/status"
    )
    assert done.stdout == "nobody\nCapEff:\t0000000000000000\n"
    assert "no user" in one_line(here.weir("run", "--user", "no-such-user-of-weir", "--", "true"))["message"].lower()


def test_what_the_command_leaves_running_is_killed(here: Site) -> None:
    """Also what has left its session and ignores SIGTERM; the summary says how many."""
    script = "import os, signal, time\nfor n in range(3):\n    if os.fork() == 0:\n        os.setsid(); "
    script += "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.closerange(0, 3); time.sleep(1000)"
    began = time.monotonic()
    done = here.weir("run", "--json", "-p", "audit", "--", sys.executable, "-c", script)
    assert summary(done.stderr)["killed"] == 3
    assert time.monotonic() - began < 500
    assert here.rest() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_are_passed_on(here: Site, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo caught; exit 9' {name}; echo ready; while :; do sleep 0.05; done"
    command = here.start("run", "-q", "-p", "audit", "--", "sh", "-c", script, stdout=subprocess.PIPE)
    assert command.stdout
    assert command.stdout.readline() == "ready\n"
    command.send_signal(number)
    assert command.communicate(timeout=TIMEOUT)[0] == "caught\n"
    assert command.returncode == 9
    assert here.rest() == []


def test_a_signal_that_the_command_does_not_catch(here: Site) -> None:
    command = here.start(
        "run", "-q", "-p", "audit", "--", "sh", "-c", "echo ready; exec sleep 1000", stdout=subprocess.PIPE
    )
    assert command.stdout
    assert command.stdout.readline() == "ready\n"
    command.terminate()
    assert command.wait(TIMEOUT) == 128 + signal.SIGTERM
    command.stdout.close()
    assert here.rest() == []


@pytest.mark.parametrize(
    ("key", "status"), [(b"\x03", 128 + signal.SIGINT), (b"\x1c", 128 + signal.SIGQUIT)], ids=["c", "\\"]
)
def test_keys_of_the_terminal(here: Site, key: bytes, status: int) -> None:
    """Ctrl-C and Ctrl-\\ end the command, and weir tidies up and reports it."""
    ready = "import resource, time; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); print('ready', flush=True); time.sleep(1000)"
    script = f"import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); {ready}"
    command = here.command("run", "-q", "-p", "audit", "--", sys.executable, "-c", script)
    ended, output = at_a_terminal(here, command, key)
    assert os.waitstatus_to_exitcode(ended) == status, output
    assert here.rest() == []


def test_a_command_that_survives_ctrl_c(here: Site) -> None:
    """weir does not end before its command does."""
    script = "trap 'echo still here; exit 4' INT; echo ready; while :; do sleep 0.05; done"
    ended, output = at_a_terminal(here, here.command("run", "-q", "-p", "audit", "--", "sh", "-c", script), b"\x03")
    assert os.waitstatus_to_exitcode(ended) == 4
    assert b"still here" in output


def at_a_terminal(here: Site, command: list[str], key: bytes) -> tuple[int, bytes]:
    """Run a command at a terminal of its own, press a key once it has printed `ready`; its wait status and output."""
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.execve(command[0], command, here.environment)
        finally:
            os._exit(126)
    output = b""
    try:
        pressed = False
        while select.select([terminal], [], [], TIMEOUT)[0]:
            try:
                output += os.read(terminal, 4096)
            except OSError:  # EIO: everyone has closed the terminal
                break
            if b"ready" in output and not pressed:
                os.write(terminal, key)
                pressed = True
        return os.waitpid(pid, 0)[1], output
    finally:
        os.close(terminal)


def test_two_runs_at_once(here: Site) -> None:
    """Each has its own cgroup, policy and counters."""
    with doors() as listening:
        shut, first, second = listening.ports
        script = f"echo ready; read x; for p in {shut} {first} {second}; do (exec 3<>/dev/tcp/127.0.0.1/$p) 2>/dev/null"
        script += " && echo $p; done; true"
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        runs = []
        for name, port in (("one", first), ("two", second)):
            runs.append(
                here.start("run", "--json", "-p", here.policy(name, port), "--", "bash", "-c", script, **options)
            )
            assert runs[-1].stdout
            assert runs[-1].stdout.readline() == "ready\n"
        rows = {row["policy"]: row for row in here.status()["cgroups"] if row["policy"]}
        assert rows.keys() == {"one", "two"}
        assert all(row["layers"]["seccomp"] == "1/1" and row["layers"]["hooks"] for row in rows.values())
        for process, port in zip(runs, (first, second), strict=True):
            output, errors = process.communicate("go\n", timeout=TIMEOUT)
            assert output == f"{port}\n"
            assert sum(row["count"] for row in summary(errors)["refused"]) == 2
    assert here.rest() == []


def test_started_by_one_who_ignores_sigchld(here: Site) -> None:
    """Some supervisors do; then the kernel reaps children unasked, and their exit status is lost."""

    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    done = run(here, "sh", "-c", "exit 3", preexec_fn=ignore)
    assert (done.returncode, done.stderr) == (3, "")


def test_started_with_closed_streams(here: Site) -> None:
    def close() -> None:
        os.closerange(0, 3)

    options: dict[str, Any] = {"capture_output": False, "preexec_fn": close}
    assert run(here, "sh", "-c", "exit 3", **options).returncode == 3


def test_run_needs_no_seccomp_to_be_stopped_by_the_hooks(here: Site) -> None:
    """And with it, listen() is refused: both layers are in force in `weir run`."""
    code = "import socket; s = socket.socket(); s.listen()"
    done = here.weir("run", "-q", "-p", "appengine", "--", sys.executable, "-c", code)
    assert done.returncode == 1
    assert "PermissionError: [Errno 13]" in done.stderr


def test_nothing_is_left(here: Site) -> None:
    """After all of the above."""
    need.root()
    assert here.rest() == []
    rows = here.status()["cgroups"]
    assert [row["cgroup"] for row in rows] == [f"/{here.place.slice.name}"]
