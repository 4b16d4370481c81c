"""The Pump on the kernel in memory: who gets which event, what standard output may cost, and who may read."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.errors import WeirError
from agent.events import Counted, Describer, Pump, as_text, sole_reader
from agent.kernel.abi import Flag, Hook, Reason
from agent.kernel.pins import Pins
from agent.kernel.seam import Event, Refused, RuleName, Version
from agent.lines import ROOM, Lines
from agent.node.state import NodeState, Row
from agent.place import Place
from agent.policy.compile import Tables
from tests.fake_kernel import FakeKernel

VERSION = Version("shut", b"\0" * 32, Flag(0), (RuleName("private", 42, deny=True),))
EVENT = Event(0, 7, 11, "curl", 0xFFFF_0A01_0203, 80, 6, Refused(1, 1, Hook.CONNECT, Reason.RULE, 0, audited=False))
STATE = NodeState(rows=(Row("/kubepods/pod1/c1", (7, 8), "shop", "cart-1", "cart"), Row("/kubepods", (9,))))

UNKNOWN = NodeState()


class Ring(FakeKernel):
    """Waits as the real one does, so that a Pump in a thread does not spin; a test may add to it meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.installed[1] = (VERSION, Tables((), ()))
        self.changed = threading.Condition()

    def events(self, milliseconds: int) -> Sequence[Event]:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting, milliseconds / 1000)
            return super().events(milliseconds)

    def add(self, *events: Event) -> None:
        with self.changed:
            self.waiting += events
            self.changed.notify()


@pytest.fixture(name="ring")
def _ring() -> Ring:
    return Ring()


@pytest.fixture(name="place")
def _place(tmp_path: Path) -> Place:
    pins = Pins(tmp_path / "pins")
    pins.maps.mkdir(parents=True)
    (tmp_path / "cgroup" / "weir").mkdir(parents=True)
    return Place(pins, tmp_path / "cgroup", tmp_path / "cgroup" / "weir")


@pytest.fixture(name="pipe")
def _pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        with suppress(OSError):
            os.close(fd)


