"""A node's reconciler against the kernel in memory, and directories that stand for cgroups."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import pytest

from agent.cgroups import roots
from agent.cgroups.watch import Changes
from agent.controller import compiled
from agent.errors import WeirError
from agent.kernel.abi import PROGRAMS, Flag
from agent.kernel.pins import Pins
from agent.kernel.seam import NOTHING
from agent.node import own
from agent.node.compiling import Loaded
from agent.node.members import Names
from agent.node.reconcile import Reconciler
from agent.node.state import PolicyState, Row
from agent.place import Place
from agent.policy.model import Action, Mode, Policy, Selector
from tests.fake_kernel import FakeKernel, Killed
from tests.policies import OPEN_SOCKETS

UID = "29349498-197c-4919-b13f-9a928e7d001b"
POD = f"kubepods/burstable/pod{UID}"
A, B = f"{POD}/{'a' * 64}", f"{POD}/{'b' * 64}"


def loaded(name: str, action: Action = Action.DENY, selector: Selector | None = None) -> Loaded:
    policy = Policy(name, Mode.ENFORCE, OPEN_SOCKETS, (), action, f"{name}.yaml", "0" * 64, "")
    return Loaded(compiled(policy), selector, PolicyState(name, f"{name}.yaml", "0" * 64, "enforce"))


POLICIES = {"base": loaded("base"), "shop": loaded("shop", selector=Selector(namespaces=("shop",)))}


class Unlocked(Place):
    """A place for one process: the lock is on a BPF file system, which needs root."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield


@dataclass
class Cri:
    """Who knows names."""

    containers: dict[str, Names] = field(default_factory=dict)
    pods: dict[str, Names] = field(default_factory=dict)

    @property
    def answer(self) -> object:
        return {**self.containers}, {**self.pods}

    def container(self, container_id: str) -> Names | None:
        return self.containers.get(container_id)

    def pod(self, pod_uid: str) -> Names | None:
        return self.pods.get(pod_uid)


@dataclass
class Node:
    """A tree of directories, a kernel, and an agent at a time."""

    path: Path
    kernel: FakeKernel = field(default_factory=lambda: FakeKernel(capacity=64))
    cri: Cri = field(default_factory=Cri)
    retain: float = 1000.0

    def __post_init__(self) -> None:
        (self.path / "tree").mkdir()
        self.restart()

    def restart(self) -> None:
        """Another agent takes over what the kernel holds."""
        place = Unlocked(Pins(self.path / "pins"), self.path / "tree", self.path / "tree/weir")
        patterns = roots.parse(["kubepods", "tenants"])
        self.agent = Reconciler(place, self.kernel, patterns, self.retain, self.cri)
        self.agent.adopt()

    def make(self, *paths: str) -> None:
        for path in paths:
            whole = [*reversed(PurePosixPath(path).parents), PurePosixPath(path)]
            fresh = tuple(one for one in whole if not (self.path / "tree" / one).exists())
            (self.path / "tree" / path).mkdir(parents=True, exist_ok=True)
            self.agent.follow(Changes(created=fresh))

    def remove(self, path: str) -> None:
        """As the kernel removes a cgroup, whose id is never used again: the directory goes elsewhere."""
        number = self.id(path)
        self.agent.follow(Changes(removed=(PurePosixPath(path),)))
        (self.path / "tree" / path).rename(self.path / secrets.token_hex(8))
        self.kernel.gone.add(number)

    def id(self, path: str) -> int:
        return (self.path / "tree" / path).stat().st_ino

    def look(self, policies: Mapping[str, Loaded] = POLICIES, default: str = "base", *, full: bool = True) -> None:
        self.agent.look(policies, default, full=full)

    def policy(self, path: str) -> str:
        """The name of the policy that the kernel has for a cgroup."""
        return self.kernel.versions()[self.kernel.entries[self.id(path)].policy].name

    def row(self, cgroup: str) -> Row:
        return next(row for row in self.agent.rows() if row.cgroup == f"/{cgroup}")

    def state(self) -> dict[int, tuple[str, Flag, bool]]:
        """What is in force: by cgroup id its policy and flags; and whether it counts in a slot of its own."""
        slots = [entry.slot for entry in self.kernel.entries.values()]
        versions = self.kernel.versions()
        return {
            number: (versions[entry.policy].name, entry.flags, slots.count(entry.slot) == 1)
            for number, entry in self.kernel.entries.items()
        }


