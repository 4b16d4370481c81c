"""Table D of the known ways round: whose socket is it? Without seccomp, so that the hooks stand alone."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.kernel.abi import Flag, Hook, Reason
from agent.policy.model import Action
from tests import addresses
from tests.kernel import attempts
from tests.kernel.attempts import EVERY_WAY, LONG, SHORT, become_nobody
from tests.kernel.cage import Box, Cage, Link, Refusal, errno_of, remove_cgroup
from tests.kernel.network import heard, silence
from tests.kernel.rules import OPEN, deny, policy
from tests.servers import SINK_PORT
from tests.world import World

DENIED, ALLOWED = "10.1.2.3", addresses.PUBLIC
NO_TEN = policy(deny("10.0.0.0/8"))
MAY_CROSS: dict[str, Any] = {"transfer": Action.ALLOW}
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
_PIDFD_GETFD = 438  # asm-generic/unistd.h, every architecture
_LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def other(cage: Cage, world: World) -> Iterator[Box]:
    """A second box."""
    with cage.box(world) as made:
        yield made


def datagram() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def connected() -> socket.socket:
    made = datagram()
    made.connect((ALLOWED, 53))
    return made


def handed(giver: Box, taker: Box, make: Callable[[], socket.socket], use: Callable[[socket.socket], object]) -> int:
    """Make a socket in one box, pass it to another in a message, use it there: 0 or an errno."""
    left, right = socket.socketpair()

    def give() -> None:
        with make() as made:
            socket.send_fds(left, [b"x"], [made.fileno()])

    def take() -> int:
        fds = socket.recv_fds(right, 1, 1)[1]
        with socket.socket(fileno=fds[0]) as made:
            made.settimeout(SHORT)
            return errno_of(lambda: use(made))

    with left, right:
        giver.run(give)
        return taker.run(take)


def use_connect(made: socket.socket) -> None:
    made.connect((ALLOWED, 443))


def use_sendto(made: socket.socket) -> None:
    made.sendto(b"x", (ALLOWED, 443))


def use_bind(made: socket.socket) -> None:
    made.bind(("127.0.0.1", 0))


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (socket.socket, use_connect),
        (socket.socket, use_bind),
        *((make, use) for make in (datagram, connected) for use in (use_connect, use_sendto, use_bind)),
    ],
)
def test_D1_socket_of_another_container(
    box: Box, other: Box, cage: Cage, make: Callable[[], socket.socket], use: Callable[[socket.socket], None]
) -> None:
    """A descriptor in a message: refused whatever the destination, and charged to who tries. transfer: allow lets it through."""
    box.enrol(policy(**OPEN))
    other.enrol(policy(**OPEN))
    assert handed(box, other, make, use) == cage.errno(errno.EACCES)
    assert sum(n for refusal, n in other.refusals().items() if refusal.reason is Reason.TRANSFER) == 1
    assert not box.refusals()
    box.enrol(policy(**OPEN, **MAY_CROSS))
    assert handed(box, other, make, use) == cage.errno(errno.EACCES), "one of two policies is not enough"
    other.enrol(policy(**OPEN, **MAY_CROSS))
    assert handed(box, other, make, use) == (errno.EINVAL if make is connected and use is use_bind else 0)


def test_D1_both_policies_judge_what_crosses(box: Box, other: Box, cage: Cage, world: World) -> None:
    """The caller's policy judges the call, the owner's the packets, and the owner is charged."""
    box.enrol(policy(deny("10.0.0.0/8"), **MAY_CROSS))
    other.enrol(policy(deny("192.168.0.0/16"), **MAY_CROSS))
    with silence(world):
        assert handed(box, other, datagram, lambda s: s.sendto(b"x", ("192.168.1.1", 53))) == cage.errno(errno.EACCES)
        assert handed(box, other, datagram, lambda s: s.sendto(b"x", ("10.1.1.1", 53))) == errno.EPERM
    assert handed(box, other, datagram, lambda s: s.sendto(b"x", (ALLOWED, SINK_PORT))) == 0
    assert other.refusals() == {Refusal(Hook.SENDMSG, Reason.RULE, 0): 1}
    assert box.refusals() == {Refusal(Hook.EGRESS, Reason.RULE, 0): 1}
    assert box.counters().bytes["public"] == 29
    assert sum(other.counters().bytes.values()) == 0


def test_D1_pidfd_getfd(box: Box, other: Box, cage: Cage) -> None:
    """Taken out of another process, by root. The seccomp filter refuses the call itself: test_seccomp.py."""
    box.enrol(NO_TEN)
    other.enrol(NO_TEN)

    def hold(link: Link) -> None:
        with socket.socket() as made:
            link.send((os.getpid(), made.fileno()))
            link.receive()

    def take(pid: int, fd: int) -> int:
        taken = _LIBC.syscall(_PIDFD_GETFD, os.pidfd_open(pid), fd, 0)
        if taken < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        with socket.socket(fileno=taken) as made:
            return errno_of(lambda: made.connect((ALLOWED, 443)))

    with box.start(hold) as link:
        pid, fd = link.receive()
        assert other.run(lambda: take(pid, fd)) == cage.errno(errno.EACCES)
    assert other.refusals() == {Refusal(Hook.CONNECT, Reason.TRANSFER): 1}


@pytest.mark.parametrize("how", [Flag.BORN, Flag(0)])
def test_D1_socket_of_nobody(box: Box, other: Box, cage: Cage, how: Flag) -> None:
    """From outside every container. One that was enrolled before its first process cannot have made it: refused.

    One that was enrolled while it ran may have: it is judged as its own from then on.
    """
    box.enrol(NO_TEN, how)
    got = handed(other, box, socket.socket, use_connect)
    assert got == (cage.errno(errno.EACCES) if how else 0)
    assert handed(other, box, socket.socket, lambda made: made.connect((DENIED, 443))) == cage.errno(errno.EACCES)
    assert box.counters().sockets_adopted == (0 if how else 2)


def test_D1_connected_socket_from_outside_waits_for_the_lsm_layer(box: Box, other: Box) -> None:
    """send() on it comes to no hook, and its packets are its maker's: it gets through, uncounted.

    This test says so, so that nobody thinks otherwise. `weir run` closes what is inherited (test_start.py).
    """

    def made() -> socket.socket:
        udp = datagram()
        udp.connect((DENIED, SINK_PORT))
        return udp

    box.enrol(NO_TEN, Flag.BORN)
    assert handed(other, box, made, lambda udp: udp.send(b"x")) == 0
    assert sum(box.counters().bytes.values()) == 0
    other.enrol(NO_TEN)
    assert handed(other, box, connected, lambda udp: udp.send(b"x")) == 0, (
        "one of another container is under that one's rules"
    )
    assert other.counters().bytes["public"] == 29


def test_D2_process_moves_out(box: Box, cage: Cage, world: World) -> None:
    """The socket stays the container's: in connect(), and packet by packet."""
    before = Path("/proc/self/cgroup").read_text().split("0::")[1].split()[0]
    outside = cage.place.root / before.lstrip("/")

    def job() -> list[int]:
        with socket.socket() as tcp, datagram() as udp, connected() as peer:
            (outside / "cgroup.procs").write_text("0")
            refused = [errno_of(lambda: tcp.connect((DENIED, 443))), errno_of(lambda: udp.sendto(b"x", (DENIED, 53)))]
            return [*refused, errno_of(lambda: peer.send(b"x")), errno_of(lambda: attempts.udp_sendto(DENIED, 53))]

    box.enrol(NO_TEN)
    assert box.run(job) == [cage.errno(errno.EACCES)] * 2 + [0, 0], "a new socket is the new cgroup's"
    assert box.counters().bytes["public"] == 29


