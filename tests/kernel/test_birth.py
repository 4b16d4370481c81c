"""A cgroup born below a managed parent: under the parent's policy and counted by itself from its first socket on."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from ctypes import c_uint64
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.controller import Placement, compiled
from agent.kernel import abi, libbpf
from agent.kernel.abi import SPARE, Flag
from agent.kernel.links import opened
from agent.kernel.pinned import PinnedKernel
from agent.kernel.seam import Enrolment
from agent.status import gather
from tests.kernel.cage import Box, Cage
from tests.kernel.rules import allow, deny, policy
from tests.world import World

CLOSED = policy(deny("127.0.0.2"))
SIZE = 1000


@contextmanager
def child_of(box: Box, name: str = "") -> Iterator[Box]:
    """A cgroup below a box, as a runtime makes one for a container."""
    path = box.path / (name or f"born-{secrets.token_hex(3)}")
    path.mkdir()
    try:
        yield Box(path, box.cage, box.world)
    finally:
        path.rmdir()


@pytest.fixture
def parent(cage: Cage, world: World, box: Box) -> Iterator[Box]:
    """A managed parent under a policy, with four spare slots; everything below is withdrawn at the end."""
    version = cage.controller.install(compiled(CLOSED))
    cage.controller.place([Placement(box.id, version, compiled(CLOSED).version.flags, Flag.PARENT)])
    cage.controller.stock(4)
    yield box
    cage.controller.restock()
    for slot in cage.kernel.drain():
        cage.kernel.mark(slot, 0)


def send(count: int = 1) -> int:
    """Datagrams of SIZE bytes to this host; the IP bytes that they make."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _ in range(count):
            one.sendto(b"x" * SIZE, ("127.0.0.1", 9))
    return count * (SIZE + 28)


