"""Verdicts that are remembered: never another policy's, another destination's, or an older one."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import socket
import threading
import time
from collections import Counter

from agent.kernel import abi, libbpf
from tests.kernel.attempts import LONG
from tests.kernel.cage import Box, Cage, Link, errno_of
from tests.kernel.network import quiet
from tests.kernel.rules import deny, policy
from tests.servers import SINK_PORT
from tests.world import World

LOWER, UPPER = "10.0.0.0/9", "10.128.0.0/9"
NO_LOWER, NO_UPPER = policy(deny(LOWER)), policy(deny(UPPER))
SCALE = float(os.environ.get("WEIR_TEST_SCALE", "1"))
SENDS = max(500, int(5000 * SCALE))
VERSIONS = max(5, int(40 * SCALE))
THREADS = 4


def hammer(seed: int, count: int, udp: socket.socket, results: Counter[tuple[bool, int]]) -> None:
    """Send to random addresses of 10.0.0.0/8; count by half and errno."""
    chosen = random.Random(seed)
    for _ in range(count):
        upper = chosen.random() < 0.5
        address = f"10.{chosen.randrange(128) + 128 * upper}.{chosen.randrange(4)}.{chosen.randrange(4)}"
        try:
            udp.sendto(b"x", (address, SINK_PORT))
            results[upper, 0] += 1
        except OSError as error:
            results[upper, error.errno or -1] += 1


def hammer_with_threads(seed: int) -> Counter[tuple[bool, int]]:
    """Several threads on one unconnected socket."""
    results: list[Counter[tuple[bool, int]]] = [Counter() for _ in range(THREADS)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        threads = [
            threading.Thread(target=hammer, args=(seed + index, SENDS, udp, result))
            for index, result in enumerate(results)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    total: Counter[tuple[bool, int]] = Counter()
    for result in results:
        total.update(result)
    return total


def test_threads_on_one_socket_in_two_containers(cage: Cage, world: World) -> None:
    """What one container is refused the other may, at the same time, on the same CPUs: 40,000 datagrams, not one astray."""
    refused = cage.errno(errno.EACCES)
    world.add_counter("lower", f"ip daddr {LOWER}")
    world.add_counter("upper", f"ip daddr {UPPER}")
    with cage.box(world) as one, cage.box(world) as two:
        one.enrol(NO_LOWER)
        two.enrol(NO_UPPER)
        with (
            one.start(lambda _: hammer_with_threads(1)) as first,
            two.start(lambda _: hammer_with_threads(100)) as second,
        ):
            got: list[Counter[tuple[bool, int]]] = [first.receive(), second.receive()]
        assert {key for result in got for key in result} == {(False, 0), (False, refused), (True, 0), (True, refused)}
        assert got[0].keys() == {(False, refused), (True, 0)}
        assert got[1].keys() == {(False, 0), (True, refused)}
        assert sum(one.refusals().values()) == got[0][False, refused]
        assert sum(two.refusals().values()) == got[1][True, refused]
    assert quiet(lambda: world.counter("upper")).packets == got[0][True, 0]
    assert world.counter("lower").packets == got[1][False, 0]


def send_ten(link: Link) -> None:
    """For each word on the link send ten datagrams to one address, on a socket that stays; answer with the errnos."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as loose,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as tied,
    ):
        tied.connect(("10.1.1.1", SINK_PORT))
        while True:
            link.receive()
            got = set()
            for _ in range(10):
                got |= {
                    errno_of(lambda: loose.sendto(b"x", ("10.1.1.1", SINK_PORT))),
                    errno_of(lambda: tied.send(b"x")),
                }
            link.send(got)


def test_switch_with_a_warm_memory(box: Box, cage: Cage) -> None:
    """The first call after a switch is judged by the new policy: sendto() by the hook, send() by its packet."""
    with box.start(send_ten) as link:
        for _ in range(20):
            for wanted, switched in (({0}, NO_UPPER), ({errno.EPERM, cage.errno(errno.EACCES)}, NO_LOWER)):
                box.enrol(switched)
                link.send()
                assert link.receive() == wanted


def test_nothing_leaves_after_a_switch(box: Box, world: World) -> None:
    """A sender that never stops: once enrol() is back, not one more datagram reaches the peer."""

    def job(link: Link) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            link.send()
            while True:
                hammer(7, 200, udp, Counter())

    world.add_counter("switched", f"ip daddr {LOWER}")
    box.enrol(NO_UPPER)
    with box.start(job) as link:
        link.receive()
        for _ in range(5):
            before = world.counter("switched")
            box.enrol(NO_LOWER)
            stopped = world.counter("switched")
            time.sleep(0.2)
            assert world.counter("switched") == stopped
            box.enrol(NO_UPPER)
            deadline = time.monotonic() + LONG
            while world.counter("switched") == stopped and time.monotonic() < deadline:
                time.sleep(0.01)
            assert world.counter("switched").packets > before.packets


def number_next_version(cage: Cage, number: int) -> None:
    """Let the next policy version have that number, as if so many had been there."""
    fd, first, config = libbpf.obj_get(cage.place.pins.maps / "config"), ctypes.c_uint32(0), abi.Config()
    try:
        libbpf.lookup(fd, first, config)
        config.next_policy = number
        libbpf.update(fd, first, config)
    finally:
        os.close(fd)


def test_same_destinations_under_many_versions(box: Box, cage: Cage) -> None:
    """With far-apart numbers some version's verdict lies where another's is looked for: it must not be taken for it."""
    flows = [f"10.{number}.{number}.1" for number in range(100)]

    def job(link: Link) -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the memory is each CPU's own
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            while True:
                link.receive()
                link.send({errno_of(lambda to=to: udp.sendto(b"x", (to, SINK_PORT))) for to in flows})  # type: ignore[misc]

    chosen = random.Random(5)
    refused = cage.errno(errno.EACCES)
    with box.start(job) as link:
        for number in sorted(chosen.sample(range(1 << 20, 1 << 30), VERSIONS)):
            lower = chosen.random() < 0.5
            number_next_version(cage, number)
            box.enrol(policy(deny(LOWER if lower else UPPER), deny(f"192.0.{number >> 8 & 255}.{number & 255}")))
            box.forget()
            link.send()
            assert link.receive() == {refused if lower else 0}, number
