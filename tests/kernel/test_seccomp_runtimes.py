"""Common runtimes start, resolve a name over DNS, connect and start children under the filter, unmodified.

They run in a network namespace of their own with a resolver and a web server on its loopback (seccomp_names.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import need
from tests.kernel.seccomp_names import ADDRESS
from tests.kernel.site import TIMEOUT

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAMS = Path(__file__).parent / "programs"
NAME = "www.weir.test"  # .test is nobody's (RFC 6761)
WORKS = f"resolved {ADDRESS}\nconnected HTTP/1.0 200\nchild\n"

# The new mount namespace hides the machine's resolver from those inside, nothing from those outside.
_SETUP = """
ip link set lo up
mount --bind "$1" /etc/resolv.conf
mount --bind "$2" /etc/nsswitch.conf
exec "$3" -m tests.kernel.seccomp_names
"""


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The process id of the resolver, whose network and mount namespaces the tests enter."""
    need.root()
    for command in ("ip", "nsenter", "unshare"):
        need.command(command)
    files = tmp_path_factory.mktemp("names")
    (files / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (files / "nsswitch.conf").write_text("hosts: files dns\n")
    setup = ["sh", "-ec", _SETUP, "sh", str(files / "resolv.conf"), str(files / "nsswitch.conf"), sys.executable]
    with subprocess.Popen(
        ["unshare", "--net", "--mount", *setup], stdout=subprocess.PIPE, text=True, cwd=_ROOT
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield server.pid
        finally:
            server.kill()


def run(names: int, *argv: str | Path, bind: str = "deny", **environment: str) -> str:
    """Return what the program prints when it runs in the namespaces under the filter."""
    done = subprocess.run(
        [
            *("nsenter", f"--net=/proc/{names}/ns/net", f"--mount=/proc/{names}/ns/mnt", f"--wd={_ROOT}"),
            *(sys.executable, "-m", "tests.kernel.seccomp_start", json.dumps({"bind": bind}), *map(str, argv)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        timeout=TIMEOUT,
        check=False,
    )
    return done.stdout


def compiled(tmp_path: Path, *command: str) -> Path:
    """Run a compiler that takes -o TARGET; return the target."""
    target = tmp_path / "program"
    subprocess.run([*command, "-o", target], check=True, cwd=_PROGRAMS, timeout=TIMEOUT)
    return target


def test_glibc(names: int, tmp_path: Path) -> None:
    program = compiled(tmp_path, need.command("gcc"), "resolve.c")
    assert run(names, program, NAME) == WORKS


def test_musl_needs_bind_ephemeral(names: int, tmp_path: Path) -> None:
    """musl's resolver binds its UDP socket to port 0 (src/network/res_msend.c), which `bind: deny` refuses in every layer."""
    program = compiled(tmp_path, need.command("musl-gcc"), "-static", "resolve.c")
    assert run(names, program, NAME, bind="ephemeral") == WORKS
    assert run(names, program, NAME) == "getaddrinfo: System error\n"


@pytest.mark.parametrize("cgo", ["0", "1"])
def test_go(names: int, tmp_path: Path, cgo: str) -> None:
    go = need.command("go")
    if cgo == "1":
        need.command("gcc")
    # Off: the program has no dependencies, and a build must not look for any.
    settings = {"CGO_ENABLED": cgo, "GO111MODULE": "off", "GOTOOLCHAIN": "local", "GOPROXY": "off"}
    target = tmp_path / "program"
    subprocess.run(
        [go, "build", "-o", target, "resolve.go"],
        check=True,
        cwd=_PROGRAMS,
        env={**os.environ, **settings},
        timeout=TIMEOUT,
    )
    resolver = "netdns=cgo" if cgo == "1" else "netdns=go"
    assert run(names, target, NAME, GODEBUG=resolver) == WORKS


def test_java(names: int, tmp_path: Path) -> None:
    java, javac = need.command("java"), need.command("javac")
    subprocess.run([javac, "-d", tmp_path, "Resolve.java"], check=True, cwd=_PROGRAMS, timeout=TIMEOUT)
    assert run(names, java, "-cp", tmp_path, "Resolve", NAME) == WORKS


@pytest.mark.parametrize("io_uring", ["0", "1"])
def test_node(names: int, io_uring: str) -> None:
    """With io_uring asked for, libuv must take its thread pool when the ring is refused."""
    node = need.command("node")
    assert run(names, node, _PROGRAMS / "resolve.js", NAME, UV_USE_IO_URING=io_uring) == WORKS


def test_php(names: int) -> None:
    php = need.command("php")
    assert run(names, php, _PROGRAMS / "resolve.php", NAME) == WORKS


def test_python(names: int) -> None:
    assert run(names, sys.executable, _PROGRAMS / "resolve.py", NAME) == WORKS