def knock() -> int:
    """What connect() to the closed address answers."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.2", 9))


def bytes_of(box: Box) -> int:
    read = box.cage.kernel.read()
    return sum(read.counters[read.enrolments[box.id].slot].bytes.values())


def test_counted_by_itself_from_its_first_byte(parent: Box) -> None:
    with child_of(parent) as one, child_of(parent) as two:
        assert one.run(lambda: send(3)) == bytes_of(one)
        assert two.run(send) == bytes_of(two)
        assert bytes_of(parent) == 0
        entry = parent.cage.kernel.enrolments()[one.id]
        assert entry.flags & Flag.BORN
        assert not entry.flags & Flag.PARENT
        parent.cage.controller.withdraw_all([one.id, two.id])


def test_under_the_parents_policy(parent: Box) -> None:
    with child_of(parent) as one:
        assert one.run(knock) in (errno.EACCES, errno.EPERM)
        assert [(key.slot, count) for key, count in parent.cage.kernel.read().refusals.items() if count] == [
            (parent.cage.kernel.enrolments()[one.id].slot, 1)
        ]
        parent.cage.controller.withdraw(one.id)


def test_what_is_in_the_parent_itself_counts_with_it(parent: Box) -> None:
    assert parent.run(send) == bytes_of(parent)
    assert len(marked(parent.cage)) == 4


def marked(cage: Cage) -> set[int]:
    used = {entry.slot for entry in cage.kernel.enrolments().values()}
    return {slot for slot, mark in cage.kernel.slots().items() if mark == SPARE and slot not in used}


def test_without_a_spare_slot_it_stays_with_its_parent(parent: Box) -> None:
    cage = parent.cage
    for slot in cage.kernel.drain():
        cage.kernel.mark(slot, 0)
    with child_of(parent) as one:
        sent = one.run(send)
        assert one.id not in cage.kernel.enrolments()
        assert one.run(knock) in (errno.EACCES, errno.EPERM)
        assert bytes_of(parent) == sent
        cage.controller.stock(1)
        assert one.run(send) == bytes_of(one)
        cage.controller.withdraw(one.id)


def test_stock_is_filled_up_and_slots_come_back(parent: Box) -> None:
    cage = parent.cage
    with child_of(parent) as one:
        one.run(send)
        slot = cage.kernel.enrolments()[one.id].slot
        assert len(marked(cage)) == 3
        cage.controller.stock(4)
        assert len(marked(cage)) == 4
        cage.controller.withdraw(one.id)
        assert slot not in cage.kernel.slots()


def test_a_slot_that_a_killed_weir_marked_is_found(parent: Box) -> None:
    cage = parent.cage
    cage.kernel.mark(40, SPARE)
    cage.controller.restock()
    assert 40 not in cage.kernel.slots()
    assert len(marked(cage)) == 4
    with child_of(parent) as one:
        assert one.run(send) == bytes_of(one)
        cage.controller.withdraw(one.id)


def test_nested_cgroups_become_one_container(parent: Box) -> None:
    """Two cgroups in a container made sockets before anybody looked: one count, one owner, nothing lost."""
    cage, opened = parent.cage, policy(allow("127.0.0.0/8"), default=deny().action)
    with child_of(parent) as whole, child_of(whole, "a") as one, child_of(whole, "b") as two:
        sent = one.run(lambda: send(2)) + two.run(send)
        version = cage.controller.install(compiled(opened))
        cage.controller.place([Placement(whole.id, version, compiled(opened).version.flags, nested=(one.id, two.id))])
        entries = cage.kernel.enrolments()
        assert len({entries[box.id].slot for box in (whole, one, two)}) == 1
        assert bytes_of(whole) == sent
        sent += whole.run(send) + two.run(send)
        assert bytes_of(whole) == sent
        assert one.run(knock) == errno.ECONNREFUSED
        sent = bytes_of(whole)  # the SYN as well
        cage.controller.withdraw_all([one.id])
        assert bytes_of(whole) == sent
        cage.controller.withdraw_all([whole.id, two.id])
        assert len(cage.kernel.slots().keys() - marked(cage)) == 0
        cage.controller.collect()


def test_a_policy_switch_keeps_how_a_parent_was_enrolled(parent: Box) -> None:
    cage, other = parent.cage, policy(deny("127.0.0.3"))
    cage.controller.enrol(parent.path, compiled(other))
    with child_of(parent) as one:
        assert one.run(knock) == errno.ECONNREFUSED
        assert one.id in cage.kernel.enrolments()
        cage.controller.withdraw(one.id)


def test_names_are_remembered_until_the_cgroup_is_withdrawn(parent: Box, tmp_path: Path) -> None:
    kernel = parent.cage.kernel
    kernel.label(parent.id, '{"pod": "ä"}')
    assert kernel.labels()[parent.id] == '{"pod": "ä"}'
    (shown,) = [row for row in gather(parent.cage.place, kernel)["cgroups"] if row["cgroup_id"] == parent.id]
    assert shown["pod"] == "ä"
    with child_of(parent) as one:
        kernel.label(one.id, "{}")
        parent.cage.controller.withdraw(one.id)
        assert tree.cgroup_id(one.path) not in kernel.labels()


def test_counts_go_on_with_a_cgroup_of_the_same_name(parent: Box) -> None:
    """A service that is started again and again: its counts never fall, and one slot holds all that went before."""
    cage, sent, previous = parent.cage, 0, 0
    for turn in range(1, 6):
        cage.controller.stock(4)
        with child_of(parent) as one:
            sent += one.run(lambda: send(2))
            one.run(knock)
            if previous:
                cage.controller.fold([previous], one.id)
            read = cage.kernel.read()
            slot = read.enrolments[one.id].slot
            assert bytes_of(one) == sent
            assert sum(n for key, n in read.refusals.items() if key.slot == slot) == turn
            assert list(cage.kernel.slots().values()).count(slot) == min(turn - 1, 1)
            previous = one.id
    cage.controller.withdraw_all([previous])
    assert len(cage.kernel.slots().keys() - marked(cage)) == 0


def test_counts_go_on_where_no_refusal_has_room(parent: Box) -> None:
    """What cannot be added up by its kind is added to what is uncounted, as the programs do."""
    cage, sent = parent.cage, 0
    refusals, room = cage.place.pins.maps / "refusals", 0
    with child_of(parent) as one, child_of(parent) as two, child_of(parent) as three:
        for box in (one, two, three):
            sent += box.run(send)
            box.run(knock)
        cage.controller.fold([one.id], two.id)
        with opened(libbpf.obj_get(refusals)) as fd:
            fillers = [abi.Refusal(slot=63, policy=1, rule=rule) for rule in range(abi.MAX_REFUSALS)]
            with suppress(OSError):
                for room, filler in enumerate(fillers):  # noqa: B007 - how many there was room for
                    libbpf.update(fd, filler, c_uint64(1))
            assert 0 < room < abi.MAX_REFUSALS - 2
            cage.controller.fold([two.id], three.id)
            for filler in fillers:
                libbpf.delete(fd, filler)
        read = cage.kernel.read()
        slot = read.enrolments[three.id].slot
        named = sum(n for key, n in read.refusals.items() if key.slot == slot)
        assert (bytes_of(three), named + read.counters[slot].refusals_uncounted) == (sent, 3)
        assert list(cage.kernel.slots().values()).count(slot) == 1
        cage.controller.withdraw_all([three.id])


class Interrupted(PinnedKernel):
    """A reader to whom something happens between reading where counts belong and reading the counts."""

    happens: Callable[[], None] | None = None

    def _per_cpu(self) -> object:
        happens, self.happens = self.happens, None
        if happens:
            happens()
        return super()._per_cpu()


def test_a_reader_beside_a_fold_sees_everything_once(parent: Box) -> None:
    """Counts that move to another slot meanwhile are not missing: a scrape would show a reset."""
    cage = parent.cage
    with child_of(parent) as first:
        sent, gone = first.run(lambda: send(5)), first.id
    with child_of(parent) as one, closing(Interrupted(cage.kernel._pins)) as reader:
        sent += one.run(send)
        cage.controller.fold([gone], one.id)
        target = cage.kernel.enrolments()[one.id].slot
        (slot,) = (slot for slot, mark in cage.kernel.slots().items() if mark == target)
        free = next(number for number in range(1, 4096) if number not in marked_or_used(cage))
        reader.happens = lambda: cage.kernel.merge([slot], free, target)
        assert sum(reader.read().counters[target].bytes.values()) == sent
        assert reader.happens is None
        cage.controller.withdraw_all([one.id])


def marked_or_used(cage: Cage) -> set[int]:
    return {entry.slot for entry in cage.kernel.enrolments().values()} | cage.kernel.slots().keys()


def test_enrolled_by_itself_while_the_agent_chose_a_slot(parent: Box) -> None:
    """What it counted between the agent's look and its write is not lost."""
    cage = parent.cage
    with child_of(parent) as one:
        sent = one.run(send)
        entry = cage.kernel.enrolments()[one.id]
        cage.kernel.enrol({one.id: Enrolment(60, entry.policy, entry.flags)}, fresh={one.id})
        assert bytes_of(one) == sent
        assert cage.kernel.enrolments()[one.id].slot == entry.slot
        cage.kernel.enrol({one.id: Enrolment(60, entry.policy, entry.flags)})
        assert cage.kernel.enrolments()[one.id].slot == 60
        cage.controller.withdraw(one.id)
        cage.kernel.clear([entry.slot])