def wait_for(holds: Callable[[], bool]) -> None:
    """Until something holds; fails after a minute."""
    for _ in range(6000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came to hold")


def described(ring: Ring, place: Place, event: Event, state: NodeState = UNKNOWN) -> dict[str, Any]:
    (data,), _ = Describer(ring, place, lambda: state).describe([event])
    return data


def test_an_event_in_words(ring: Ring, place: Place) -> None:
    number = (place.root / "weir").stat().st_ino
    data = described(ring, place, replace(EVENT, cgroup=number))
    assert (data["cgroup"], data["policy"], data["rule"], data["line"]) == ("/weir", "shut", "private", 42)
    assert (data["address"], data["port"], data["protocol"], data["action"]) == ("10.1.2.3", 80, "tcp", "refused")
    assert not {"namespace", "pod", "container"} & data.keys()
    assert as_text(data).endswith("refused connect tcp 10.1.2.3 port 80 by shut/private (line 42): curl[11] in /weir")


def test_the_names_of_a_container(ring: Ring, place: Place) -> None:
    """Those of the state, of nested cgroups too; a parent has a cgroup only, and what nobody knows is a number."""
    for number in (7, 8):
        data = described(ring, place, replace(EVENT, cgroup=number), STATE)
        assert (data["namespace"], data["pod"], data["container"]) == ("shop", "cart-1", "cart")
        assert as_text(data).endswith("in /kubepods/pod1/c1 (shop/cart-1/cart)")
    parent = described(ring, place, replace(EVENT, cgroup=9), STATE)
    assert parent["cgroup"] == "/kubepods"
    assert "pod" not in parent
    assert described(ring, place, replace(EVENT, cgroup=10), STATE)["cgroup"] == "(gone: id 10)"


def test_the_tree_is_walked_once_for_each_stranger(ring: Ring, place: Place) -> None:
    number = (place.root / "weir").stat().st_ino
    describer = Describer(ring, place, lambda: STATE)
    assert [describer.describe([replace(EVENT, cgroup=one)])[1] for one in (7, number, number, 10, 10, number)] == [
        False,
        True,
        False,
        True,
        False,
        False,
    ]


def test_pump_tells_everyone(ring: Ring, place: Place, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    seen: list[Mapping[str, Any]] = []
    pump = Pump(ring, place, [seen.append], Lines(writing), lambda: STATE)
    pump.start()
    ring.add(EVENT, replace(EVENT, port=81))
    wait_for(lambda: pump.counted == Counted(2, 0))
    pump.stop()
    written = [json.loads(line) for line in os.read(reading, 100_000).splitlines()]
    assert written == seen
    assert [data["port"] for data in seen] == [80, 81]
    assert seen[0]["pod"] == "cart-1"


def test_pump_without_standard_output(ring: Ring, place: Place) -> None:
    seen: list[Mapping[str, Any]] = []
    pump = Pump(ring, place, [seen.append])
    pump.start()
    ring.add(*[EVENT] * 500)
    wait_for(lambda: pump.counted == Counted(500, 0))
    pump.stop()
    assert len(seen) == 500


def test_one_reader_at_a_time(ring: Ring, place: Place) -> None:
    """The Pump waits until the other has gone, and says meanwhile what is wrong."""
    pump = Pump(ring, place)
    with sole_reader(place.pins.maps):
        with pytest.raises(WeirError, match="another process reads"), sole_reader(place.pins.maps):
            pass
        pump.start()
        wait_for(lambda: "another process" in pump.problem)
    ring.add(EVENT)
    wait_for(lambda: pump.counted.reported == 1)
    assert pump.problem == ""
    pump.stop()
    with sole_reader(place.pins.maps):
        pass


def test_nothing_loaded_yet(ring: Ring, place: Place) -> None:
    place.pins.maps.rmdir()
    pump = Pump(ring, place)
    pump.start()
    wait_for(lambda: "cannot look into" in pump.problem)
    place.pins.maps.mkdir()
    ring.add(EVENT)
    wait_for(lambda: pump.counted.reported == 1)
    pump.stop()


def test_pins_that_were_made_anew(ring: Ring, place: Place) -> None:
    """The lock on the old directory keeps nobody away from the new one: the Pump takes that, too."""
    pump = Pump(ring, place)
    pump.start()
    ring.add(EVENT)
    wait_for(lambda: pump.counted.reported == 1)
    place.pins.maps.rmdir()
    place.pins.maps.mkdir()
    wait_for(lambda: is_read(place.pins.maps))
    pump.stop()


def is_read(maps: Path) -> bool:
    try:
        with sole_reader(maps):
            return False
    except WeirError:
        return True


class Clock:
    """Stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_no_more_lines_a_second_than_allowed(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    clock = Clock()
    lines = Lines(writing, per_second=3, clock=clock)
    lines.start()
    for number in range(5):
        lines.put({"number": number})
    clock.now += 0.9
    lines.tick()  # the second is not over
    lines.put({"number": 5})
    clock.now += 0.2
    lines.tick()
    lines.put({"number": 6})
    clock.now += 1
    lines.tick()  # nothing was suppressed: nothing to tell
    lines.stop()
    written = [json.loads(line) for line in os.read(reading, 100_000).splitlines()]
    assert written == [{"number": 0}, {"number": 1}, {"number": 2}, {"suppressed": 3}, {"number": 6}]
    assert (lines.written, lines.suppressed) == (4, 3)


def test_a_blocked_standard_output_holds_up_nobody(ring: Ring, place: Place, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    seen: list[Mapping[str, Any]] = []
    pump = Pump(ring, place, [seen.append], Lines(writing, per_second=10**6), lambda: STATE)
    pump.start()
    total = 5 * ROOM
    for _ in range(total // 100):
        ring.add(*[EVENT] * 100)
        wait_for(lambda: not ring.waiting)
    wait_for(lambda: len(seen) == total)
    counted = pump.counted
    assert counted.suppressed > 0
    assert total - ROOM - 1 <= sum((counted.reported, counted.suppressed)) <= total
    told = 0
    with os.fdopen(os.dup(reading)) as file:  # the reader wakes up: what waited is there, and what was left out is told
        for line in file:
            told += json.loads(line).get("suppressed", 0) or 1
            if told >= total:
                break
    assert told == total
    wait_for(lambda: sum((pump.counted.reported, pump.counted.suppressed)) == total)
    pump.stop()


def test_a_closed_standard_output(ring: Ring, place: Place, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.close(reading)
    seen: list[Mapping[str, Any]] = []
    pump = Pump(ring, place, [seen.append], Lines(writing), lambda: STATE)
    pump.start()
    ring.add(*[EVENT] * 20)
    wait_for(lambda: pump.counted == Counted(0, 20))
    ring.add(EVENT)
    wait_for(lambda: len(seen) == 21)
    pump.stop()
    assert pump.counted == Counted(0, 21)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pump_that_has_died_says_so(ring: Ring, place: Place) -> None:
    def broken(data: Mapping[str, Any]) -> None:
        raise ValueError

    pump = Pump(ring, place, [broken], None, lambda: STATE)
    pump.start()
    ring.add(EVENT)
    wait_for(lambda: "is a bug in weir" in pump.problem)
    pump.stop()
