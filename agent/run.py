"""``weir run``: one command in a cgroup of its own, under the policy's tables and its seccomp filter.

The cgroup is enrolled before the process enters it and emptied before it is withdrawn, so the command never runs an
instruction outside its policy. Killed at any step, weir leaves a cgroup under its policy or no process in it; the next
run removes what is empty (`remove_leftovers`).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.cgroups import tree
from agent.cgroups.classid import require_cgroup_of_sockets
from agent.cgroups.sockets import sending
from agent.controller import Compiled, Controller
from agent.errors import WeirError
from agent.kernel.abi import Flag
from agent.kernel.load import load
from agent.kernel.pinned import PinnedKernel
from agent.kernel.pins import explained
from agent.kernel.seam import Counters, Kernel, Refused, Version
from agent.place import Place
from agent.processes import spawn
from agent.seccomp.child import Start

PREFIX = "run-"

FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals sent to weir that are meant for the command. Ctrl-C and Ctrl-\\ reach it from the terminal."""

PATIENCE = 5.0
"""Seconds. Sockets closed with data unsent go on sending without a process: so long weir waits for them. What is still
sending then keeps its policy and its place until a later run finds it done."""


@dataclass(frozen=True)
class Summary:
    """What one run did. ``status`` is the exit status, or minus the signal's number."""

    version: Version
    status: int
    seconds: float
    killed: int
    counters: Counters
    refusals: Mapping[Refused, int]
    unsettled: bool


def run(place: Place, policy: Compiled, start: Start) -> Summary:
    """Run a command to its end.

    Raises StartError when it could not be started, WeirError when its rules could not be put in force; then it has
    not run.
    """
    kernel = PinnedKernel(place.pins)
    try:
        with enrolled(place, kernel, policy) as (cgroup, controller, slot):
            began = time.monotonic()
            status = wait_for(start, lambda: join(cgroup))
            seconds = time.monotonic() - began
            killed = kill_all(cgroup)
            unsettled = not settle(cgroup)
            counters, refusals = controller.totals(slot)
        return Summary(policy.version, status, seconds, killed, counters, refusals, unsettled)
    finally:
        kernel.close()


@contextmanager
def enrolled(place: Place, kernel: PinnedKernel, policy: Compiled) -> Iterator[tuple[Path, Controller, int]]:
    """A fresh cgroup under the policy; gone again at the end."""
    controller = Controller(kernel, place.root)
    with place.locked():
        prepare(place, kernel, controller)
        cgroup = make_cgroup(place)
        try:
            slot = controller.enrol(cgroup, policy, Flag.BORN | Flag.RUN).slot
        except BaseException:
            cgroup.rmdir()
            raise
    try:
        yield cgroup, controller, slot
    finally:
        kill_all(cgroup)
        with place.locked():
            remove(cgroup, controller)


def prepare(place: Place, kernel: PinnedKernel, controller: Controller) -> None:
    """Load what is missing, make weir's slice, attach to it and close it off. Does nothing the second time."""
    require_cgroup_of_sockets()
    if not kernel.is_loaded():
        print("weir: loading the programs", file=sys.stderr, flush=True)
        load(place.pins)
    with explained(f"make the cgroup {place.slice}"):
        place.slice.mkdir(exist_ok=True)
    controller.manage(place.slice)
    controller.close_off(place.slice)
    remove_leftovers(place, kernel, controller)


def make_cgroup(place: Place) -> Path:
    """A cgroup whose name says which process made it, so that a later run knows when it is left over."""
    path = place.slice / f"{PREFIX}{os.getpid()}-{_started(os.getpid())}-{time.monotonic_ns():x}"
    with explained(f"make the cgroup {path}"):
        path.mkdir()
    return path


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), stat field 22); None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def remove_leftovers(place: Place, kernel: Kernel, controller: Controller) -> None:
    """Remove the cgroups of runs that were killed, once they hold no process. A process left in one stays under it."""
    for path in place.slice.glob(f"{PREFIX}*-*-*"):
        pid, started = path.name.removeprefix(PREFIX).split("-")[:2]
        if _started(int(pid)) != int(started) and not tree.processes(path):
            remove(path, controller)
    of_runs = [number for number, enrolment in kernel.enrolments().items() if enrolment.flags & Flag.RUN]
    gone = set(of_runs) - place.living().keys() if of_runs else set()
    for number in gone:
        if not sending([number]):
            controller.withdraw(number)


def remove(cgroup: Path, controller: Controller) -> None:
    """Remove a cgroup without processes and everything below it, then withdraw it; but not while it is sending."""
    number = tree.cgroup_id(cgroup)
    below = list(tree.descendants(cgroup))
    numbers = [number, *(tree.cgroup_id(path) for path in below)]
    for path in [*reversed(below), cgroup]:
        _remove_when_idle(path)
    if not sending(numbers):
        controller.withdraw(number)


def _remove_when_idle(cgroup: Path) -> None:
    """A killed process leaves its cgroup a moment after it is reaped: EBUSY until then."""
    for _ in range(200):
        try:
            return cgroup.rmdir()
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            time.sleep(0.01)
    raise WeirError(f"{cgroup} cannot be removed: it has processes", f"See which: cat {cgroup}/cgroup.procs")


def join(cgroup: Path) -> None:
    """Move the calling process into a cgroup."""
    with explained(f"enter the cgroup {cgroup}"):
        (cgroup / "cgroup.procs").write_text("0")


def wait_for(start: Start, enter: Callable[[], None]) -> int:
    """Run the command in a child; its exit status, or minus the number of the signal that ended it.

    While it runs, weir itself is ended by nothing but SIGKILL. Raises StartError when it could not be started.
    """
    child = 0
    early: list[int] = []  # came before the command's process id was known

    def forward(number: int, _frame: object) -> None:
        if not child:
            early.append(number)
            return
        with suppress(ProcessLookupError):
            os.kill(child, number)

    def leave_to_terminal(_number: int, _frame: object) -> None:
        """The command gets it too; a handler and not SIG_IGN, which the command would inherit."""

    handlers: dict[int, Any] = {
        **dict.fromkeys(FORWARDED, forward),
        signal.SIGINT: leave_to_terminal,
        signal.SIGQUIT: leave_to_terminal,
        signal.SIGCHLD: signal.SIG_DFL,  # a caller may ignore it: then there is no exit status to wait for
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        child = spawn(start, enter)
        for number in early:
            forward(number, None)
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return os.waitstatus_to_exitcode(status)


def kill_all(cgroup: Path) -> int:
    """Kill what the command left behind in its cgroup; how many processes that was."""
    killed: set[int] = set()
    while pids := tree.processes(cgroup):
        killed.update(pids)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return len(killed)


def settle(cgroup: Path) -> bool:
    """Wait for the sockets that closed with data unsent; False when some were still sending after PATIENCE."""
    numbers = [tree.cgroup_id(path) for path in (cgroup, *tree.descendants(cgroup))]
    deadline = time.monotonic() + PATIENCE
    while sending(numbers):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
