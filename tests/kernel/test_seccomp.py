"""The filter on real processes: each vector of the list of ways round that the filter must stop, under its number there.

A rule's errno is marked (seccomp_start.py), so that an answer says whether the filter or the kernel gave it: a kernel without SCTP
would refuse SCTP too.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from errno import EACCES, EAFNOSUPPORT, EBADF, EINVAL, ENOSYS, EPROTONOSUPPORT
from pathlib import Path
from typing import Any

import pytest

from agent.policy.model import Family
from tests import need
from tests.kernel.seccomp_start import sockets
from tests.kernel.site import TIMEOUT
from tests.seccomp_expected import expected

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = Path(__file__).parent / "c"
MARK = 1000  # the largest errno the kernel names is 133 (asm-generic/errno.h), the largest it passes on 4095
KILLED = 128 + signal.SIGSYS

INET, INET6, UNIX, NETLINK, PACKET = 2, 10, 1, 16, 17
STREAM, DGRAM, RAW, SEQPACKET, SOCK_PACKET = 1, 2, 3, 5, 10
CLOEXEC_NONBLOCK = 0o2004000  # asm-generic/fcntl.h
TCP, UDP, DCCP, L2TP, SCTP, UDPLITE, SMC, MPTCP = 6, 17, 33, 115, 132, 136, 256, 262
HIGH = 1 << 32

Call = tuple[str | int, ...]


def build(source: str, target: Path, *options: str) -> Path:
    """Compile one of the C programs; skip without a compiler."""
    compiler = need.command("gcc")
    subprocess.run([compiler, "-O1", *options, "-o", target, _SOURCES / source], check=True, timeout=TIMEOUT)
    return target


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that makes system calls by the line."""
    return build("seccomp_calls.c", tmp_path_factory.mktemp("seccomp") / "calls")


