"""Tables that forget, and memory that is not there: what weir cannot remember is refused, and counted."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.kernel.abi import MAX_PEERS, Hook, Reason
from agent.policy.model import Mode
from tests import addresses, need
from tests.kernel.attempts import LONG, SHORT
from tests.kernel.cage import Box, Link, Refusal, errno_of
from tests.kernel.network import from_peer
from tests.kernel.rules import policy
from tests.world import CLIENT, Side, World

ASKED, STRANGER = addresses.PUBLIC, addresses.GOOGLE
OPTMEM = "net.core.optmem_max"


def test_more_peers_than_are_remembered(box: Box, world: World) -> None:
    """A socket is open to those that it has asked, as long as they are remembered; nobody else comes in for the forgotten."""

    def job(link: Link) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            for port in (4600, 4601, 4602):  # the socket itself remembers the last one
                made.settimeout(LONG)
                made.sendto(b"asked", (ASKED, port))
                assert made.recv(100) == b"asked"
            link.send(made.getsockname()[1])
            while True:
                made.settimeout(link.receive())
                link.send(errno_of(lambda: made.recv(100)))

    def flood() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            for number in range(1, 2 * MAX_PEERS + 1):  # 127.0.0.0 is a broadcast address before Linux 5.14
                made.sendto(b"x", (f"127.{number >> 16}.{number >> 8 & 255}.{number & 255}", 9))

    def comes_in(port: int, peer: str, peers_port: int, timeout: float) -> int:
        with from_peer(world, peer, socket.SOCK_DGRAM, peers_port) as sender:
            sender.sendto(b"x", (CLIENT, port))
            link.send(timeout)
            got: int = link.receive()
            return got

    box.enrol(policy())
    with box.start(job) as link:
        port = link.receive()
        assert comes_in(port, ASKED, 4601, LONG) == 0
        assert comes_in(port, STRANGER, 4601, SHORT) == errno.ETIMEDOUT
        box.run(flood)
        # 4601 has been used since, and may stay for longer.
        assert comes_in(port, ASKED, 4600, SHORT) == errno.ETIMEDOUT, "it is remembered: this was no flood"
        assert comes_in(port, STRANGER, 4601, SHORT) == errno.ETIMEDOUT
        assert comes_in(port, ASKED, 4602, LONG) == 0, "the last one"
    assert box.refusals() == {Refusal(Hook.INGRESS, Reason.UNSOLICITED): 3}


@pytest.fixture
def no_memory(world: World) -> Iterator[None]:
    """No memory for options of sockets in the client's namespace, of which what weir remembers of them is a part."""
    with world.client():
        file = Path("/proc/sys", OPTMEM.replace(".", "/"))
        if not file.exists():
            need.skip(f"needs a kernel with {OPTMEM} in each network namespace (6.8)")
        before = file.read_text().strip()
    world.sysctl(Side.CLIENT, OPTMEM, "0")
    yield
    world.sysctl(Side.CLIENT, OPTMEM, before)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_no_memory_for_a_sockets_owner(
    box: Box, mode: Mode, family: socket.AddressFamily, kind: socket.SocketKind
) -> None:
    """Without its owner a socket could not be told from one that was handed over: refused, audited or not."""
    box.enrol(policy(mode=mode))
    assert box.errno(lambda: socket.socket(family, kind).close()) == box.cage.errno(errno.ENOMEM)
    assert box.refusals() == {Refusal(Hook.SOCK_CREATE, Reason.MEMORY): 1}
    assert box.counters().sockets_created == 0