@pytest.fixture
def node(tmp_path: Path) -> Node:
    made = Node(tmp_path)
    made.make("kubepods")
    return made


def test_no_managed_parent(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.look()
    assert node.agent.troubles == ("There is no managed parent yet: no cgroup matches kubepods, tenants.",)
    assert not node.kernel.entries
    node.make("tenants/one")
    node.look()
    assert not node.agent.troubles
    assert node.policy("tenants/one") == "base"


def test_what_is_enrolled_and_how(node: Node) -> None:
    node.make(A, f"{A}/init.scope", "tenants/one/inner")
    node.look()
    assert node.kernel.entries.keys() == {node.id(path) for path in ("kubepods", POD, A, "tenants", "tenants/one")}
    flags = {path: node.kernel.entries[node.id(path)].flags for path in ("kubepods", POD, A)}
    assert [bool(flags[path] & Flag.PARENT) for path in flags] == [True, True, False]
    assert not flags[A] & Flag.BORN, "it was there before its parent was managed"
    assert node.kernel.attached() == {node.id(path): frozenset(PROGRAMS) for path in ("kubepods", "tenants")}
    node.make(B)
    node.look()
    assert node.kernel.entries[node.id(B)].flags & Flag.BORN


def test_a_second_look_writes_nothing(node: Node) -> None:
    node.make(A, B, f"{A}/inner")
    node.look()
    node.kernel.born(node.id(f"{A}/inner"), node.id("kubepods"))
    node.look()
    steps = len(node.kernel.steps)
    for full in (True, False):
        node.look(full=full)
    assert node.kernel.steps[steps:] == []


def test_a_row_is_made_anew_only_when_it_says_something_else(node: Node) -> None:
    node.make(A, B)
    node.look()
    first = {row.cgroup: row for row in node.agent.rows()}
    node.make(f"{A}/inner")
    node.kernel.born(node.id(f"{A}/inner"), node.id(POD))
    node.look(full=False)
    again = {row.cgroup: row for row in node.agent.rows()}
    assert again.keys() == first.keys()
    assert [path for path, row in again.items() if row is not first[path]] == [f"/{A}"]
    node.kernel.links[node.id("kubepods")].discard("egress")
    assert not any(row.layers["hooks"] for row in node.agent.rows())


def test_a_name_that_comes_later_is_one_write(node: Node) -> None:
    node.make(A)
    node.look()
    before = node.kernel.entries[node.id(A)]
    node.cri.containers["a" * 64] = Names("shop", "web", "front", {}, {})
    node.cri.pods[UID] = Names("shop", "web", None, {}, {})
    steps = len(node.kernel.steps)
    node.look(full=False)
    assert (node.policy(A), node.policy(POD), node.policy("kubepods")) == ("shop", "shop", "base")
    after = node.kernel.entries[node.id(A)]
    assert after.slot == before.slot
    assert len([step for step in node.kernel.steps[steps:] if step.startswith("enrol")]) == 2
    assert not [step for step in node.kernel.steps[steps:] if step.startswith(("withdraw", "clear"))]


def test_policies_in_another_order_are_other_policies(node: Node) -> None:
    """The first selector that matches decides."""
    every = {name: loaded(name, selector=Selector(cgroups=("/tenants/*",))) for name in ("one", "two")}
    node.make("tenants/a")
    node.look({"base": POLICIES["base"], **every})
    assert node.policy("tenants/a") == "one"
    node.look({"base": POLICIES["base"], **dict(reversed(every.items()))}, full=False)
    assert node.policy("tenants/a") == "two"


def test_what_was_lost_goes_when_all_files_can_be_read(node: Node) -> None:
    node.make(A)
    node.cri.containers["a" * 64] = Names("shop", "web", "front", {}, {})
    node.look()
    without = {"base": POLICIES["base"]}
    for incomplete, policy in ((True, "shop"), (False, "base")):
        node.agent.look(without, "base", full=False, incomplete=incomplete)
        assert node.policy(A) == policy


def test_a_cgroup_of_a_container_that_is_not_known_yet(node: Node) -> None:
    """It made its first socket before the watch told of its container: from the next look on it is the container's."""
    node.make(POD)
    node.look()
    (node.path / "tree" / A / "inner").mkdir(parents=True)
    node.kernel.born(node.id(f"{A}/inner"), node.id(POD))
    node.cri.containers["a" * 64] = Names("shop", "web", "front", {}, {})
    node.look(full=False)
    assert node.policy(f"{A}/inner") == "base"
    node.agent.follow(Changes(created=(PurePosixPath(A),)))
    node.look(full=False)
    assert node.policy(f"{A}/inner") == node.policy(A) == "shop"


def test_a_successor_is_not_taken_for_a_part_of_who_had_its_name(tmp_path: Path) -> None:
    node, path = Node(tmp_path, retain=0.0), "tenants/one"
    node.make(path)
    node.look()
    (node.path / "tree" / path).rename(node.path / "before")
    (node.path / "tree" / path).mkdir()
    node.kernel.born(node.id(path), node.id("tenants"))
    entry = node.kernel.entries[node.id(path)]
    node.look(full=False)
    node.agent.follow(Changes(removed=(PurePosixPath(path),), created=(PurePosixPath(path),)))
    for _ in range(3):
        node.look(full=False)
        assert node.kernel.entries[node.id(path)] == entry


def test_a_changed_policy_is_switched_and_the_old_version_retired(node: Node) -> None:
    node.make(A)
    node.look()
    before = {number: entry.slot for number, entry in node.kernel.entries.items()}
    node.look({**POLICIES, "base": loaded("base", Action.ALLOW)})
    assert {number: entry.slot for number, entry in node.kernel.entries.items()} == before
    assert len(node.kernel.installed) == 1
    version, _ = next(iter(node.kernel.installed.values()))
    assert version.sha256 == loaded("base", Action.ALLOW).compiled.version.sha256


def test_a_cgroup_in_a_container_counts_with_it(node: Node) -> None:
    """It enrolled itself at its first socket, before or after its container was found."""
    node.make(A, f"{A}/inner/deeper")
    node.look()
    for path in (f"{A}/inner", f"{A}/inner/deeper", B):
        node.make(path)
        node.kernel.born(node.id(path), node.id(POD))
    node.make(f"{B}/inner")
    node.kernel.born(node.id(f"{B}/inner"), node.id(POD))
    node.look(full=False)
    entries = node.kernel.entries
    assert len({entries[node.id(path)].slot for path in (A, f"{A}/inner", f"{A}/inner/deeper")}) == 1
    assert entries[node.id(B)].slot == entries[node.id(f"{B}/inner")].slot != entries[node.id(A)].slot
    assert set(node.row(A).cgroup_ids) == {node.id(path) for path in (A, f"{A}/inner", f"{A}/inner/deeper")}
    assert [row.cgroup for row in node.agent.rows()].count(f"/{A}") == 1
    deeper = node.id(f"{A}/inner/deeper")
    node.remove(f"{A}/inner/deeper")
    node.look()
    assert deeper not in node.kernel.entries
    assert node.row(A).gone is None


def test_one_that_came_too_late_for_a_look_keeps_its_name_when_it_ends(node: Node) -> None:
    node.make("tenants/one")
    node.look()
    (node.path / "tree/tenants/late").mkdir()  # the watch has not told yet
    number = node.id("tenants/late")
    node.kernel.born(number, node.id("tenants"))
    node.look(full=False)
    assert node.row("tenants/late").cgroup_ids == (number,)
    (node.path / "tree/tenants/late").rmdir()
    node.look(full=False)
    assert node.row("tenants/late").gone is not None


def test_a_gone_container_stays_and_then_goes(node: Node) -> None:
    node.make(A, B)
    node.look()
    gone = node.id(A)
    node.remove(A)
    node.look(full=False)
    assert node.row(A).gone is not None
    assert gone in node.kernel.entries, "its counters are still read"
    assert node.row(B).gone is None
    node.retain = 0.0
    node.restart()
    for _ in range(3):
        node.look()
    assert gone not in node.kernel.entries
    assert f"/{A}" not in [row.cgroup for row in node.agent.rows()]
    assert node.id(B) in node.kernel.entries


def test_a_container_that_a_look_has_missed_is_there_again(tmp_path: Path) -> None:
    """It is not withdrawn when its time as one that is gone would be over."""
    node = Node(tmp_path, retain=0.0)
    node.make("tenants/one")
    node.look()
    entry = node.kernel.entries[node.id("tenants/one")]
    node.agent.follow(Changes(removed=(PurePosixPath("tenants/one"),)))
    node.look(full=False)
    for _ in range(3):
        node.look()
        assert node.kernel.entries[node.id("tenants/one")] == entry
    assert [row.gone for row in node.agent.rows()] == [None] * 2


def test_the_counts_of_a_service_that_is_started_again_never_fall(tmp_path: Path) -> None:
    node, path = Node(tmp_path, retain=0.0), "tenants/one.service"
    node.make(path)
    node.look()
    slot = node.kernel.entries[node.id(path)].slot
    node.kernel.counted[slot] = replace(NOTHING, sockets_created=5)
    for _ in range(3):
        node.remove(path)
        node.make(path)
        for full in (False, True, False):
            node.look(full=full)
            read, numbers = node.kernel.read(), {n for row in node.agent.rows() for n in row.cgroup_ids}
            slots = {read.enrolments[number].slot for number in numbers if number in read.enrolments}
            assert sum(read.counters[slot].sockets_created for slot in slots) == 5


def test_its_own_container_is_like_any_other_to_the_next_look(node: Node) -> None:
    node.make(A)
    (node.path / "tree" / A / "cgroup.procs").write_text(f"{os.getpid()}")
    node.look()
    first = node.row(A)
    assert first.policy == own.NAME
    for full in (False, True):
        node.look(full=full)
        assert node.row(A).policy == own.NAME
        assert node.row(A) is first or full  # its processes are counted anew


def test_a_name_after_the_end(node: Node) -> None:
    node.make(A)
    node.look()
    node.remove(A)
    node.look()
    assert node.row(A).container == ""
    node.cri.containers["a" * 64] = Names("shop", "web", "front", {}, {})
    node.look()
    assert (node.row(A).namespace, node.row(A).pod, node.row(A).container) == ("shop", "web", "front")


def test_another_agent_knows_who_is_gone(node: Node) -> None:
    node.make(A)
    node.cri.containers["a" * 64] = Names("shop", "web", "front", {}, {})
    node.look()
    node.remove(A)
    node.restart()
    node.look()
    row = node.row(A)
    assert (row.namespace, row.pod, row.container, row.id) == ("shop", "web", "front", "a" * 64)
    assert row.gone is not None


def test_more_cgroups_than_places(tmp_path: Path) -> None:
    """The others stay under their parent, and the agent says so; who is gone makes room."""
    node = Node(tmp_path, FakeKernel(capacity=6))
    node.make("tenants/old")
    node.look()
    node.remove("tenants/old")
    node.look()
    node.make(*(f"tenants/t{i}" for i in range(8)))
    node.look()
    assert f"{node.path / 'tree'}" not in " ".join(node.agent.troubles)
    assert [one for one in node.agent.troubles if "have no place of their own" in one]
    assert len(node.kernel.entries) == 5
    assert node.id("tenants") in node.kernel.entries
    for i in range(4):
        node.remove(f"tenants/t{i}")
    for _ in range(3):
        node.look()
    assert not node.agent.troubles
    assert all(node.id(f"tenants/t{i}") in node.kernel.entries for i in range(4, 8))


def test_programs_that_were_detached_are_attached_again(node: Node) -> None:
    node.make(A)
    node.look()
    node.kernel.links[node.id("kubepods")].discard("egress")
    assert not node.row(A).layers["hooks"]
    node.look(full=False)
    assert node.row(A).layers["hooks"]


def test_programs_attached_further_down_are_a_trouble_and_the_rest_goes_on(node: Node) -> None:
    node.make(POD, "tenants/one")
    node.kernel.attach(node.path / "tree" / POD)
    node.look()
    assert [one for one in node.agent.troubles if "attached below" in one]
    assert node.policy("tenants/one") == "base"
    assert not node.row(f"{POD}").layers["hooks"] or node.kernel.attached()


def test_a_policy_that_cannot_be_installed_is_a_trouble(node: Node) -> None:
    node.make(A)
    node.look()
    before = node.state()
    node.kernel.stop_at, node.kernel.stop_with = len(node.kernel.steps), WeirError
    node.look({**POLICIES, "base": loaded("base", Action.ALLOW)})
    assert [one for one in node.agent.troubles if "stopped before" in one]
    assert node.state() == before, "what was in force stays"
    node.kernel.stop_at = None
    node.look({**POLICIES, "base": loaded("base", Action.ALLOW)})
    assert not node.agent.troubles


def test_memory_is_for_the_living(tmp_path: Path) -> None:
    node = Node(tmp_path, retain=0.0)
    node.make("tenants/one")
    for i in range(50):
        node.make(f"tenants/t{i}")
        node.look()
        node.remove(f"tenants/t{i}")
    for _ in range(3):
        node.look()
    assert len(node.kernel.entries) == len(node.kernel.names) == 2
    for name, value in vars(node.agent).items():
        if isinstance(value, dict | set | list):
            assert len(value) <= 2, name


def begin(node: Node) -> None:
    """A container is there, another is gone, a third was born meanwhile; one has had its name, policies change."""
    node.make(A, "tenants/one", "tenants/two")
    node.look()
    node.kernel.born(node.id("tenants/two"), node.id("tenants"))
    node.make(f"{A}/inner", B)
    node.kernel.born(node.id(f"{A}/inner"), node.id(POD))
    node.kernel.born(node.id(B), node.id(POD))
    node.remove("tenants/one")
    node.cri.containers["a" * 64] = Names("shop", "web", "front", {}, {})


def test_killed_before_any_step(tmp_path: Path) -> None:
    """At every moment everything that was ruled is ruled; the next agent comes to the same end."""
    changed = {**POLICIES, "base": loaded("base", Action.ALLOW)}

    def run(path: Path) -> Node:
        path.mkdir()
        made = Node(path)
        begin(made)
        return made

    straight = run(tmp_path / "straight")
    first = len(straight.kernel.steps)
    straight.look(changed)
    wanted = by_path(straight)
    assert len(straight.kernel.steps) > first + 10
    for step in range(first, len(straight.kernel.steps)):
        node = run(tmp_path / str(step))
        ruled = {path for path, _ in by_path(node).items()}
        node.kernel.stop_at = step
        with pytest.raises(Killed):
            node.look(changed)
        assert ruled <= by_path(node).keys(), f"free after a kill before {straight.kernel.steps[step]}"
        node.kernel.stop_at = None
        node.restart()
        node.look(changed)
        node.look(changed)
        assert by_path(node) == wanted, straight.kernel.steps[step]


def by_path(node: Node) -> dict[str, tuple[str, Flag, bool]]:
    """What is in force, by path."""
    tree = node.path / "tree"
    paths = {path.stat().st_ino: str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_dir()}
    return {paths.get(number, "gone"): state for number, state in node.state().items()}
