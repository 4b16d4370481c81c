"""Names from the CRI, asked for in a thread of its own: a runtime that hangs holds up names, never enforcement."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent.cri.client import Client, CriUnavailable, Inventory, Named, PodInfo
from agent.node.log import log
from agent.node.members import Names

TIMEOUT = 10.0
"""Seconds that one question may take; a node of 1,000 containers answers in a fraction of one."""

SHORTEST = 0.1
LONGEST = 5.0
"""Seconds between questions while names are missing: at first short, since a sandbox's name decides the policy that its
containers start under; then longer each time."""


class Naming:
    """Asks when told to, and every so often. ``arrived`` is called, from the thread, when there is a new answer."""

    def __init__(self, path: Path | None, every: float, arrived: Callable[[], None]) -> None:
        self.problem = "" if path is None else "The CRI has not answered yet."
        self._every = every
        self._arrived = arrived
        self._inventory = Inventory({}, {})
        self._client = Client(path, TIMEOUT) if path else None
        self._missing = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._client,), name="cri", daemon=True)

    @property
    def is_up(self) -> bool:
        """Whether the last question was answered (or nobody is to be asked)."""
        return not self.problem

    def start(self) -> None:
        """Begin to ask."""
        if self._client:
            self._thread.start()

    def stop(self) -> None:
        """Ask no more; a question under way is left to itself."""
        self._stopping.set()
        self._missing.set()

    def miss(self) -> None:
        """Names are missing: ask soon."""
        self._missing.set()

    def container(self, container_id: str) -> Names | None:
        """The names of a container, None while they are not known."""
        found = self._inventory.named(container_id)
        return _container(found) if found else None

    def pod(self, pod_uid: str) -> Names | None:
        """The names of a pod."""
        found = self._inventory.pod_of_uid(pod_uid)
        return _pod(found) if found else None

    def _run(self, client: Client | None) -> None:
        pause = SHORTEST
        while client and not self._stopping.is_set():
            asked_for = self._missing.is_set()
            self._missing.clear()
            changed = self._ask(client)
            pause = SHORTEST if changed or not asked_for else min(2 * pause, LONGEST)
            self._stopping.wait(pause)
            self._missing.wait(self._every)

    def _ask(self, client: Client) -> bool:
        """Whether the answer differs from the last one."""
        began = time.monotonic()
        try:
            answer = client.inventory()
        except CriUnavailable as e:
            if not self.problem:
                log.warning("the CRI does not answer; enforcement goes on, names come later", reason=str(e))
            changed = self.problem != str(e)
            self.problem = str(e)
        else:
            changed = answer != self._inventory or bool(self.problem)
            self._inventory, self.problem = answer, ""
            log.debug("the CRI answered", containers=len(answer.containers), seconds=round(time.monotonic() - began, 3))
        if changed:
            self._arrived()
        return changed


def _container(found: Named) -> Names:
    return Names(found.namespace, found.pod, found.container, found.labels, found.annotations)


def _pod(found: PodInfo) -> Names:
    return Names(found.namespace, found.name, None, found.labels, found.annotations)
