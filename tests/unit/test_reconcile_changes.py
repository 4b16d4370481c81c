"""An agent that is told what changes knows what one that looks at everything finds: random lives of a small node.

Directories stand for cgroups, inotify is real. Cgroups come, go and are replaced; sockets are made in them; names and
policies change; looks are taken before the news are read, news are lost, and the kernel refuses writes. Whenever all is
read, an agent that has seen nothing of it finds nothing to do, and shows the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from copy import deepcopy
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

import pytest

from agent.cgroups import roots
from agent.cgroups.watch import Changes, Watch
from agent.errors import WeirError
from agent.kernel.pins import Pins
from agent.node.compiling import Loaded
from agent.node.members import Names
from agent.node.reconcile import Reconciler
from agent.node.state import Row
from agent.policy.model import Action, Selector
from tests.fake_kernel import FakeKernel
from tests.unit.test_reconcile import UID, Cri, Unlocked, loaded

LIVES = 80
STEPS = 80

POD = f"kubepods/pod{UID}"
A, B = f"{POD}/{'a' * 64}", f"{POD}/{'b' * 64}"
SERVICE = "tenants/a.slice/one.service"
PLACES = ("kubepods", POD, A, f"{A}/inner", B, f"{B}/inner", "tenants", SERVICE, f"{SERVICE}/inner", "tenants/two")
PATTERNS = roots.parse(["kubepods", "tenants"])

_base, _loose = loaded("base"), loaded("base", Action.ALLOW)
_shop = loaded("shop", selector=Selector(namespaces=("shop",)))
_front = loaded("front", selector=Selector(containers=("front",)))
POLICIES: tuple[Mapping[str, Loaded], ...] = (
    {"base": _base, "shop": _shop, "front": _front},
    {"base": _base, "front": _front, "shop": _shop},  # the order alone decides between two that both match
    {"base": _loose, "shop": _shop},
    {"base": _base},
)

KINDS = {"live": 25, "remove": 8, "replace": 8, "name": 6, "write": 10, "read": 12, "lose": 2, "look": 22, "settle": 6}


class Life:
    """A node and its agent. The methods named in KINDS are what can happen."""

    def __init__(self, folder: Path, random: Random, stack: ExitStack) -> None:
        self.tree = folder / "tree"
        self.tree.mkdir()
        self.random, self.stack = random, stack
        self.place = Unlocked(Pins(folder / "pins"), self.tree, self.tree / "weir")
        self.kernel, self.cri = FakeKernel(capacity=64), Cri()
        self.watch = stack.enter_context(
            closing(Watch(self.tree, lambda path: roots.is_worth_watching(path, PATTERNS)))
        )
        self.watch.add_tree(PurePosixPath())
        self.agent = Reconciler(self.place, self.kernel, PATTERNS, 1000.0, self.cri)
        self.policies, self.incomplete = POLICIES[0], False
        self.taken: list[Any] = []

    def step(self) -> None:
        """Let something happen."""
        (what,) = self.random.choices([*KINDS], [*KINDS.values()])
        self.taken.append(what)
        getattr(self, what)()

    def note(self, *how: Any) -> None:
        """For whoever has to find out what was wrong."""
        self.taken.append(how)

    def live(self) -> None:
        """A cgroup is there, and may make its first socket."""
        path = self.random.choice(PLACES)
        (self.tree / path).mkdir(parents=True, exist_ok=True)
        number, *above = [self.number(one) for one in (Path(path), *Path(path).parents)]
        nearest = next((one for one in above if one in self.kernel.entries), None)
        wants = self.random.random() < 0.5
        if wants and nearest and number not in self.kernel.entries:
            self.kernel.born(number, nearest)
        self.note(path, wants)

    def remove(self) -> str:
        """A cgroup ends, with all below it. While they are open, no other gets their numbers, as no cgroup ever does."""
        path = self.random.choice([path for path in PLACES if (self.tree / path).exists()] or PLACES)
        for directory, _, _ in [*os.walk(self.tree / path, topdown=False)]:
            fd = os.open(directory, os.O_RDONLY)
            self.stack.callback(os.close, fd)
            os.rmdir(directory)
            self.kernel.gone.add(os.fstat(fd).st_ino)
        self.note(path)
        return path

    def replace(self) -> None:
        """Another one of the same name."""
        (self.tree / self.remove()).mkdir(parents=True)

    def name(self) -> None:
        """The CRI knows a container or the pod, or not any more."""
        known, what, names = self.random.choice(
            [
                (self.cri.pods, UID, Names("shop", "web", None, {}, {})),
                (self.cri.containers, "a" * 64, Names("shop", "web", "front", {}, {})),
                (self.cri.containers, "b" * 64, Names("shop", "web", "back", {}, {})),
            ]
        )
        if known.pop(what, None) is None:
            known[what] = names
        self.note(what)

    def write(self) -> None:
        """Other policies, or some of them wrong."""
        if self.random.random() < 0.4:
            self.incomplete = not self.incomplete
        else:
            self.policies = self.random.choice(POLICIES)
        self.note([*self.policies], self.incomplete)

    def read(self) -> None:
        """The news."""
        changes = self.watch.read(0)
        self.agent.follow(changes)
        self.note(changes)

    def lose(self) -> None:
        """Nothing of the news but that there were some."""
        self.watch.read(0)
        self.agent.follow(Changes(overflowed=True))

    def look(self) -> None:
        """One that may fail, because the kernel refuses everything from one of its steps on."""
        full, fails = self.random.random() < 0.2, self.random.random() < 0.2
        if fails:
            self.kernel.stop_at, self.kernel.stop_with = len(self.kernel.steps) + self.random.randrange(12), WeirError
        with suppress(WeirError) if fails else ExitStack():
            self.agent.look(self.policies, "base", full=full, incomplete=self.incomplete)
        self.kernel.stop_at = None
        self.note(full, fails)

    def settle(self) -> None:
        """All is read: what a stranger finds, and nothing for it to do."""
        self.read()
        self.agent.look(self.policies, "base", full=False, incomplete=self.incomplete)
        kernel = deepcopy(self.kernel)
        stranger = Reconciler(self.place, kernel, PATTERNS, 1000.0, self.cri)
        stranger.look(self.policies, "base", full=True, incomplete=self.incomplete)
        assert in_force(self.kernel) == in_force(kernel)
        assert self.shown(self.agent) == self.shown(stranger)
        ids = [number for row in self.agent.rows() for number in row.cgroup_ids]
        assert len(ids) == len({*ids}), "counted twice"
        assert {*ids} == self.kernel.entries.keys()

    def shown(self, agent: Reconciler) -> dict[str, tuple[Any, ...]]:
        """What is said of the living. That a cgroup in a container is gone is seen late: nothing hangs on it."""

        def facts(row: Row) -> tuple[Any, ...]:
            ids = {*row.cgroup_ids} - self.kernel.gone
            return ids, row.namespace, row.pod, row.container, row.id, row.policy, row.problem, row.layers

        return {row.cgroup: facts(row) for row in agent.rows() if row.gone is None}

    def number(self, path: Path) -> int:
        return (self.tree / path).stat().st_ino


def in_force(kernel: FakeKernel) -> dict[int, tuple[Any, ...]]:
    """By cgroup id."""
    names = {number: version.name for number, version in kernel.versions().items()}
    return {number: (names[entry.policy], entry.flags, entry.slot) for number, entry in kernel.entries.items()}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.mark.parametrize("seed", range(LIVES))
def test_what_is_told_comes_to_what_a_look_at_everything_finds(seed: int, tmp_path: Path, stack: ExitStack) -> None:
    life = Life(tmp_path, Random(seed), stack)
    life.look()
    for _ in range(STEPS):
        life.step()
    life.settle()
