"""What a started program is given and what not: descriptors, user, signals, environment, and how a start fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent.errors import WeirError
from agent.processes import spawn
from agent.seccomp.child import Start, StartError
from tests import need
from tests.kernel.site import TIMEOUT

INTERNAL = 3 << 31
"""Signals 32 and 33, glibc's own: what posix_spawn has made, as make does, ignores them (sysdeps/unix/sysv/linux/spawni.c)."""

_ROOT = Path(__file__).resolve().parents[2]


def start(*argv: str | Path, **others: Any) -> subprocess.CompletedProcess[str]:
    """Start a program under the App Engine policy. Of the keywords ``options`` are those of seccomp_start.py, ``prefix`` is a command
    that runs weir, and the others are subprocess.run's.
    """
    options = json.dumps(others.pop("options", {}))
    prefix = others.pop("prefix", [])
    settings = {"capture_output": True, **others}
    return subprocess.run(
        [*prefix, sys.executable, "-m", "tests.kernel.seccomp_start", options, *argv],
        text=True,
        cwd=_ROOT,
        timeout=TIMEOUT,
        check=False,
        **settings,
    )


def status(*fields: str, **others: Any) -> list[str]:
    """Return fields of /proc/self/status as the started program reads them."""
    done = start("cat", "/proc/self/status", **others)
    values = dict(line.split(":", 1) for line in done.stdout.splitlines())
    return [values[field].strip() for field in fields]


def signals(*fields: str, **others: Any) -> list[int]:
    """Return sets of signals from /proc/self/status as the started program reads them, without glibc's own."""
    return [int(field, 16) & ~INTERNAL for field in status(*fields, **others)]


@pytest.fixture
def inet_socket() -> Iterator[socket.socket]:
    """A socket that belongs to this test's cgroup."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        yield made


def test_filter_and_no_new_privs() -> None:
    assert status("NoNewPrivs", "Seccomp") == ["1", "2"]
    assert status("NoNewPrivs", "Seccomp", options={"audit": True}) == ["0", "0"]


def test_inherited_descriptors_are_closed(inet_socket: socket.socket) -> None:
    code = "import os; print(len([fd for fd in range(3, 100) if os.path.exists(f'/proc/self/fd/{fd}')]))"
    given = {"pass_fds": [inet_socket.fileno()]}
    assert start(sys.executable, "-c", code, **given).stdout == "0\n"
    assert start(sys.executable, "-c", code, options={"inherit_fds": True}, **given).stdout == "1\n"


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_network_socket_as_standard_stream_is_refused(inet_socket: socket.socket, stream: str) -> None:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: inet_socket}
    name = {"stdin": "input", "stdout": "output", "stderr": "error"}[stream]
    done = start("true", capture_output=False, **streams)
    # 120: Python's own, where it buffers its standard error and cannot write it out at its end.
    assert done.returncode == 1 or (stream == "stderr" and done.returncode == 120)
    assert stream == "stderr" or f"standard {name} would be a network socket" in done.stderr
    assert start("true", options={"inherit_fds": True}, capture_output=False, **streams).returncode == 0


def test_a_unix_socket_as_standard_input_is_not() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"hello")
        ours.shutdown(socket.SHUT_WR)
        assert start("cat", stdin=theirs).stdout == "hello"


def test_a_closed_standard_input_stays_closed() -> None:
    done = start("sh", "-c", "[ ! -e /proc/self/fd/0 ]", preexec_fn=lambda: os.close(0))
    assert (done.returncode, done.stderr) == (0, "")


def test_user() -> None:
    need.root()
    fields = status(
        "Uid", "Gid", "Groups", "CapEff", "CapPrm", "NoNewPrivs", "Seccomp", options={"user": "65534:65533"}
    )
    uid, gid = "\t".join(["65534"] * 4), "\t".join(["65533"] * 4)
    assert fields == [uid, gid, "65533", "0" * 16, "0" * 16, "1", "2"]


def test_user_by_name_has_its_groups() -> None:
    need.root()
    assert start("id", "-un", options={"user": "nobody"}).stdout == "nobody\n"
    assert (
        start("id", "-G", options={"user": "daemon:adm"}).stdout
        == start("id", "-g", options={"user": "daemon:adm"}).stdout
    )


def test_user_unknown() -> None:
    done = start("true", options={"user": "nobody-of-that-name"})
    assert done.returncode == 1
    assert done.stderr == "There is no user nobody-of-that-name.\n  Name a user of /etc/passwd, or write UID:GID.\n"


def test_user_needs_privilege() -> None:
    need.root()
    done = start("true", options={"user": "nobody"}, prefix=[need.command("setpriv"), "--bounding-set=-all"])
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "weir may not become user nobody.")


def test_user_must_not_come_back() -> None:
    need.root()
    done = start("true", options={"user": "nobody"}, prefix=[need.command("setpriv"), "--securebits=+no_setuid_fixup"])
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "The program could return from user nobody to root.")


def test_signals_are_as_weir_was_given_them() -> None:
    """Python ignores SIGPIPE and SIGXFSZ for itself; what the caller ignores (nohup) stays ignored."""

    def terminal() -> None:
        """A shell ignores SIGINT and SIGQUIT for what it starts in the background, nohup SIGHUP."""
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)

    assert signals("SigIgn", "SigBlk", "SigCgt", preexec_fn=terminal) == [0] * 3

    def nohup() -> None:
        terminal()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

    hangup, user1 = 1 << (signal.SIGHUP - 1), 1 << (signal.SIGUSR1 - 1)
    assert signals("SigIgn", "SigBlk", preexec_fn=nohup) == [hangup, user1]


def test_environment_and_exit_status_pass_through() -> None:
    environment = {"PATH": os.environ["PATH"], "WEIR_TEST": "a b"}
    assert "WEIR_TEST=a b\n" in start("env", env={**os.environ, **environment}).stdout
    assert start("sh", "-c", "exit 23").returncode == 23
    assert start("sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM


def test_command_not_found() -> None:
    done = start("no-such-command-of-weir")
    assert (done.returncode, done.stderr) == (
        127,
        "no-such-command-of-weir: command not found.\n  Check the spelling and PATH.\n",
    )


def test_command_not_executable(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("no program\n")
    assert start(program).returncode == 126
    program.chmod(0o755)
    done = start(program)
    assert (done.returncode, done.stderr.splitlines()[0]) == (126, f"{program} cannot be executed: Exec format error.")


def test_interpreter_not_found(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    done = start(program)
    assert done.returncode == 127
    assert "the interpreter or loader that it names is not" in done.stderr


def test_a_cgroup_that_cannot_be_joined_stops_the_start() -> None:
    def refuse() -> None:
        raise WeirError("The cgroup has vanished.", "Start again.")

    with pytest.raises(StartError, match="The cgroup has vanished") as caught:
        spawn(Start(argv=("true",), user=None, inherit_fds=True, rules=()), refuse)
    assert (caught.value.hint, caught.value.status) == ("Start again.", 1)
    with suppress(ChildProcessError):  # a World of other tests may be a child of this process, alive
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)


def test_a_bug_in_the_child_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    pid = spawn(Start(argv=("true",), user=None, inherit_fds=True, rules=()), lambda: print(1 // 0))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_the_parent_keeps_its_own_signal_mask() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        pid = spawn(Start(argv=("true",), user=None, inherit_fds=True, rules=()), lambda: None)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | {signal.SIGUSR2}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
