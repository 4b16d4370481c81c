"""Runs the C client in every cgroup by turns, in short batches, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.addresses import PUBLIC
from tests.bench.place import SCATTER, UNREAD
from tests.world import Side, World

CORE = 1
"""The core of client and server; the one that reads their answers is another, where there is one."""


@dataclass(frozen=True)
class Workload:
    """What the client does; ``operations`` in one batch take some 5 ms."""

    name: str
    what: str
    address: str
    operations: int


WORKLOADS = (
    Workload("64-byte sendto, unconnected", "udp", UNREAD, 2000),
    Workload("64-byte send, connected UDP", "connected", UNREAD, 2000),
    Workload("64-byte sendto, 65,536 destinations by turns", "scattered", SCATTER, 2000),
    Workload("TCP socket, connect and close", "connect", PUBLIC, 100),
    Workload("TCP stream, one 64 KiB send", "stream", PUBLIC, 500),
)


@dataclass(frozen=True)
class Arm:
    """A way to run: in which cgroup, with weir and the empty programs attached or not."""

    name: str
    cgroup: Path
    attached: bool


Samples = dict[tuple[str, str], list[float]]
"""(workload's name, arm's name) → nanoseconds for one operation, one number per turn; the nth of all arms belong
together."""


def compile_client(directory: Path) -> Path:
    """Raises CalledProcessError when gcc does."""
    binary = directory / "client"
    subprocess.run(["gcc", "-O2", "-o", str(binary), str(Path(__file__).with_name("client.c"))], check=True)
    return binary


class Client:
    """One process of client.c."""

    def __init__(self, binary: Path, world: World, workload: Workload, arm: Arm, core: int) -> None:
        networks = [f"/run/netns/{world.name(side)}" for side in (Side.CLIENT, Side.PEER)]
        procs = str(arm.cgroup / "cgroup.procs")
        arguments = [workload.what, str(core), procs, *networks, workload.address, str(workload.operations)]
        self._process = subprocess.Popen(
            [str(binary), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def batch(self) -> float:
        """Nanoseconds for one operation. Raises RuntimeError when the client has failed; it has said why."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the client failed; its own message is above")
        return float(line)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def _clients(
    binary: Path, world: World, workload: Workload, arms: Sequence[Arm], core: int
) -> Iterator[dict[str, Client]]:
    with ExitStack() as stack:
        started = {}
        for arm in arms:
            started[arm.name] = client = Client(binary, world, workload, arm, core)
            stack.callback(client.close)
        yield started


def measure(
    binary: Path,
    world: World,
    arms: Sequence[Arm],
    attach: Callable[[bool], None],
    rounds: int,
    turns: int,
    core: int,
) -> Samples:
    """In each round every workload gets fresh clients, and each of these ``turns`` batches in random order.

    The arms without programs have their turn with nothing attached by us: attaching anywhere switches the kernel's
    hooks on for all.
    """
    samples: Samples = {}
    rng = random.Random(rounds)
    for _ in range(rounds):
        for workload in WORKLOADS:
            attach(
                True
            )  # the clients' sockets must have an owner: weir refuses one made outside to a cgroup born under it
            with _clients(binary, world, workload, arms, core) as clients:
                for client in clients.values():
                    client.batch()  # warms caches
                for turn in range(turns):
                    _turn(workload, arms, clients, attach, samples, rng, first_attached=turn % 2 == 0)
    return samples


def _turn(
    workload: Workload,
    arms: Sequence[Arm],
    clients: Mapping[str, Client],
    attach: Callable[[bool], None],
    samples: Samples,
    rng: random.Random,
    *,
    first_attached: bool,
) -> None:
    for attached in (first_attached, not first_attached):
        chosen = [arm for arm in arms if arm.attached == attached]
        attach(attached)
        for arm in rng.sample(chosen, len(chosen)):
            samples.setdefault((workload.name, arm.name), []).append(clients[arm.name].batch())
