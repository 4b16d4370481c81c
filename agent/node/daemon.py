"""The agent's main loop: waits for cgroups, names, policies and time, and lets the reconciler do what follows.

One thread looks and writes; others ask the CRI, read events, answer scrapes and the socket. The loop goes on whatever
fails: a failure is a sentence in the published state until it is over, and rules that are in force stay in force.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import PurePosixPath

from agent.cgroups import roots
from agent.cgroups.classid import require_cgroup_of_sockets
from agent.cgroups.watch import Changes, Watch
from agent.errors import WeirError
from agent.events import Pump
from agent.kernel.keep import Keeper
from agent.kernel.load import load
from agent.kernel.pinned import PinnedKernel
from agent.lines import Lines
from agent.metrics import Collector, Sources, registry
from agent.node import memory, profiles
from agent.node.compiling import Loaded
from agent.node.door import Door
from agent.node.http import Server
from agent.node.log import log
from agent.node.naming import Naming
from agent.node.policies import Directory
from agent.node.reconcile import Reconciler
from agent.node.settings import Settings
from agent.node.state import NodeState, PolicyState, Published, Reloads
from agent.place import Place
from agent.status import gather

TICK = 1.0
"""Seconds between looks at the policy directory and the pins, which send no notification."""

BUSY = 0.1
"""Seconds between them while new policies are being compiled."""

REWATCH = 10
"""Full looks after which every cgroup is watched anew, whether the watch knows that it lacks any or not."""

GATHER = 0.02
"""Seconds: births that come together are looked at together."""


class Agent:
    """One node. ``run`` returns when a signal ends it."""

    def __init__(self, place: Place, settings: Settings) -> None:
        self._place = place
        self._settings = settings
        self._published = Published()
        self._kernel = PinnedKernel(place.pins)
        self._keeper = Keeper(place.pins)
        self._directory = Directory(settings.policies, settings.default, seccomp_base=settings.seccomp_base)
        self._beat = time.monotonic()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._naming = Naming(settings.cri, settings.reconcile, self._ring)
        self._reconciler = Reconciler(place, self._kernel, settings.roots, settings.retain, self._naming)
        self._watch = Watch(place.root, self._is_worth_watching)
        self._troubles: dict[str, str] = {}
        self._written: Mapping[str, Loaded] = {}
        self._told = Reloads()
        self._pump: Pump | None = None
        self._looks = 0
        self._stopping = False

    def _is_worth_watching(self, path: PurePosixPath) -> bool:
        return roots.is_worth_watching(path, self._settings.roots)

    def _ring(self) -> None:
        """Wake the loop, from any thread or signal handler."""
        try:
            os.write(self._wake, b".")
        except BlockingIOError:
            return  # the pipe is full of wakes

    def run(self) -> None:
        """Put the node under its policies and keep it there, until SIGTERM or SIGINT.

        Raises WeirError when it cannot begin: no cgroup2, no BPF, no default policy, a port in use.
        """
        memory.share()
        require_cgroup_of_sockets()
        self._directory.read()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        with ExitStack() as stack:
            stack.callback(self._directory.close)
            door = self._open_door(stack)  # first: it refuses a second agent
            self._load()
            self._naming.start()
            stack.callback(self._naming.stop)
            self._reconciler.adopt()
            self._watch.add_tree(PurePosixPath())
            self._look(full=True)  # before it listens: its own container may be under a policy that refuses that
            self._pump = self._serve(stack, door)
            log.info("started", default=self._settings.default, policies=len(self._directory.loaded))
            self._loop()
        log.info("stopped", rules="removed" if self._settings.unload_on_exit else "stay in force")

    def _stop(self, *_: object) -> None:
        self._stopping = True
        self._ring()

    def _load(self) -> None:
        with self._place.locked():
            if load(self._place.pins, self._settings.max_containers):
                log.info("programs loaded", pins=str(self._place.pins.root))
        self._keeper.hold()

    def _open_door(self, stack: ExitStack) -> Door:
        kernel = PinnedKernel(self._place.pins)
        door = Door(self._settings.socket, lambda: gather(self._place, kernel, self._published.state))
        door.start()
        stack.callback(door.stop)
        return door

    def _serve(self, stack: ExitStack, door: Door) -> Pump:
        """Start what answers others; each reads the kernel's tables by descriptors of its own."""
        settings, published = self._settings, self._published

        def state() -> NodeState:
            return published.state

        lines = Lines(sys.stdout.fileno()) if settings.events and sys.stdout else None
        pump = Pump(PinnedKernel(self._place.pins), self._place, [door.publish], lines, state)
        pump.start()
        stack.callback(pump.stop)
        if settings.listen:
            kernel = PinnedKernel(self._place.pins)
            sources = Sources(
                state,
                kernel.read,
                kernel.max_capacity,
                kernel.attached,
                kernel.build,
                lambda: pump.counted.reported,
                lambda: pump.counted.suppressed,
            )
            collector = Collector(sources, lambda error: log.warning("a scrape failed", error=str(error)))
            server = Server(
                settings.listen, registry(collector), published, lambda: time.monotonic() - self._beat, settings.tls
            )
            server.start()
            stack.callback(server.stop)
            log.info("listening", address=settings.listen, port=server.port)
        return pump

    def _loop(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._watch, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            due, anew = 0.0, True
            while not self._stopping:
                self._beat = time.monotonic()
                full = self._beat >= due
                if full:
                    due = self._beat + self._settings.reconcile
                if anew or full:
                    self._look(full=full)
                ready = selector.select(BUSY if self._directory.busy else TICK)
                if any(key.fileobj is self._watch for key, _ in ready):
                    time.sleep(GATHER)
                anew = self._news()
        if self._settings.unload_on_exit:
            self._unload()

    def _news(self) -> bool:
        """Whether anything asks for a look."""
        woken = False
        while _read(self._woken):
            woken = True
        changes = Changes(overflowed=True)
        with self._noting("watch"):
            changes = self._watch.read(0)
        self._reconciler.follow(replace(changes, overflowed=changes.overflowed or bool(self._watch.limited)))
        born = changes.overflowed or any(
            roots.root_of(path, self._settings.roots) for path in (*changes.created, *changes.removed, *changes.passed)
        )
        with self._noting("policies"):
            if self._directory.refresh():
                log.info("policies changed", policies=", ".join(self._directory.loaded))
                born = True
            if self._directory.reloads is not self._told:
                self._told, born = self._directory.reloads, True  # to be published, also when nothing else follows
                for file, problem in self._told.failures.items():
                    log.warning(f"policy file {file} is not used", problem=problem)  # equal messages are held back
        with self._noting("links"):
            born = born or self._keeper.is_orphaned or self._reconciler.is_detached
            born = born or self._reconciler.processes.look_at_young()
        return woken or born or bool(self._troubles)

    def _look(self, *, full: bool) -> None:
        with self._noting("kernel"):
            self._keep()
            if full:
                self._looks += 1
                if self._watch.limited or self._looks % REWATCH == 0:
                    self._watch.retry()
            failed = bool(self._directory.reloads.failures)
            self._reconciler.look(self._directory.loaded, self._settings.default, full=full, incomplete=failed)
            self._naming.miss()
            self._keeper.hold()
        with self._noting("profiles"):
            self._write_profiles()
        with self._noting("state"):
            self._publish()
        if full:
            memory.trim()

    def _keep(self) -> None:
        """Notice that the pins are gone, and put them back, or load anew."""
        if self._keeper.is_orphaned:
            with self._place.locked():
                self._keeper.pin_again()
            log.warning("the pins were gone and are back; the rules were in force all the time")
        if not self._kernel.is_loaded():
            self._load()

    def _write_profiles(self) -> None:
        if not self._settings.seccomp:
            return
        loaded = self._directory.loaded
        if loaded is not self._written:
            texts = {name: one.profile for name, one in loaded.items()}
            for name in profiles.write(
                self._settings.seccomp, {n: json.loads(text) for n, text in texts.items() if text}
            ):
                log.info("seccomp profile written", policy=name)
            self._written = loaded
            if not all(texts.values()):
                without = ", ".join(name for name, text in texts.items() if not text)
                raise WeirError(
                    f"There is no seccomp profile for {without}.", "See: weir seccomp-profile --policy NAME"
                )

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """Keep the sentence of a failure until the same works again; say it once in the log."""
        try:
            yield
        except WeirError as e:
            if self._troubles.get(what) != e.message:
                log.error("not done", what=what, reason=str(e))
            self._troubles[what] = e.message
        except Exception as e:  # noqa: BLE001 - enforcement goes on without the loop, but nothing new would be found
            log.bug("not done: this is a bug in weir", what=what)
            self._troubles[what] = f"A bug in weir: {e!r}"
        else:
            if self._troubles.pop(what, None):
                log.info("works again", what=what)

    def _publish(self) -> None:
        troubles = [*self._troubles.values(), *self._reconciler.troubles]
        if self._pump and self._pump.problem:
            troubles.append(f"No events are read: {self._pump.problem}.")
        if self._watch.limited:
            log.warning("the watch is limited", reason=self._watch.limited)
        try:
            # Without pins nobody can tell what is attached; it is all held, and stays as it was.
            rows = self._published.state.rows if self._keeper.is_orphaned else self._reconciler.rows()
        except WeirError as e:
            rows, troubles = self._published.state.rows, [*troubles, e.message]
        uncovered = [row.cgroup for row in rows if row.gone is None and not row.layers.get("hooks")]
        if uncovered:
            troubles.append(f"{len(uncovered)} cgroups are not covered, {uncovered[0]} among them.")
        self._published.state = NodeState(
            rows=rows,
            policies=self._policies(),
            reloads=self._directory.reloads,
            roots=tuple(f"/{root}" for root in self._reconciler.roots),
            default=self._settings.default,
            cri=self._naming.problem,
            not_ready=tuple(dict.fromkeys(troubles)),
        )

    def _policies(self) -> tuple[PolicyState, ...]:
        return tuple(loaded.state for loaded in self._directory.loaded.values())

    def _unload(self) -> None:
        """Set everything free, as `weir unload --force` does."""
        self._keeper.close()
        with self._place.locked(), self._place.pins.loading():
            self._place.pins.remove()


def _read(fd: int) -> bytes:
    """What waits in a non-blocking pipe; empty when nothing does."""
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""