def test_D2_process_moves_to_another_container(box: Box, other: Box, cage: Cage) -> None:
    """It takes its descriptors along, but may not use them."""

    def job() -> list[int]:
        with datagram() as udp:
            other.join()
            return [
                errno_of(lambda: udp.sendto(b"x", (ALLOWED, 53))),
                errno_of(lambda: attempts.udp_sendto(ALLOWED, 53)),
            ]

    box.enrol(NO_TEN)
    other.enrol(NO_TEN)
    assert box.run(job) == [cage.errno(errno.EACCES), 0]
    assert other.refusals() == {Refusal(Hook.SENDMSG, Reason.TRANSFER): 1}


def test_D3_descriptors_in_proc(box: Box) -> None:
    """A socket cannot be opened there."""

    def job() -> int:
        with socket.socket() as made:
            return errno_of(lambda: os.open(f"/proc/self/fd/{made.fileno()}", os.O_RDWR))

    assert box.run(job) == errno.ENXIO


@pytest.mark.parametrize("way", EVERY_WAY)
def test_D4_child_cgroup(box: Box, cage: Cage, world: World, way: Callable[..., None]) -> None:
    """What runs below an enrolled cgroup is under its policy, and on its account."""
    box.enrol(NO_TEN)
    with box.child() as child, child.child() as grandchild:
        with silence(world):
            assert grandchild.errno(lambda: way(DENIED, 443)) == cage.errno(errno.EACCES)
        grandchild.run(lambda: way(ALLOWED, 443))
    assert sum(box.refusals().values()) == 1
    assert box.counters().bytes["public"] > 0


