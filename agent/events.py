"""Refusals and audits as they happen: one event in words, and the thread of the agent that passes them on.

The ring buffer has one consumer at a time. Whoever reads it holds ``sole_reader``: `weir events` on a host without an
agent, or the agent's ``Pump``. Nothing here decides or counts a refusal; the kernel has done both already.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from agent import names
from agent.errors import WeirError
from agent.kernel.seam import Event, Kernel, Version
from agent.lines import Lines
from agent.node.state import NodeState
from agent.place import Place
from agent.policy.model import format_address

PROTOCOLS = {6: "tcp", 17: "udp"}

WAIT = 1000
"""Milliseconds that one look at the ring waits: how late the Pump sees that it shall stop."""

RETRY = 1.0
"""Seconds until the Pump tries again to become the reader, or to read after an error."""

REST = 0.2
"""Seconds between two walks of the cgroup tree; the ring holds some 2,700 events meanwhile."""

Labels = Mapping[int, Mapping[str, str]]
"""Cgroup id → what the agent knows of it: ``cgroup``, and ``namespace``, ``pod``, ``container`` when they are known."""


@contextmanager
def sole_reader(maps: Path) -> Iterator[Callable[[], bool]]:
    """Be the one that reads the events of the pinned maps in a directory; the lock goes with the process.

    Yields a function that says whether the directory is still there: pins that were removed and made anew have another.

    Raises WeirError when another process is, or nothing is loaded.
    """
    try:
        fd = os.open(maps, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise WeirError(f"cannot look into {maps}: {e.strerror}", "Load weir first, as root: weir load") from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lambda: _is_at(fd, maps)
    except BlockingIOError as e:
        raise WeirError("another process reads the events already", "Only one can: stop the other first.") from e
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def labels(state: NodeState) -> Labels:
    """What a state of the node says of each cgroup."""
    found: dict[int, Mapping[str, str]] = {}
    for row in state.rows:
        named = {"cgroup": row.cgroup, "namespace": row.namespace, "pod": row.pod, "container": row.container}
        present = {key: value for key, value in named.items() if value}
        found.update(dict.fromkeys(row.cgroup_ids, present))
    return found


def as_data(
    event: Event,
    paths: Mapping[int, Path],
    versions: Mapping[int, Version],
    root: Path,
    known: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One event for machines. ``known`` is the entry of its cgroup in ``Labels``."""
    known = known or {}
    return {
        "time": wall_clock(event.time).isoformat(timespec="milliseconds"),
        "action": "audited" if event.refused.audited else "refused",
        "cgroup": known.get("cgroup") or names.cgroup_name(paths.get(event.cgroup), root, event.cgroup),
        "cgroup_id": event.cgroup,
        **{key: known[key] for key in names.WHO if key in known},
        "pid": event.pid or None,
        "comm": event.comm or None,
        **names.described(event.refused, versions),
        "protocol": PROTOCOLS.get(event.protocol, str(event.protocol)),
        "address": format_address(event.address) if event.address else None,
        "port": event.port or None,
    }


def wall_clock(monotonic: int) -> datetime:
    """A time of CLOCK_MONOTONIC (ns) on the calendar."""
    ago = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - monotonic
    return datetime.fromtimestamp((time.time_ns() - ago) / 1e9, timezone.utc)


def as_text(data: Mapping[str, Any]) -> str:
    """One event for people."""
    who = f"{data['comm']}[{data['pid']}]" if data["pid"] else "packet"
    where = f" {data['address']} port {data['port']}" if data["address"] else ""
    rule = f"{data['policy']}/{data['rule']}" + (f" (line {data['line']})" if data["line"] else "")
    named = names.who(data)
    return (
        f"{data['time']} {data['action']} {data['hook']} {data['protocol']}{where} by {rule}: {who} in {data['cgroup']}"
        + (f" ({named})" if named else "")
    )


class Describer:
    """Puts events into words. The tree is walked only for a cgroup that neither the state nor an earlier walk knows."""

    def __init__(self, kernel: Kernel, place: Place, state: Callable[[], NodeState] = NodeState) -> None:
        self._kernel = kernel
        self._place = place
        self._state = state
        self._seen = NodeState()
        self._labels: Labels = {}
        self._paths: Mapping[int, Path] = {}
        self._gone: frozenset[int] = frozenset()

    def describe(self, batch: Sequence[Event]) -> tuple[list[dict[str, Any]], bool]:
        """The events for machines, and whether the cgroup tree was walked for them."""
        state = self._state()
        if state is not self._seen:
            self._seen, self._labels = state, labels(state)
        unknown = {event.cgroup for event in batch} - self._labels.keys() - self._paths.keys() - self._gone
        if unknown:
            self._paths = self._place.living()
            self._gone = frozenset(unknown - self._paths.keys())  # an id is never used again
        versions, root = self._kernel.versions(), self._place.root
        told = [as_data(event, self._paths, versions, root, self._labels.get(event.cgroup)) for event in batch]
        return told, bool(unknown)


@dataclass(frozen=True)
class Counted:
    """Events that came to the Pump: reported, or over the limit of standard output (or found it closed or blocked)."""

    reported: int = 0
    suppressed: int = 0


class Pump:
    """A thread that reads the ring, and gives each event to ``subscribers`` (which must not block) and to ``lines``.

    ``lines`` None means nothing on standard output; ``state`` gives the newest NodeState. When another process reads
    the events it waits for its turn, and ``problem`` says so.
    """

    def __init__(
        self,
        kernel: Kernel,
        place: Place,
        subscribers: Sequence[Callable[[Mapping[str, Any]], None]] = (),
        lines: Lines | None = None,
        state: Callable[[], NodeState] = NodeState,
    ) -> None:
        self._kernel = kernel
        self._maps = place.pins.maps
        self._describer = Describer(kernel, place, state)
        self._subscribers = subscribers
        self._lines = lines
        self._told = 0
        self._problem = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    @property
    def problem(self) -> str:
        """Why no events come, in a sentence; empty while all is well."""
        ended = self._thread.ident is not None and not self._thread.is_alive() and not self._end.is_set()
        return "the thread that reads the events has ended: this is a bug in weir" if ended else self._problem

    @property
    def counted(self) -> Counted:
        """Totals since the start. What waits to be written is in neither number yet."""
        return Counted(self._lines.written, self._lines.suppressed) if self._lines else Counted(self._told)

    def start(self) -> None:
        """Start reading."""
        if self._lines:
            self._lines.start()
        self._thread.start()

    def stop(self) -> None:
        """Stop reading; what the ring holds waits there for the next reader."""
        self._end.set()
        self._thread.join()
        if self._lines:
            self._lines.stop()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                with sole_reader(self._maps) as is_current:
                    self._problem = ""
                    while not self._end.is_set() and is_current():
                        self._turn()
            except WeirError as e:
                self._problem = e.message
                self._end.wait(RETRY)

    def _turn(self) -> None:
        batch = self._kernel.events(WAIT)
        told, walked = self._describer.describe(batch) if batch else ([], False)
        for data in told:
            for subscriber in self._subscribers:
                subscriber(data)
            if self._lines:
                self._lines.put(data)
        self._told += len(told)
        if self._lines:
            self._lines.tick()
        if walked:
            self._end.wait(REST)