def start(options: dict[str, Any], *argv: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program under the App Engine policy with the options of seccomp_start.py."""
    return subprocess.run(
        [sys.executable, "-m", "tests.kernel.seccomp_start", json.dumps(options), *argv],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        timeout=TIMEOUT,
        check=False,
    )


def lines(calls: Sequence[Call]) -> str:
    """Return the input for seccomp_calls.c; a call without a mode is native."""
    return "".join(" ".join(map(str, c if c[0] in ("int80", "x32") else ("native", *c))) + "\nreset\n" for c in calls)


def answers(caller: Path, *calls: Call, **options: Any) -> list[int]:
    """Return what each system call answers under the filter: 0, the kernel's errno, or MARK and the filter's errno."""
    done = start({"mark": MARK, **options}, caller, stdin=lines(calls))
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def refused(caller: Path, errno: int, *calls: Call) -> None:
    """Assert that the filter refuses each of the calls with this errno."""
    assert answers(caller, *calls) == [MARK + errno] * len(calls)


def test_B7_udplite(caller: Path) -> None:
    refused(caller, EPROTONOSUPPORT, ("socket", INET, DGRAM, UDPLITE), ("socket", INET6, DGRAM, UDPLITE))


def test_B8_ping(caller: Path) -> None:
    refused(caller, EPROTONOSUPPORT, ("socket", INET, DGRAM, 1), ("socket", INET6, DGRAM, 58))


def test_B9_raw(caller: Path) -> None:
    kinds = [("socket", family, RAW, protocol) for family in (INET, INET6) for protocol in (0, 1, TCP, UDP, 255)]
    refused(caller, EPROTONOSUPPORT, *kinds)


def test_B10_B11_mptcp(caller: Path) -> None:
    refused(caller, EPROTONOSUPPORT, ("socket", INET, STREAM, MPTCP), ("socket", INET6, STREAM, MPTCP))


def test_B12_smc(caller: Path) -> None:
    refused(caller, EAFNOSUPPORT, ("socket", 43, STREAM, 0))
    refused(caller, EPROTONOSUPPORT, ("socket", INET, STREAM, SMC), ("socket", INET6, STREAM, SMC))


def test_B13_sctp_dccp(caller: Path) -> None:
    dccp_type = 6  # SOCK_DCCP, linux/net.h
    kinds = [("socket", f, t, SCTP) for f in (INET, INET6) for t in (STREAM, SEQPACKET)]
    refused(caller, EPROTONOSUPPORT, *kinds, ("socket", INET, dccp_type, DCCP), ("socket", INET6, dccp_type, 0))


def test_B14_l2tp(caller: Path) -> None:
    refused(caller, EPROTONOSUPPORT, ("socket", INET, DGRAM, L2TP), ("socket", INET6, DGRAM, L2TP))


def test_B15_packet_both_spellings(caller: Path) -> None:
    everything = 0x0300  # htons(ETH_P_ALL)
    refused(caller, EAFNOSUPPORT, ("socket", PACKET, RAW, everything), ("socket", PACKET, DGRAM, everything))
    refused(caller, EPROTONOSUPPORT, ("socket", INET, SOCK_PACKET, everything), ("socket", INET6, SOCK_PACKET, 0))


def test_B16_B17_one_socket_per_family(caller: Path) -> None:
    """Netlink, vsock, XDP, RDS, RxRPC, TIPC and whatever comes after them."""
    kept = {UNIX, INET, INET6}
    foreign = [family for family in [*range(64), 255, 1 << 31, 2**32 - 1] if family not in kept]
    refused(caller, EAFNOSUPPORT, *(("socket", family, t, 0) for family in foreign for t in (STREAM, DGRAM, RAW)))


def test_B19_socketpair(caller: Path) -> None:
    foreign = [family for family in range(64) if family != UNIX]
    refused(caller, EAFNOSUPPORT, *(("socketpair", family, STREAM, 0) for family in foreign))


def test_C1_C3_listen_and_bind(caller: Path) -> None:
    """Whether bound, connected or neither: the filter never sees the socket."""
    refused(caller, EACCES, ("listen", 3, 16), ("listen", HIGH | 3, 0), ("bind", 3, 0, 16), ("bind", 3, 0, 110))
    refused(caller, EINVAL, ("accept", 3, 0, 0), ("accept4", 3, 0, 0, 0))
    code = "import socket; socket.socket().listen()"
    assert "PermissionError: [Errno 13]" in start({}, sys.executable, "-c", code).stderr


def test_D1_pidfd_getfd(caller: Path) -> None:
    refused(caller, EACCES, ("pidfd_getfd", 3, 0, 0))


def test_D14_request_key(caller: Path) -> None:
    refused(caller, ENOSYS, ("request_key", 0, 0, 0, 0), ("add_key", 0, 0, 0, 0, 0), ("keyctl", 0, 0, 0))


def test_D16_ptrace(caller: Path) -> None:
    traceme, attach, seize = 0, 16, 0x4206  # linux/ptrace.h
    refused(caller, EACCES, *(("ptrace", request, 1, 0, 0) for request in (traceme, attach, seize)))


def is_killed(caller: Path, *call: str | int) -> None:
    """Assert that the call ends the program with SIGSYS, and that without the filter it returns."""
    if platform.machine() != "x86_64":
        need.skip("needs x86_64: only it has int 0x80 and the x32 bit")
    assert start({"audit": True}, caller, stdin=lines([call])).returncode == 0
    done = start({}, caller, stdin=lines([("getppid",), call]))
    assert (done.returncode, done.stdout) == (KILLED, "0\n")


def test_E1_compat_setsockopt_int80(caller: Path) -> None:
    is_killed(caller, "int80", 366, 0, 1, 9, 0, 0)  # setsockopt, asm/unistd_32.h
    is_killed(caller, "int80", 102, 14, 0)  # socketcall(SYS_SETSOCKOPT)


def test_E2_ia32_socket_int80(caller: Path) -> None:
    is_killed(caller, "int80", 359, NETLINK, RAW, 0)


def test_E2_ia32_program_socketcall(tmp_path: Path) -> None:
    if platform.machine() != "x86_64":
        need.skip("needs x86_64: only it runs ia32 programs")
    freestanding = ["-m32", "-static", "-no-pie", "-nostdlib", "-ffreestanding", "-fno-stack-protector"]
    program = build("seccomp_ia32.c", tmp_path / "ia32", *freestanding)
    bare = start({"audit": True}, program)
    if bare.returncode == 126:
        need.skip("needs a kernel that runs ia32 programs (CONFIG_IA32_EMULATION)")
    assert bare.returncode == 0
    assert start({}, program).returncode == KILLED


def test_E3_x32(caller: Path) -> None:
    is_killed(caller, "x32", "socket", INET, STREAM, 0)
    is_killed(caller, "x32", "getppid")


def test_E4_high_bits_of_int_args(caller: Path) -> None:
    """The kernel reads ints: what lies above them hides nothing, and breaks nothing."""
    refused(caller, EAFNOSUPPORT, ("socket", HIGH | NETLINK, RAW, 0), ("socketpair", HIGH | INET, STREAM, 0))
    refused(caller, EPROTONOSUPPORT, ("socket", HIGH | INET, DGRAM, UDPLITE), ("socket", INET, HIGH | RAW, 1))
    refused(caller, EPROTONOSUPPORT, ("socket", INET, STREAM, HIGH | MPTCP), ("socket", INET6, DGRAM, HIGH | 58))
    assert answers(caller, ("socket", HIGH | INET, HIGH | STREAM, HIGH | TCP)) == [0]


def test_E5_type_flags(caller: Path) -> None:
    refused(caller, EPROTONOSUPPORT, ("socket", INET, RAW | CLOEXEC_NONBLOCK, UDP))
    refused(caller, EPROTONOSUPPORT, ("socket", INET, STREAM | CLOEXEC_NONBLOCK, MPTCP))
    assert answers(caller, ("socket", INET, STREAM | CLOEXEC_NONBLOCK, TCP)) == [0]


def test_E6_io_uring(caller: Path) -> None:
    calls = [("io_uring_setup", 8, 0), ("io_uring_enter", 3, 1, 0, 0, 0, 0), ("io_uring_register", 3, 0, 0, 0)]
    refused(caller, ENOSYS, *calls)


PROTOCOLS = [0, 1, 2, TCP, 7, UDP, 18, DCCP, 41, 47, 50, 58, L2TP, SCTP, UDPLITE, 255, SMC, MPTCP, 2**31, HIGH | 6]


@pytest.mark.parametrize("families", [["inet"], ["inet", "inet6", "unix"], ["inet6", "unix", "netlink"], []])
@pytest.mark.parametrize("protocols", [["tcp"], ["udp"], ["tcp", "udp"]])
def test_socket_agrees_with_the_policy(caller: Path, families: list[str], protocols: list[str]) -> None:
    """Every family to 47 with every type: refused when and as the policy says, in the hands of the kernel when not."""
    calls = [
        (family, type_, protocol)
        for family in [*range(48), 1 << 31, HIGH | INET, HIGH | NETLINK]
        for type_ in [*range(11), STREAM | CLOEXEC_NONBLOCK, HIGH | DGRAM]
        for protocol in PROTOCOLS
    ]
    # A family that is not the policy's is refused whatever the rest says, so its types and protocols are taken one by one.
    kept = [INET, INET6, UNIX, NETLINK]
    calls = [c for c in calls if c[0] & 0xFFFFFFFF in kept or c[1] == STREAM or c[2] == 0]
    got = answers(caller, *(("socket", *call) for call in calls), families=families, protocols=protocols)
    policy = sockets({"families": families, "protocols": protocols})
    wrong = []
    for call, answer in zip(calls, got, strict=True):
        errno = expected(policy, *call)
        if (answer != MARK + errno) if errno else (answer >= MARK):
            wrong.append((call, answer))
    assert wrong == []


def test_tcp_udp_and_unix_sockets_work(caller: Path) -> None:
    inet = [("socket", f, t, p) for f in (INET, INET6) for t, own in ((STREAM, TCP), (DGRAM, UDP)) for p in (0, own)]
    unix = [("socket", UNIX, t, 0) for t in (STREAM, DGRAM, RAW, SEQPACKET)]
    pair = """
        import socket
        a, b = socket.socketpair()
        socket.send_fds(a, [b"x"], [0])
        print(len(socket.recv_fds(b, 1, 1)[1]))
    """
    assert answers(caller, *inet, *unix) == [0] * len([*inet, *unix])
    assert start({}, sys.executable, "-c", textwrap.dedent(pair)).stdout == "1\n"


def test_listen_allow_and_bind_ephemeral_are_not_refused_here() -> None:
    code = """
        import socket
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            print(server.accept()[1][0])
    """
    done = start({"listen": "allow", "bind": "ephemeral"}, sys.executable, "-c", textwrap.dedent(code))
    assert done.stdout == "127.0.0.1\n", done.stderr


def test_netlink_lists_interfaces_where_the_policy_allows_it() -> None:
    """Its bind must work although the policy refuses bind; and route is the only netlink protocol."""
    families = [*Family]
    code = "import socket; print(len(socket.if_nameindex()) > 0)"
    assert start({"families": families}, sys.executable, "-c", code).stdout == "True\n"
    assert "[Errno 97]" in start({}, sys.executable, "-c", code).stderr
    sock_diag = "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)"
    assert "[Errno 93]" in start({"families": families}, sys.executable, "-c", sock_diag).stderr


def test_threads_and_children_stay_under_the_filter(caller: Path) -> None:
    thread = """
        import socket, subprocess, sys, threading
        def call():
            try:
                socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
            except OSError as error:
                print(error.errno, flush=True)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        subprocess.run(sys.argv[1], input="native listen 3 0\\n", text=True)
    """
    done = start({"mark": MARK}, sys.executable, "-c", textwrap.dedent(thread), caller)
    assert done.stdout.split() == [str(MARK + EAFNOSUPPORT), str(MARK + EACCES)]


def test_a_filter_of_the_program_cannot_undo_ours(caller: Path) -> None:
    """A supervisor (user notification) ranks below an errno, and a filter that allows adds nothing (kernel/seccomp.c)."""
    code = """
        import os, pyseccomp, sys
        own = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        own.add_rule(pyseccomp.NOTIFY, "listen")
        own.load()
        os.execv(sys.argv[1], sys.argv[1:])
    """
    done = start({"mark": MARK}, sys.executable, "-c", textwrap.dedent(code), caller, stdin="native listen 3 0\n")
    assert done.stdout.split() == [str(MARK + EACCES)], done.stderr


def test_audit_refuses_nothing(caller: Path) -> None:
    calls: list[Call] = [("socket", NETLINK, RAW, 0), ("listen", 3, 0), ("accept", 3, 0, 0)]
    assert answers(caller, *calls, audit=True) == [0, EBADF, EBADF]
