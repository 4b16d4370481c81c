"""Table E of the known ways round: calls that a seccomp filter may not see. Without one, the hooks must hold.

What the filter does about these calls themselves is in test_seccomp.py.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from agent.kernel.abi import Hook, Reason
from tests import addresses, need
from tests.kernel.attempts import LONG, SHORT, endpoint
from tests.kernel.cage import Box, Cage, Link, Refusal, errno_of
from tests.kernel.network import from_peer, heard, silence
from tests.kernel.rules import deny, policy
from tests.kernel.site import TIMEOUT
from tests.world import CLIENT, World

DENIED, ALLOWED = "10.1.2.3", addresses.PUBLIC
NO_TEN = policy(deny("10.0.0.0/8"))
_SOURCES = Path(__file__).parent / "c"
NO_RING, NO_OPERATION = 1000, 1001  # c/uring.c
UDP_SEGMENT = 103  # linux/udp.h


def built(name: str, directory: Path, *options: str) -> Path:
    """Compile one of the C programs; skip without a compiler."""
    target = directory / name
    compiler = need.command("gcc")
    subprocess.run([compiler, "-O1", *options, "-o", target, _SOURCES / f"{name}.c"], check=True, timeout=TIMEOUT)
    return target


@pytest.fixture(scope="module")
def uring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("uring", tmp_path_factory.mktemp("uring"))


@pytest.fixture(scope="module")
def ia32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.machine() != "x86_64":
        need.skip("needs x86_64: only it has int 0x80")
    program = built("ia32_calls", tmp_path_factory.mktemp("ia32"), "-no-pie")
    if subprocess.run([program, "socket", "2", "1", "0"], capture_output=True, check=False).stdout != b"0\n":
        need.skip("needs a kernel with the 32-bit interface (CONFIG_IA32_EMULATION)")
    return program


def answer(box: Box, program: Path, *words: str) -> int:
    """Run a C program in the box: 0, an errno, or a number of its own."""

    def job() -> int:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=TIMEOUT, check=True)
        return abs(int(done.stdout))

    return box.run(job)


def test_E2_ia32_calls(box: Box, cage: Cage, world: World, ia32: Path) -> None:
    """socket, bind, connect, sendto of the 32-bit interface come to the same hooks."""
    box.enrol(NO_TEN)
    refused = cage.errno(errno.EACCES)
    with silence(world):
        assert answer(box, ia32, "connect", DENIED, "443") == refused
        assert answer(box, ia32, "sendto", DENIED, "443") == refused
    assert answer(box, ia32, "bind", CLIENT, "0") == refused
    assert answer(box, ia32, "socket", "2", "3", "17") == cage.errno(errno.EPROTONOSUPPORT)
    assert answer(box, ia32, "connect", ALLOWED, "443") == 0
    assert answer(box, ia32, "sendto", ALLOWED, "443") == 0
    assert sum(box.refusals().values()) == 4


def test_E4_E5_high_bits_and_flags(box: Box, cage: Cage) -> None:
    """The hook sees what the kernel uses: 32 bits, and the type without SOCK_CLOEXEC and SOCK_NONBLOCK."""
    if platform.machine() != "x86_64":
        need.skip("needs x86_64: the number of socket() is the test's own")
    number_of_socket = 41  # asm/unistd_64.h

    def create(*words: int) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.syscall(number_of_socket, *map(ctypes.c_ulong, words))
        return ctypes.get_errno() if done < 0 else 0

    high, flags = 1 << 32, int(socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    box.enrol(NO_TEN)
    refused = cage.errno(errno.EPROTONOSUPPORT)
    for words in ((2, 3, 17), (high | 2, high | 3, high | 17), (2, 3 | flags, 255), (10, 2 | flags, high | 136)):
        assert box.run(lambda words=words: create(*words)) == refused  # type: ignore[misc]
    assert box.run(lambda: create(high | 2, high | 1 | flags, high | 6)) == 0


@pytest.mark.parametrize("mode", [(), ("sqpoll",)], ids=["plain", "sqpoll"])
def test_E6_io_uring(box: Box, cage: Cage, world: World, uring: Path, mode: tuple[str, ...]) -> None:
    """Every operation comes to its hook in the right container, from the ring's own thread too. Listening is dropped at the SYN."""
    box.enrol(NO_TEN)
    if answer(box, uring, *mode, "connect", ALLOWED, "443") == NO_RING:
        need.skip("needs io_uring (kernel.io_uring_disabled=0)")
    refused, unsupported = cage.errno(errno.EACCES), cage.errno(errno.EPROTONOSUPPORT)
    with silence(world):
        assert answer(box, uring, *mode, "connect", DENIED, "443") == refused
        assert answer(box, uring, *mode, "connect", f"::ffff:{DENIED}", "443") == refused
        assert answer(box, uring, *mode, "send", DENIED, "443") == refused
    assert answer(box, uring, *mode, "socket", "2", "3", "17") in (unsupported, NO_OPERATION)
    assert answer(box, uring, *mode, "socket", "2", "1", "0") in (0, NO_OPERATION)
    assert answer(box, uring, *mode, "bind", CLIENT, "0") in (refused, NO_OPERATION)
    assert answer(box, uring, *mode, "connect", ALLOWED, "443") == 0
    assert answer(box, uring, *mode, "send", ALLOWED, "443") == 0
    expected = {Refusal(Hook.CONNECT, Reason.RULE, 0): 2, Refusal(Hook.SENDMSG, Reason.RULE, 0): 1}
    assert {key: count for key, count in box.refusals().items() if key.reason is Reason.RULE} == expected


