"""The controller against the kernel in memory: what it writes, in which order, and what is left when it is stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.controller import Compiled, Controller, compiled
from agent.errors import WeirError
from agent.kernel.abi import MAX_LEVEL, MAX_POLICIES, PROGRAMS, SPARE, Flag, Hook, Reason
from agent.kernel.seam import NOTHING, Enrolment, Kernel, Refused
from agent.policy.model import Action, Mode, Policy
from tests.fake_kernel import FakeKernel, Killed
from tests.policies import OPEN_SOCKETS

ALLOW_ALL = Policy("open", Mode.ENFORCE, OPEN_SOCKETS, (), Action.ALLOW, "open.yaml", "0" * 64, "")
DENY_ALL = replace(ALLOW_ALL, name="shut", default=Action.DENY)


def policy_number(index: int) -> Compiled:
    """A policy unlike every other of another index."""
    return compiled(replace(ALLOW_ALL, name=f"policy-{index}"))


def make(root: Path, *names: str) -> list[Path]:
    """Directories that stand for cgroups: the controller knows a cgroup by its inode alone."""
    paths = [root / name for name in names]
    for path in paths:
        path.mkdir(parents=True)
    return paths


def refusal(enrolment: Enrolment) -> Refused:
    """A refusal counter that the programs could have made for an enrolment."""
    return Refused(enrolment.slot, enrolment.policy, Hook.CONNECT, Reason.RULE, None, audited=False)


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def controller(kernel: FakeKernel, tmp_path: Path) -> Controller:
    seam: Kernel = kernel  # mypy proves here that the fake has the seam's shape
    return Controller(seam, tmp_path)


def test_equal_policies_share_a_version(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    one, two = make(tmp_path, "one", "two")
    first = controller.enrol(one, compiled(ALLOW_ALL))
    second = controller.enrol(two, compiled(replace(ALLOW_ALL, source="copy.yaml", text="# the same", sha256="1" * 64)))
    assert first.policy == second.policy
    assert first.slot != second.slot
    assert len(kernel.installed) == 1


def test_a_switch_keeps_slot_and_birth_and_retires_the_old(
    kernel: FakeKernel, controller: Controller, tmp_path: Path
) -> None:
    (one,) = make(tmp_path, "one")
    before = controller.enrol(one, compiled(ALLOW_ALL), Flag.BORN | Flag.RUN)
    kernel.counted[before.slot] = replace(NOTHING, sockets_created=7)
    after = controller.enrol(one, compiled(DENY_ALL))
    assert (after.slot, after.flags & Flag.BORN, after.flags & Flag.RUN) == (before.slot, Flag.BORN, Flag.RUN)
    assert after.policy != before.policy
    assert kernel.installed.keys() == {after.policy}
    assert controller.totals(after.slot)[0].sockets_created == 7


def test_a_cgroup_that_was_running_stays_one_that_was(controller: Controller, tmp_path: Path) -> None:
    (one,) = make(tmp_path, "one")
    controller.enrol(one, compiled(ALLOW_ALL))
    assert not controller.enrol(one, compiled(DENY_ALL), Flag.BORN).flags & Flag.BORN


def test_a_version_that_a_refusal_names_is_kept(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    (one,) = make(tmp_path, "one")
    before = controller.enrol(one, compiled(DENY_ALL))
    kernel.refused[refusal(before)] = 3
    after = controller.enrol(one, compiled(ALLOW_ALL))
    assert kernel.installed.keys() == {before.policy, after.policy}
    assert controller.totals(after.slot)[1] == {refusal(before): 3}


def test_a_used_slot_is_cleared_before_the_next_cgroup_gets_it(
    kernel: FakeKernel, controller: Controller, tmp_path: Path
) -> None:
    one, two = make(tmp_path, "one", "two")
    first = controller.enrol(one, compiled(DENY_ALL))
    kernel.counted[first.slot] = replace(NOTHING, sockets_created=7)
    kernel.refused[refusal(first)] = 3
    controller.withdraw(tree.cgroup_id(one))
    second = controller.enrol(two, compiled(ALLOW_ALL))
    assert second.slot == first.slot
    assert controller.totals(second.slot) == (NOTHING, {})
    assert kernel.installed.keys() == {second.policy}


def test_all_slots_taken(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    kernel.capacity = 3
    one, two, three = make(tmp_path, "one", "two", "three")
    controller.enrol(one, compiled(ALLOW_ALL))
    controller.enrol(two, compiled(ALLOW_ALL))
    before = dict(kernel.entries)
    with pytest.raises(WeirError, match="all 2 places") as caught:
        controller.enrol(three, compiled(DENY_ALL))
    assert "weir status" in caught.value.hint
    assert kernel.entries == before
    assert len(kernel.installed) == 1
    controller.enrol(two, compiled(DENY_ALL))  # a switch needs no new place


def test_many_at_once(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    """Known and new cgroups in one call: known ones keep their slots, and nothing changes when one has no place."""
    kernel.capacity = 4
    one, two, three, four = make(tmp_path, "one", "two", "three", "four")
    before = controller.enrol(two, compiled(ALLOW_ALL), Flag.BORN)
    enrolments = controller.enrol_all([one, two, three], compiled(DENY_ALL))
    assert [enrolment.slot for enrolment in enrolments] == [2, before.slot, 3]
    assert [bool(enrolment.flags & Flag.BORN) for enrolment in enrolments] == [False, True, False]
    assert kernel.installed.keys() == {enrolment.policy for enrolment in enrolments}
    entries, versions = dict(kernel.entries), dict(kernel.installed)
    with pytest.raises(WeirError, match="all 3 places"):
        controller.enrol_all([one, four], compiled(ALLOW_ALL))
    assert (kernel.entries, kernel.installed) == (entries, versions)


def test_unused_versions_make_room(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    (one,) = make(tmp_path, "one")
    for index in range(MAX_POLICIES + 2):
        enrolment = controller.enrol(one, policy_number(index))
        kernel.refused[refusal(enrolment)] = 1  # each is kept for its name
    assert len(kernel.installed) == MAX_POLICIES
    assert kernel.entries[tree.cgroup_id(one)].policy in kernel.installed


def test_too_deep(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    deepest = tmp_path.joinpath(*("d" for _ in range(MAX_LEVEL)))
    make(deepest, "below")
    controller.enrol(deepest, compiled(ALLOW_ALL))
    with pytest.raises(WeirError, match=f"{MAX_LEVEL + 1} levels deep"):
        controller.enrol(deepest / "below", compiled(ALLOW_ALL))
    assert len(kernel.entries) == 1


def test_close_off_refuses_by_no_policy_and_never_loosens(
    kernel: FakeKernel, controller: Controller, tmp_path: Path
) -> None:
    one, two = make(tmp_path, "one", "two")
    controller.close_off(one)
    assert kernel.entries[tree.cgroup_id(one)].policy == 0
    controller.enrol(two, compiled(DENY_ALL))
    before = kernel.entries[tree.cgroup_id(two)]
    controller.close_off(two)
    assert kernel.entries[tree.cgroup_id(two)] == before


def test_manage_attaches_once(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    parent, child = make(tmp_path, "parent", "parent/child")
    controller.manage(parent)
    controller.manage(parent)
    controller.manage(child)  # its parent's programs see it already
    assert kernel.links == {tree.cgroup_id(parent): set(PROGRAMS)}


def test_manage_refuses_above_an_attachment(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    parent, child = make(tmp_path, "parent", "parent/child")
    controller.manage(child)
    with pytest.raises(WeirError, match="attached below") as caught:
        controller.manage(parent)
    assert str(child) in caught.value.hint
    assert kernel.links.keys() == {tree.cgroup_id(child)}


def test_manage_completes_what_a_killed_one_began(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    (parent,) = make(tmp_path, "parent")
    kernel.stop_at = 4
    with pytest.raises(Killed):
        controller.manage(parent)
    assert controller.parent_of(parent, kernel.attached()) is None
    kernel.stop_at = None
    controller.manage(parent)
    assert controller.parent_of(parent, kernel.attached()) == parent


def test_release(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    parent, child = make(tmp_path, "parent", "parent/child")
    controller.manage(parent)
    controller.enrol(child, compiled(ALLOW_ALL))
    controller.release(tree.cgroup_id(parent))
    assert kernel.links  # the child needs the programs
    controller.withdraw(tree.cgroup_id(child))
    controller.release(tree.cgroup_id(parent))
    assert not kernel.links


def test_release_of_a_cgroup_that_is_gone_sweeps(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    (one,) = make(tmp_path, "one")
    controller.manage(one)
    number = tree.cgroup_id(one)
    one.rmdir()
    kernel.gone.add(number)
    controller.release(number)
    assert not kernel.links


def test_a_cgroup_that_vanishes(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    (one,) = make(tmp_path, "one")
    controller.manage(one)
    one.rmdir()
    with pytest.raises(WeirError, match="is no cgroup"):
        controller.enrol(one, compiled(ALLOW_ALL))
    assert not kernel.entries
    assert not kernel.installed


def change(controller: Controller, cgroup: Path, policy: Policy) -> None:
    """What `weir attach` does."""
    controller.manage(cgroup)
    controller.enrol(cgroup, compiled(policy))


def steps_of_a_switch(root: Path) -> int:
    """How many steps the switch of the two tests below has."""
    kernel = FakeKernel()
    controller = Controller(kernel, root)
    change(controller, root / "one", ALLOW_ALL)
    before = len(kernel.steps)
    change(controller, root / "one", DENY_ALL)
    return len(kernel.steps) - before


@pytest.mark.parametrize("stop_with", [Killed, WeirError])
def test_stopped_at_every_step_of_a_switch(tmp_path: Path, stop_with: type[BaseException]) -> None:
    """The cgroup is under the old policy or the new, whole and named, and the same command again finishes the change."""
    (one,) = make(tmp_path, "one")
    number = tree.cgroup_id(one)
    count = steps_of_a_switch(tmp_path)
    assert count >= 4
    for step in range(count):
        kernel = FakeKernel(stop_with=stop_with)
        controller = Controller(kernel, tmp_path)
        change(controller, one, ALLOW_ALL)
        kernel.stop_at = len(kernel.steps) + step
        with pytest.raises(stop_with):
            change(controller, one, DENY_ALL)
        in_force, _ = kernel.installed[kernel.entries[number].policy]
        assert in_force.name in ("open", "shut")
        assert kernel.links[number] == set(PROGRAMS)
        kernel.stop_at = None
        change(controller, one, DENY_ALL)
        assert {version.name for version in kernel.versions().values()} == {"shut"}
        assert kernel.versions().keys() == {kernel.entries[number].policy}
        assert not kernel.half_installed, f"stopped before {kernel.steps[step]}: a rest of a version stays"


@pytest.mark.parametrize("stop_with", [Killed, WeirError])
def test_stopped_at_every_step_of_an_attach(tmp_path: Path, stop_with: type[BaseException]) -> None:
    """Never enrolled without every program; the same command again finishes it."""
    (one,) = make(tmp_path, "one")
    number = tree.cgroup_id(one)
    whole = FakeKernel()
    change(Controller(whole, tmp_path), one, DENY_ALL)
    for step in range(len(whole.steps)):
        kernel = FakeKernel(stop_at=step, stop_with=stop_with)
        controller = Controller(kernel, tmp_path)
        with pytest.raises(stop_with):
            change(controller, one, DENY_ALL)
        if number in kernel.entries:
            assert kernel.links[number] == set(PROGRAMS)
        kernel.stop_at = None
        change(controller, one, DENY_ALL)
        assert kernel.links == {number: set(PROGRAMS)}
        assert (list(kernel.entries), len(kernel.installed)) == ([number], 1)
        assert not kernel.half_installed, f"stopped before {whole.steps[step]}: a rest of a version stays"


def test_spare_slots_that_find_no_room(kernel: FakeKernel, controller: Controller) -> None:
    assert controller.stock(5) == 0
    assert controller.stock(9) == 9 - (kernel.capacity - 1)
    assert sorted(kernel.queue) == list(range(1, kernel.capacity))


def test_slots_that_a_killed_weir_marked(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> None:
    """Marked and given to nobody, or added to the counts of a slot that nobody has: free again. What counts stays."""
    (one,) = make(tmp_path, "one")
    used = controller.enrol(one, compiled(ALLOW_ALL)).slot
    free = [slot for slot in range(1, kernel.capacity) if slot != used]
    kernel.marks = {free[0]: SPARE, free[1]: free[2], free[3]: used, free[4]: SPARE}
    kernel.queue = [free[4]]
    controller.restock()
    assert kernel.marks == {free[3]: used, free[4]: SPARE}
    assert kernel.queue == [free[4]]


def counted_so_far(kernel: FakeKernel) -> tuple[int, int]:
    """Packets and refusals of everything that an entry has."""
    read = kernel.read()
    slots = {entry.slot for entry in read.enrolments.values()}
    packets = sum(sum(read.counters[slot].packets.values()) for slot in slots)
    return packets, sum(count for refused, count in read.refusals.items() if refused.slot in slots)


def started_again(kernel: FakeKernel, controller: Controller, tmp_path: Path) -> list[int]:
    """A service's third life: two cgroups are gone, the first folded into the second. Each counted in its own slot."""
    ids = []
    for number in range(3):
        (path,) = make(tmp_path, f"life-{number}")
        entry = controller.enrol(path, compiled(ALLOW_ALL))
        kernel.counted[entry.slot] = replace(NOTHING, packets=dict.fromkeys(NOTHING.packets, 10**number))
        kernel.refused[refusal(entry)] = 10**number
        ids.append(tree.cgroup_id(path))
    controller.fold(ids[:1], ids[1])
    return ids


