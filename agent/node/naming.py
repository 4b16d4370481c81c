"""Names from the CRI, asked for in a thread of its own: a runtime that hangs holds up names, never enforcement."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent.cri.client import Client, CriUnavailable, Inventory, Named, PodInfo
from agent.node import memory
from agent.node.log import log
from agent.node.members import Names

TIMEOUT = 10.0
"""Seconds that one question may take; a node of 1,000 containers answers in a fraction of one."""

SHORTEST = 0.02
LONGEST = 5.0
SHARE = 8
"""Seconds between questions while names are missing: an eighth of the time since the newest of them was missed first, within
these limits. A pod's cgroup is there before the runtime lists the pod, and what its containers start under depends on
the pod's annotations. Starting the first container takes about as long as starting the sandbox did, so the answer has to
come in a small part of that; what is missed for long, nobody may know."""


class Naming:
    """Asks when told to, and every so often. ``arrived`` is called, from the thread, when there is a new answer."""

    def __init__(self, path: Path | None, every: float, arrived: Callable[[], None]) -> None:
        self.problem = "" if path is None else "The CRI has not answered yet."
        self._every = every
        self._arrived = arrived
        self._inventory = Inventory({}, {})
        self._client = Client(path, TIMEOUT) if path else None
        self._unknown: set[str] = set()
        self._missed: frozenset[str] = frozenset()
        self._since = 0.0
        self._missing = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._client,), name="cri", daemon=True)

    @property
    def is_up(self) -> bool:
        """Whether the last question was answered (or nobody is to be asked)."""
        return not self.problem

    @property
    def answer(self) -> Inventory:
        """What the runtime said last: the same object until it says something else."""
        return self._inventory

    def start(self) -> None:
        """Begin to ask."""
        if self._client:
            self._thread.start()

    def stop(self) -> None:
        """Ask no more; a question under way is left to itself."""
        self._stopping.set()
        self._missing.set()

    def miss(self) -> None:
        """A look at the node has ended in which names were missing."""
        if not self._unknown <= self._missed:
            self._missing.set()
        self._missed, self._unknown = frozenset(self._unknown), set()

    def container(self, container_id: str) -> Names | None:
        """The names of a container, None while they are not known."""
        found = self._inventory.named(container_id)
        if found is None:
            self._seek(container_id)
        return _container(found) if found else None

    def pod(self, pod_uid: str) -> Names | None:
        """The names of a pod."""
        found = self._inventory.pod_of_uid(pod_uid)
        if found is None:
            self._seek(pod_uid)
        return _pod(found) if found else None

    def _seek(self, one: str) -> None:
        """Ask at once when it was not missing in the last look: the rest of this one can wait, its containers do not."""
        if one not in self._missed and one not in self._unknown:
            self._since = time.monotonic()
            self._missing.set()
        self._unknown.add(one)

    def _run(self, client: Client | None) -> None:
        while client and not self._stopping.is_set():
            self._missing.clear()
            self._ask(client)
            self._stopping.wait(SHORTEST)
            self._missing.wait(self._pause() - SHORTEST)

    def _pause(self) -> float:
        known = self._inventory
        if all(known.named(one) or known.pod_of_uid(one) for one in self._missed):
            return self._every
        return min(max((time.monotonic() - self._since) / SHARE, SHORTEST), LONGEST)

    def _ask(self, client: Client) -> None:
        began = time.monotonic()
        try:
            answer = client.inventory()
        except CriUnavailable as e:
            if not self.problem:
                log.warning("the CRI does not answer; enforcement goes on, names come later", reason=str(e))
            changed = self.problem != str(e)
            self.problem = str(e)
        else:
            memory.trim()
            changed = bool(self.problem)
            if answer != self._inventory:
                self._inventory, changed = answer, True
            self.problem = ""
            log.debug("the CRI answered", containers=len(answer.containers), seconds=round(time.monotonic() - began, 3))
        if changed:
            self._arrived()


def _container(found: Named) -> Names:
    return Names(found.namespace, found.pod, found.container, found.labels, found.annotations)


def _pod(found: PodInfo) -> Names:
    return Names(found.namespace, found.name, None, found.labels, found.annotations)