def test_E6_io_uring_listen(box: Box, world: World, uring: Path) -> None:
    """IORING_OP_LISTEN comes to no hook and succeeds; but nobody can connect."""

    def job(link: Link) -> None:
        with subprocess.Popen([uring, "listen"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdin and running.stdout
            link.send(running.stdout.readline().split())
            link.receive()
            running.stdin.close()

    def knock(timeout: float) -> int:
        with box.start(job) as link, from_peer(world, ALLOWED, socket.SOCK_STREAM) as made:
            result, port = map(int, link.receive())
            if result:
                need.skip("needs io_uring with IORING_OP_LISTEN (Linux 6.11)")
            made.settimeout(timeout)
            got = errno_of(lambda: made.connect((CLIENT, port)))
            link.send()
            link.receive()
            return got

    assert knock(LONG) == 0
    box.enrol(NO_TEN)
    assert knock(SHORT) == errno.ETIMEDOUT
    assert box.refusals().keys() == {Refusal(Hook.INGRESS, Reason.LISTEN)}, "the SYN, once or sent again"


@pytest.mark.parametrize(
    "message",
    [
        (socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", 7)),
        (socket.IPPROTO_IP, socket.IP_TTL, struct.pack("=i", 9)),
        (socket.IPPROTO_IP, socket.IP_TOS, struct.pack("=i", 8)),
        (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", 10)),
    ],
    ids=["SO_MARK", "IP_TTL", "IP_TOS", "UDP_SEGMENT"],
)
def test_E7_control_messages(box: Box, cage: Cage, world: World, message: tuple[int, int, bytes]) -> None:
    """Options given with a datagram: its destination is judged, and its bytes are counted, all the same."""

    def job(address: str) -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            return errno_of(lambda: made.sendmsg([b"x" * 25], [message], 0, endpoint(address, 4507)))

    box.enrol(NO_TEN)
    with silence(world):
        assert box.run(lambda: job(DENIED)) == cage.errno(errno.EACCES)
    assert box.run(lambda: job(ALLOWED)) == 0
    datagrams = 3 if message[1] == UDP_SEGMENT else 1
    assert box.counters().bytes["public"] == 25 + 28 * datagrams
    assert heard(world, ALLOWED, 4507) >= datagrams