def test_a_fold_counts_everything_once_wherever_it_is_killed(tmp_path: Path) -> None:
    straight = FakeKernel(capacity=8)
    first = Controller(straight, tmp_path / "straight")
    ids = started_again(straight, first, tmp_path / "straight")
    begun, whole = len(straight.steps), counted_so_far(straight)
    assert whole == (111 * len(NOTHING.packets), 111)
    first.fold([ids[1]], ids[2])
    assert counted_so_far(straight) == whole
    assert [*straight.marks.values()] == [straight.entries[ids[2]].slot], "one slot holds both"
    assert len(straight.steps) > begun + 6
    for step in range(begun, len(straight.steps)):
        kernel, root = FakeKernel(capacity=8), tmp_path / str(step)
        controller = Controller(kernel, root)
        ids = started_again(kernel, controller, root)
        kernel.stop_at = step
        with pytest.raises(Killed):
            controller.fold([ids[1]], ids[2])
        assert counted_so_far(kernel) == whole, straight.steps[step]
        kernel.stop_at = None
        kernel.sweep()
        assert counted_so_far(kernel) == whole, straight.steps[step]
        if ids[1] in kernel.entries:
            controller.fold([ids[1]], ids[2])
        controller.restock()
        assert counted_so_far(kernel) == whole, straight.steps[step]
        assert {*kernel.marks.values()} == {kernel.entries[ids[2]].slot}


def test_without_a_free_slot_a_fold_leaves_the_slots_as_they_are(tmp_path: Path) -> None:
    kernel = FakeKernel(capacity=4)
    controller = Controller(kernel, tmp_path)
    ids = started_again(kernel, controller, tmp_path)
    whole = counted_so_far(kernel)
    controller.fold([ids[1]], ids[2])
    assert counted_so_far(kernel) == whole
    assert [*kernel.marks.values()] == [kernel.entries[ids[2]].slot] * 2
