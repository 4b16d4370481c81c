"""A place of its own for weir's programs, and boxes: cgroups there, in which processes attempt things.

    with cage() as place:                      # programs loaded, attached to a cgroup of this process's own
        with place.box(world) as box:          # a cgroup below it, not yet enrolled
            box.enrol(policy)
            box.run(lambda: socket.create_connection(("10.1.2.3", 80)))    # in the box, in the World's client namespace
            box.refusals()

What runs in a box is a function, in a forked child that has joined the cgroup first: all its sockets are the box's, and
what it returns or raises comes back over a pipe.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from agent.cgroups import tree
from agent.controller import Controller, compiled
from agent.kernel.abi import Flag, Hook, Reason
from agent.kernel.load import load
from agent.kernel.pinned import PinnedKernel
from agent.kernel.pins import Pins
from agent.kernel.seam import Counters
from agent.place import Place
from agent.policy.model import Policy
from tests.world import World

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds that a job may take: some make thousands of attempts, and under emulation all is fifty times slower."""

NOTHING = Flag(0)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Refusal(NamedTuple):
    """A kind of refusal, as the kernel counts them; ``rule`` is an index, None for the default or for no rule."""

    hook: Hook
    reason: Reason
    rule: int | None = None


class Elsewhere(Exception):
    """Stands in a traceback for the part of it that was in a job's process."""

    def __str__(self) -> str:
        return f"in the box:\n{self.args[0]}"


class Link:
    """One end of the pipe between a test and its job."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, value: object = None) -> None:
        """Send a value that can be pickled."""
        self._connection.send((value, None))

    def fail(self, error: BaseException) -> None:
        """Send an exception, to be raised at the other end."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self._connection.send((error, text))

    def receive(self) -> Any:
        """The next value; raises what the other end failed with, TimeoutError after PATIENCE."""
        if not self._connection.poll(PATIENCE):
            raise TimeoutError(f"nothing came from the job in {PATIENCE} s")
        value, text = self._connection.recv()
        if text is not None:
            raise value from Elsewhere(text)
        return value

    def close(self) -> None:
        self._connection.close()


@contextmanager
def fork(job: Callable[[Link], object], enter: Callable[[], None]) -> Iterator[Link]:
    """Run a job in a child that has called ``enter``; what it returns is the last thing on the link. Killed at the end."""
    ours, theirs = (Link(end) for end in Pipe())
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            enter()
            theirs.send(job(theirs))
        except BaseException as error:  # noqa: BLE001 (it goes to the other process)
            theirs.fail(error)
        finally:
            os._exit(0)
    theirs.close()
    try:
        yield ours
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()


@dataclass(frozen=True)
class Box:
    """One cgroup. Its jobs run in the World's client namespace, when there is a World."""

    path: Path
    cage: Cage
    world: World | None

    @property
    def id(self) -> int:
        """The cgroup's id."""
        return tree.cgroup_id(self.path)

    def enrol(self, policy: Policy, how: Flag = NOTHING) -> None:
        """Put the box under a policy, or switch it to another. ``how``: Flag.BORN when it has had no process yet."""
        self.cage.controller.enrol(self.path, compiled(policy), how)

    def withdraw(self) -> None:
        """Take the box from under its policy."""
        self.cage.controller.withdraw(self.id)

    def run(self, job: Callable[[], T]) -> T:
        """Run a job in the box; what it returns. Raises what it raises."""
        with self.start(lambda _: job()) as link:
            result: T = link.receive()
            return result

    def errno(self, job: Callable[[], object]) -> int:
        """Run a job in the box; 0, or the errno of the OSError that it raised."""
        return self.run(lambda: errno_of(job))

    def start(self, job: Callable[[Link], object]) -> Any:
        """Run a job in the box beside the test, as a context manager that gives the link to it."""
        inside = self.world.client() if self.world else nullcontext()

        def enter() -> None:
            self.join()
            inside.__enter__()  # never left: the job may have given up the right to go back

        return fork(job, enter)

    def join(self) -> None:
        """Move the calling process into the box."""
        (self.path / "cgroup.procs").write_text("0")

    @contextmanager
    def child(self) -> Iterator[Box]:
        """A cgroup inside the box."""
        with _made(self.path / f"child-{secrets.token_hex(3)}", self.cage) as path:
            yield Box(path, self.cage, self.world)

    @property
    def slot(self) -> int:
        """The index of the box's counters; it must be enrolled."""
        return self.cage.kernel.enrolments()[self.id].slot

    def counters(self) -> Counters:
        """Bytes, packets and sockets since the box was enrolled."""
        return self.cage.kernel.counters(self.slot)

    def refusals(self) -> Counter[Refusal]:
        """Refusals since the box was enrolled, under all its policies; audited ones are not among them."""
        return self._refusals(audited=False)

    def audited(self) -> Counter[Refusal]:
        """What an audited policy would have refused."""
        return self._refusals(audited=True)

    def _refusals(self, audited: bool) -> Counter[Refusal]:
        found: Counter[Refusal] = Counter()
        for key, count in self.cage.controller.totals(self.slot)[1].items():
            if key.audited == audited:
                found[Refusal(key.hook, key.reason, key.rule)] += count
        return found

    def forget(self) -> None:
        """Let every counter of the box start from zero."""
        self.cage.kernel.clear([self.slot])


@dataclass(frozen=True)
class Cage:
    """The programs, loaded and attached to the slice of a place of their own."""

    place: Place
    kernel: PinnedKernel
    controller: Controller

    @contextmanager
    def box(self, world: World | None = None) -> Iterator[Box]:
        """A new cgroup in the slice, not enrolled; withdrawn and removed at the end."""
        with _made(self.place.slice / f"box-{secrets.token_hex(3)}", self) as path:
            yield Box(path, self, world)

    def errno(self, wanted: int) -> int:
        """What a refused call answers: the wanted errno, or EPERM on a kernel that lets programs choose none."""
        build = self.kernel.build()
        return wanted if build and build.has_retval else errno.EPERM


@contextmanager
def cage() -> Iterator[Cage]:
    """Load the programs at a place of this process's own, and remove them and every cgroup at the end."""
    name = f"weir-test-{os.getpid()}-{secrets.token_hex(2)}"
    root = tree.mount()
    place = Place(Pins(Path("/sys/fs/bpf") / name), root, root / name)
    with ExitStack() as stack:
        place.pins.make()
        stack.callback(place.pins.remove)
        load(place.pins)
        kernel = PinnedKernel(place.pins)
        stack.callback(kernel.close)
        controller = Controller(kernel, place.root)
        place.slice.mkdir()
        stack.callback(remove_cgroup, place.slice)
        controller.manage(place.slice)
        yield Cage(place, kernel, controller)


@contextmanager
def _made(path: Path, owner: Cage) -> Iterator[Path]:
    path.mkdir()
    number = tree.cgroup_id(path)
    try:
        yield path
    finally:
        if path.exists():
            remove_cgroup(path)
        if number in owner.kernel.enrolments():
            owner.controller.withdraw(number)


def remove_cgroup(path: Path) -> None:
    """Remove a cgroup. A killed process leaves it a moment after it is reaped: EBUSY until then."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return path.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def errno_of(job: Callable[[], object]) -> int:
    """Call a function; 0, or the errno of the OSError that it raised, ETIMEDOUT for a socket's own time limit."""
    try:
        job()
    except OSError as error:
        if isinstance(error, TimeoutError):
            return errno.ETIMEDOUT
        if error.errno is None:
            raise
        return error.errno
    return 0
