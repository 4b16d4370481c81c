"""The agent's socket, both sides of it: real sockets, slow and foreign clients, what a killed agent leaves."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.errors import WeirError
from agent.kernel.pins import Pins
from agent.node import ask
from agent.node.door import KEPT, MAX_CLIENTS, MAX_REQUEST, ROOM, Door
from tests import need

STATE = {"loaded": True, "cgroups": []}
NOBODY = 65534


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "agent.sock"


@pytest.fixture(name="door")
def _door(path: Path) -> Iterator[Door]:
    made = Door(path, lambda: STATE)
    made.start()
    yield made
    made.stop()


def connected(path: Path, request: bytes = b"") -> socket.socket:
    """A client that has sent something, and reads when the test does."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(60)
    client.connect(os.fspath(path))
    client.sendall(request)
    return client


def following(door: Door, path: Path) -> socket.socket:
    """A client that follows the events, once the door knows it."""
    before = followers(door)
    client = connected(path, b'{"want": "events", "follow": true}\n')
    wait_for(lambda: followers(door) > before)
    return client


def followers(door: Door) -> int:
    with door._lock:
        return sum(client.follows for client in door._clients.values())


def wait_for(holds: Callable[[], bool]) -> None:
    """Until something holds; fails after a minute."""
    for _ in range(6000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came to hold")


def lines(client: socket.socket) -> list[dict[str, int]]:
    """All that the door says until it hangs up."""
    with client.makefile("rb") as file:
        return [json.loads(line) for line in file]


def test_status(door: Door, path: Path) -> None:
    assert ask.status(path) == STATE
    assert ask.status(path) == STATE


def test_only_the_owner_gets_in(door: Door, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_no_agent_is_no_error(path: Path) -> None:
    assert ask.status(path) is None
    assert ask.events(path, follow=False) is None


def test_an_error_of_the_agent_reaches_the_client(path: Path) -> None:
    answers = iter([WeirError("the pins are gone", "Load them."), ValueError("oops")])

    def broken() -> dict[str, int]:
        raise next(answers)

    door = Door(path, broken)
    door.start()
    try:
        with pytest.raises(WeirError, match="the pins are gone") as caught:
            ask.status(path)
        assert caught.value.hint == "Load them."
        with pytest.raises(WeirError, match=r"ValueError\('oops'\)"):
            ask.status(path)
    finally:
        door.stop()


def test_events_that_were(door: Door, path: Path) -> None:
    for number in range(KEPT + 5):
        door.publish({"number": number})
    told = ask.events(path, follow=False)
    assert told is not None
    assert [data["number"] for data in told] == list(range(5, KEPT + 5))


def test_events_as_they_come_and_the_end_of_the_agent(door: Door, path: Path) -> None:
    door.publish({"number": 0})
    told = ask.events(path, follow=True)
    assert told is not None
    wait_for(lambda: followers(door) == 1)
    for number in (1, 2):
        door.publish({"number": number})
        assert next(told) == {"number": number}
    door.stop()
    with pytest.raises(WeirError, match="has ended"):
        next(told)


def test_a_slow_reader_loses_its_own_and_is_told(door: Door, path: Path) -> None:
    """What the sleeper misses is exactly what its one line says; a reader beside it misses nothing."""
    sleeper, reader = following(door, path), following(door, path)
    total, seen = 20 * ROOM, 0
    gone: list[int] = []
    with sleeper, reader:
        with reader.makefile("rb") as file:
            for number in range(total):
                door.publish({"number": number, "text": "x" * 200})
                if number % 50 == 49:  # let the quick one keep up
                    for _ in range(50):
                        assert json.loads(file.readline())["number"] == seen
                        seen += 1
        assert seen == total
        sleeper.settimeout(60)
        with sleeper.makefile("rb") as file:
            got = 0
            while got + sum(gone) < total:
                data = json.loads(file.readline())
                if "lost" in data:
                    gone.append(data["lost"])
                else:
                    assert data["number"] == got + sum(gone)
                    got += 1
                    if got == ROOM // 2:  # there is room again: the gap is told before what comes after it
                        door.publish({"number": total})
                        total += 1
    assert gone and got > ROOM


def test_a_reader_that_sleeps_does_not_hold_up_the_others(door: Door, path: Path) -> None:
    with following(door, path):
        for number in range(10 * ROOM):
            door.publish({"number": number, "text": "x" * 200})
        assert ask.status(path) == STATE


def test_not_more_clients_than_there_are_places(door: Door, path: Path) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(following(door, path)) for _ in range(MAX_CLIENTS)]
        with pytest.raises(WeirError, match=f"{MAX_CLIENTS} others"):
            ask.status(path)
        clients[0].close()
        wait_for(lambda: followers(door) < MAX_CLIENTS)
        assert ask.status(path) == STATE


@pytest.mark.parametrize(
    "request_line",
    [b"\n", b"{\n", b"[]\n", b'{"want": "tea"}\n', b"\xff\xfe\n", b"[" * 4000 + b"\n", b"x" * (MAX_REQUEST + 1)],
)
def test_nonsense_is_answered_and_hung_up_on(door: Door, path: Path, request_line: bytes) -> None:
    with connected(path, request_line) as client:
        (answer,) = lines(client)
    assert "error" in answer
    assert ask.status(path) == STATE


def test_a_client_that_goes_away_in_the_middle(door: Door, path: Path) -> None:
    for request in (b"", b'{"want"', b'{"want": "status"}\n', b'{"want": "events", "follow": true}\n'):
        connected(path, request).close()
    door.publish({"number": 1})
    assert ask.status(path) == STATE
    wait_for(lambda: not door._clients)


def test_publishing_before_and_after_is_no_error(path: Path) -> None:
    """The events' thread starts before the door and ends after it."""
    door = Door(path, lambda: STATE)
    door.publish({"number": 1})
    door.start()
    told = ask.events(path, follow=False)
    assert told is not None
    assert list(told) == [{"number": 1}]
    end = threading.Event()

    def publish() -> None:
        while not end.is_set():
            door.publish({"number": 2})

    with following(door, path):
        publisher = threading.Thread(target=publish)
        publisher.start()
        door.stop()
        assert publisher.is_alive()
        end.set()
        publisher.join()


def test_clients_that_say_nothing_are_hung_up_on(path: Path) -> None:
    door = Door(path, lambda: STATE, patience=0.2)
    door.start()
    with ExitStack() as stack:
        stack.callback(door.stop)
        follower = stack.enter_context(following(door, path))
        silent = [stack.enter_context(connected(path)) for _ in range(MAX_CLIENTS - 1)]
        assert [lines(client) for client in silent] == [[] for _ in silent]
        assert ask.status(path) == STATE
        door.publish({"number": 1})  # who follows may be silent, and wait for as long as nothing happens
        with follower.makefile("rb") as file:
            assert json.loads(file.readline()) == {"number": 1}


def as_nobody(job: Callable[[], str]) -> str:
    """What a job says in a child that is the user nobody."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writing, job().encode())
        except BaseException:  # noqa: BLE001 - a forked child must not unwind into the test's code
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    os.waitpid(pid, 0)
    return text


def refused(path: Path) -> str:
    """What status() says of its failure."""
    try:
        ask.status(path)
    except WeirError as e:
        return str(e)
    return "it was answered"


def open_up(path: Path) -> None:
    """Let everyone enter the directories down to here: pytest makes its own for the user alone."""
    for directory in path.parents:
        if directory.is_relative_to("/tmp") and directory != Path("/tmp"):
            directory.chmod(0o755)


def test_another_user_does_not_get_to_the_socket(door: Door, path: Path) -> None:
    need.root()
    open_up(path.parent)
    assert "is for root" in as_nobody(lambda: refused(path))


def test_another_user_is_refused_at_the_socket(door: Door, path: Path) -> None:
    """Should the modes be changed, the kernel's word on who it is still counts."""
    need.root()
    open_up(path)
    path.chmod(0o666)
    assert f"user {NOBODY} may not ask" in as_nobody(lambda: refused(path))


def test_the_socket_of_a_killed_agent_is_replaced(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(os.fspath(path))
        killed.listen()
    assert path.exists()
    assert ask.status(path) is None
    door = Door(path, lambda: STATE)
    door.start()
    assert ask.status(path) == STATE
    door.stop()
    assert not path.exists()
    assert path.parent.exists()  # it was there before


def test_a_second_agent_is_refused_and_the_first_goes_on(door: Door, path: Path) -> None:
    second = Door(path, lambda: {"second": True})
    with pytest.raises(WeirError, match="another agent listens"):
        second.start()
    second.stop()
    assert ask.status(path) == STATE


def test_stop_leaves_nothing_and_takes_no_one_elses(door: Door, path: Path) -> None:
    path.unlink()
    path.write_text("somebody's")
    door.stop()
    assert path.read_text() == "somebody's"
    path.unlink()
    again = Door(path, lambda: STATE)
    again.start()
    again.stop()
    assert not path.exists()


def test_a_directory_of_others(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    door = Door(shared / "agent.sock", dict)
    door.start()  # empty, as the kubelet makes it: taken over
    assert stat.S_IMODE(shared.stat().st_mode) == 0o700
    door.stop()
    shared.chmod(0o755)
    (shared / "other").touch()
    with pytest.raises(WeirError, match="holds other things"):
        Door(shared / "second.sock", dict).start()


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(WeirError, match="cannot listen"):
        Door(tmp_path / ("d" * 120) / "agent.sock", dict).start()
    with pytest.raises(WeirError, match="cannot ask"):
        ask.status(tmp_path / ("d" * 120) / "agent.sock")


def test_where_the_agent_of_some_pins_listens() -> None:
    assert ask.door(Pins(), {}) == Path("/run/weir/agent.sock")
    assert ask.door(Pins(Path("/sys/fs/bpf/mine")), {}) == Path("/run/mine/agent.sock")
    assert ask.door(Pins(), {"WEIR_SOCKET": "/tmp/x.sock"}) == Path("/tmp/x.sock")