def test_D4_child_enrolled_after_its_parent(box: Box, cage: Cage, world: World) -> None:
    """From then on the child's sockets, those it had included, are under its policy and on its account."""

    def job(link: Link) -> None:
        with datagram() as udp:
            while True:
                link.send(errno_of(lambda: udp.sendto(b"x", (link.receive(), SINK_PORT))))

    box.enrol(NO_TEN)
    with box.child() as child, child.start(job) as link:

        def send(address: str) -> int:
            link.send(address)
            answer: int = link.receive()
            return answer

        refused = cage.errno(errno.EACCES)
        assert [send(DENIED), send(ALLOWED)] == [refused, 0]
        child.enrol(policy(deny(ALLOWED)))
        assert [send(DENIED), send(ALLOWED)] == [0, refused]
        assert (box.counters().bytes["public"], box.counters().bytes["private"]) == (29, 0)
        assert (child.counters().bytes["public"], child.counters().bytes["private"]) == (0, 29)
        child.withdraw()
        assert [send(DENIED), send(ALLOWED)] == [refused, 0]
        assert box.counters().bytes["public"] == 58


def test_D4_child_enrolled_while_its_socket_is_outside(box: Box, cage: Cage) -> None:
    """The socket goes by the cgroup that made it, also in the hands of a process that no container holds."""
    left, right = socket.socketpair()

    def give() -> None:
        with datagram() as made:
            socket.send_fds(left, [b"x"], [made.fileno()])

    box.enrol(NO_TEN)
    with left, right, box.child() as child:
        child.run(give)
        with socket.socket(fileno=socket.recv_fds(right, 1, 1)[1][0]) as made:

            def send(address: str) -> int:
                return errno_of(lambda: made.sendto(b"x", (address, SINK_PORT)))

            refused = cage.errno(errno.EACCES)
            assert [send(DENIED), send(ALLOWED)] == [refused, 0]
            child.enrol(policy(deny(ALLOWED)))
            assert [send(DENIED), send(ALLOWED)] == [0, refused]


def test_D5_move_without_privilege(box: Box, other: Box) -> None:
    """Neither into another cgroup nor into a new one."""

    def job() -> list[int]:
        become_nobody()
        return [errno_of(other.join), errno_of((box.path / "new").mkdir)]

    box.enrol(NO_TEN)
    assert box.run(job) == [errno.EACCES, errno.EACCES]


def test_D6_socket_older_than_the_enrolment(box: Box, cage: Cage, world: World) -> None:
    """connect() and sendto() are judged from then on; what is connected already is stopped packet by packet."""

    def job(link: Link) -> list[int]:
        with (
            socket.socket() as fresh,
            datagram() as udp,
            connected() as kept,
            datagram() as revoked,
            socket.socket() as tcp,
        ):
            for made in (fresh, tcp):
                attempts.abort(made)
            revoked.connect((DENIED, 53))
            tcp.connect((DENIED, SINK_PORT))
            link.send()
            link.receive()
            tcp.send(b"x" * 100)
            return [
                errno_of(lambda: fresh.connect((DENIED, 443))),
                errno_of(lambda: udp.sendto(b"x", (DENIED, 53))),
                errno_of(lambda: revoked.send(b"x")),
                errno_of(lambda: kept.send(b"x")),
            ]

    with box.start(job) as link:
        link.receive()
        world.add_counter("revoked", f"ip daddr {DENIED}")
        box.enrol(NO_TEN)
        link.send()
        assert link.receive() == [cage.errno(errno.EACCES)] * 2 + [errno.EPERM, 0]
    assert world.counter("revoked").packets == 0
    assert box.counters().sockets_adopted >= 2
    assert box.counters().bytes["public"] == 29


