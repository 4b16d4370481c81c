"""Names from the CRI, asked for in a thread of its own: a runtime that hangs holds up names, never enforcement."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
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

FEW = 16
"""So many missing names are asked for one by one; for more, everything is listed."""


Wanted = tuple[str, str]
"""Container or pod, and its id or uid."""

_CONTAINER, _POD = "container", "pod"


class Naming:
    """Asks when told to, and every so often. ``arrived`` is called, from the thread, when there is a new answer.

    ``problem`` is a sentence while nobody gives the names that are missing. ``paths``: where the CRI may listen; none at
    all when nobody is to be asked. Of several the first that there is, and that stays: an agent that starts before the
    runtime (a unit before the kubelet's) finds it when it comes.
    """

    def __init__(self, paths: Sequence[Path], every: float, arrived: Callable[[], None]) -> None:
        self._paths = paths
        self._client: Client | None = None
        self._choose()
        self.problem = "The CRI has not answered yet." if self._client else ""
        self._every = every
        self._arrived = arrived
        self._inventory = Inventory({}, {})
        self._unknown: set[Wanted] = set()
        self._missed: frozenset[Wanted] = frozenset()
        self._since = 0.0
        self._listed = -LONGEST
        self._missing = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cri", daemon=True)

    @property
    def answer(self) -> Inventory:
        """What the runtime said last: the same object until it says something else."""
        return self._inventory

    def start(self) -> None:
        """Begin to ask."""
        if self._paths:
            self._thread.start()

    def stop(self) -> None:
        """Ask no more; a question under way is left to itself."""
        self._stopping.set()
        self._missing.set()

    def miss(self) -> None:
        """A look at the node has ended: what it has not asked for is missed no more."""
        if not self._unknown <= self._missed:
            self._missing.set()
        self._missed, self._unknown = frozenset(self._unknown), set()

    def container(self, container_id: str) -> Names | None:
        """The names of a container, None while they are not known."""
        found = self._inventory.named(container_id)
        if found is None:
            self._seek((_CONTAINER, container_id))
        return _container(found) if found else None

    def pod(self, pod_uid: str) -> Names | None:
        """The names of a pod."""
        found = self._inventory.pod_of_uid(pod_uid)
        if found is None:
            self._seek((_POD, pod_uid))
        return _pod(found) if found else None

    def _seek(self, one: Wanted) -> None:
        """Ask at once when it was not missing in the last look: the rest of this one can wait, its containers do not."""
        if one not in self._missed and one not in self._unknown:
            self._since = time.monotonic()
            self._missing.set()
        self._unknown.add(one)

    def _choose(self) -> None:
        found = self._paths if len(self._paths) == 1 else [path for path in self._paths if path.exists()]
        self._client = Client(found[0], TIMEOUT) if found else None

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._missing.clear()
            if self._client is None:
                self._choose()
            if self._client:
                self._ask(self._client)
            elif self._missing_now() and not self.problem:
                self.problem = f"There is no container runtime's socket yet: {', '.join(map(str, self._paths))}."
                self._arrived()
            self._stopping.wait(SHORTEST)
            self._missing.wait(self._pause() - SHORTEST)

    def _pause(self) -> float:
        if not self._missing_now():
            return self._every if self.problem else max(self._listed + self._every - time.monotonic(), SHORTEST)
        return min(max((time.monotonic() - self._since) / SHARE, SHORTEST), LONGEST)

    def _missing_now(self) -> list[Wanted]:
        """What a look has asked for and no answer has had."""
        known = self._inventory
        return [
            (kind, one)
            for kind, one in self._missed | frozenset(self._unknown)
            if not (known.named(one) if kind == _CONTAINER else known.pod_of_uid(one))
        ]

    def _ask(self, client: Client) -> None:
        began, missing = time.monotonic(), self._missing_now()
        due = self._listed + (LONGEST if missing else self._every)
        try:
            if self.problem or began >= due or len(missing) > FEW:
                answer = client.inventory()
                self._listed = began
                memory.trim()
            else:
                containers = [one for kind, one in missing if kind == _CONTAINER]
                pods = [one for kind, one in missing if kind == _POD]
                answer = self._inventory.with_more(client.some(containers, pods))
        except CriUnavailable as e:
            if not self.problem:
                log.warning("the CRI does not answer; enforcement goes on, names come later", reason=str(e))
            changed = self.problem != str(e)
            self.problem = str(e)
        except Exception as e:  # noqa: BLE001 - without the thread no container would ever have a name again
            log.bug("the CRI was not asked: this is a bug in weir")
            changed, self.problem = True, f"A bug in weir: {e!r}"
        else:
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