def test_D7_cgroup_removed_while_a_socket_lives(cage: Cage, world: World) -> None:
    """The socket got out by a message. Its rules hold as long as the enrolment; then those of what was around it."""
    left, right = socket.socketpair()

    def give() -> None:
        with datagram() as made:
            socket.send_fds(left, [b"x"], [made.fileno()])

    with left, right, cage.box(world) as parent:
        cage.controller.close_off(parent.path)
        with parent.child() as box:
            box.enrol(NO_TEN)
            number = box.id
            box.run(give)
            with socket.socket(fileno=socket.recv_fds(right, 1, 1)[1][0]) as made:
                remove_cgroup(box.path)
                assert errno_of(lambda: made.sendto(b"x", (DENIED, 4407))) == cage.errno(errno.EACCES)
                assert errno_of(lambda: made.sendto(b"x", (ALLOWED, 4407))) == 0
                cage.controller.withdraw(number)
                # In the call when an answer has come in meanwhile, else in the packet program.
                assert errno_of(lambda: made.sendto(b"x", (ALLOWED, 4408))) in (errno.EPERM, cage.errno(errno.EACCES))
        assert [refusal.reason for refusal in parent.refusals().elements()] == [Reason.NO_POLICY]
    assert heard(world, ALLOWED, 4407) == 1
    assert heard(world, ALLOWED, 4408) == 0


def test_D8_user_and_network_namespace_of_its_own(box: Box, cage: Cage) -> None:
    """Root in there, with every capability, and still under the policy."""

    def job() -> list[int]:
        become_nobody()
        if _LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        raw = [(socket.AF_INET, socket.SOCK_RAW, 17), (socket.AF_INET6, socket.SOCK_RAW, 58)]
        got = [errno_of(lambda kind=kind: socket.socket(*kind).close()) for kind in raw]  # type: ignore[misc]
        return [*got, *(errno_of(lambda way=way: way("127.0.0.1", 80)) for way in EVERY_WAY)]  # type: ignore[misc]

    box.enrol(policy(deny("127.0.0.0/8")))
    assert box.run(job) == [cage.errno(errno.EPROTONOSUPPORT)] * 2 + [cage.errno(errno.EACCES)] * 3


@pytest.mark.parametrize("way", ["socket", "task"])
def test_D9_socket_and_task_in_different_network_namespaces(box: Box, cage: Cage, world: World, way: str) -> None:
    """The hook runs whichever of them is elsewhere."""

    def job() -> list[int]:
        with world.peer():
            made = socket.socket()
        with made, socket.socket() as ours:
            if way == "socket":
                return [errno_of(lambda: made.connect((DENIED, 443)))]
            with world.peer():
                return [errno_of(lambda: ours.connect((DENIED, 443)))]

    box.enrol(NO_TEN)
    assert box.run(job) == [cage.errno(errno.EACCES)]


def test_a_slot_used_again_starts_from_zero(cage: Cage, world: World) -> None:
    """The next cgroup in a slot inherits no byte and no refusal."""
    slots = []
    for _ in range(2):
        with cage.box(world) as box:
            box.enrol(NO_TEN)
            slots.append(box.slot)
            assert sum(box.counters().bytes.values()) == 0
            assert not box.refusals()
            box.run(lambda: attempts.udp_sendto(ALLOWED, 53, timeout=LONG))
            box.errno(lambda: attempts.udp_sendto(DENIED, 53))
            assert box.counters().bytes["public"] == 33
            assert sum(box.refusals().values()) == 1
    assert slots[0] == slots[1]


def test_a_socket_left_over_is_not_on_the_next_account(cage: Cage, world: World) -> None:
    """Its cgroup is gone, and its slot somebody else's: it may send as its surroundings allow, but not at their cost."""
    left, right = socket.socketpair()

    def give() -> None:
        with connected() as made:
            made.send(b"x")
            socket.send_fds(left, [b"x"], [made.fileno()])

    with left, right:
        with cage.box(world) as first:
            first.enrol(NO_TEN)
            slot = first.slot
            first.run(give)
        with socket.socket(fileno=socket.recv_fds(right, 1, 1)[1][0]) as made, cage.box(world) as second:
            second.enrol(NO_TEN)
            assert second.slot == slot
            assert errno_of(lambda: made.send(b"x")) == 0
            made.close()
            assert sum(second.counters().packets.values()) == 0
            assert second.counters().sockets_released == 0
