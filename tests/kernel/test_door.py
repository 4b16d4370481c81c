"""`weir status`, `weir events` and `weir top` on the real kernel while an agent's socket is there.

The agent's loop is not: what serves is a Door and a Pump of this process, on a site of its own, with a state that the
test makes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.events import Pump
from agent.kernel.pinned import PinnedKernel
from agent.node import ask
from agent.node.door import Door
from agent.node.state import NodeState, Reloads, Row
from agent.status import gather
from tests.kernel.knocker import doors
from tests.kernel.site import TIMEOUT, Site, one_line, site

STATE = NodeState(roots=("/kubepods",), default="one", not_ready=())


@dataclass
class Serving:
    """What stands for the agent."""

    site: Site
    state: NodeState = STATE

    @property
    def path(self) -> Path:
        return ask.door(self.site.place.pins, {})

    def name(self, cgroup: Path) -> None:
        """Let the cgroup be a container."""
        row = Row(f"/{cgroup.name}", (tree.cgroup_id(cgroup),), "shop", "cart-1", "web", "id", processes=3, filtered=1)
        self.state = replace(self.state, rows=(*self.state.rows, row))


@contextmanager
def serving(made: Site) -> Iterator[Serving]:
    """A Door and a Pump on the site's kernel, each with descriptors of its own."""
    place, kernels = made.place, [PinnedKernel(made.place.pins) for _ in range(2)]
    agent = Serving(made)
    door = Door(agent.path, lambda: gather(place, kernels[0], agent.state))
    pump = Pump(kernels[1], place, [door.publish], None, lambda: agent.state)
    door.start()
    pump.start()
    try:
        yield agent
    finally:
        pump.stop()
        door.stop()
        for kernel in kernels:
            kernel.close()


@pytest.fixture(scope="module", name="here")
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("door")) as made:
        made.ok("load")
        yield made


@pytest.fixture(name="agent")
def _agent(here: Site) -> Iterator[Serving]:
    with serving(here) as made:
        yield made
    assert not made.path.parent.exists()


@pytest.fixture(name="cart")
def _cart(agent: Serving) -> Iterator[tuple[Path, tuple[int, int, int]]]:
    """An enrolled cgroup with the names of a container, and the ports of three doors; only the second is allowed."""
    with doors() as listening, agent.site.cgroup() as cgroup:
        agent.site.ok("attach", cgroup, "-p", agent.site.policy("one", listening.ports[1]))
        agent.name(cgroup)
        yield cgroup, listening.ports
        agent.site.ok("detach", cgroup)


def knock(cgroup: Path, *ports: int) -> None:
    """Connect to ports from a cgroup, once each."""
    script = 'echo 0 > "$0"; for p in "$@"; do (exec 3<>/dev/tcp/127.0.0.1/$p) 2>/dev/null; done; true'
    subprocess.run(["bash", "-c", script, str(cgroup / "cgroup.procs"), *map(str, ports)], check=True)


def test_status_names_the_container(agent: Serving, cart: tuple[Path, tuple[int, int, int]]) -> None:
    cgroup, ports = cart
    knock(cgroup, *ports)
    agent.state = replace(
        agent.state,
        reloads=Reloads(failures={"/p/bad.yaml": "line 3"}),
        not_ready=("The CRI is down.",),
        cri="no answer",
    )
    data = agent.site.status()
    (row,) = [row for row in data["cgroups"] if row.get("container")]
    assert (row["namespace"], row["pod"], row["container"]) == ("shop", "cart-1", "web")
    assert (row["policy"], row["layers"]["hooks"], row["layers"]["seccomp"]) == ("one", True, "1/3")
    assert sum(refused["count"] for refused in row["refused"]) == 2
    assert row["bytes"]["loopback"] > 0
    assert data["node"]["reloads"]["failures"] == {"/p/bad.yaml": "line 3"}
    assert data["maps"]["cgroups"]["entries"] >= 1
    text = agent.site.ok("status")
    for words in (
        "agent: NOT READY; 1 containers below /kubepods",
        "  not ready: The CRI is down.",
        "  POLICY FILE WRONG: /p/bad.yaml: line 3",
        "  NO NAMES FROM THE CRI: no answer",
        "shop/cart-1/web",
        f"shop/cart-1/web: /{cgroup.name}",
    ):
        assert words in text
    rows = json.loads(agent.site.ok("top", "--once", "--json", "--interval", "0.2s"))["rows"]
    assert "shop/cart-1/web" in [row["name"] for row in rows]


def test_events_for_several_readers(agent: Serving, cart: tuple[Path, tuple[int, int, int]]) -> None:
    cgroup, ports = cart
    readers = [
        agent.site.start("events", "-f", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    told = ask.events(agent.path, follow=True)
    assert told
    with knocking(cgroup, ports[0]):  # for as long as it takes until both follow
        lines = [reader.stdout.readline() for reader in readers if reader.stdout]
    for data in (*map(json.loads, lines), next(told)):
        assert (data["port"], data["rule"], data["comm"]) == (ports[0], "default", "bash")
        assert (data["namespace"], data["pod"], data["container"]) == ("shop", "cart-1", "web")
    for reader in readers:
        reader.send_signal(signal.SIGINT)
        _, errors = reader.communicate(timeout=TIMEOUT)
        assert (reader.returncode, errors.strip()) == (130, "")
    kept = agent.site.ok("events").splitlines()
    assert kept
    assert all(line.endswith(f"in /{cgroup.name} (shop/cart-1/web)") for line in kept)
    assert agent.site.ok("events").splitlines()[: len(kept)] == kept  # to look takes nothing away


@contextmanager
def knocking(cgroup: Path, port: int) -> Iterator[None]:
    script = 'echo 0 > "$0"; while :; do (exec 3<>/dev/tcp/127.0.0.1/$1) 2>/dev/null; sleep 0.1; done'
    process = subprocess.Popen(["bash", "-c", script, str(cgroup / "cgroup.procs"), str(port)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_the_end_of_the_agent(here: Site) -> None:
    """Who follows is told; the next command reads the kernel itself."""
    with serving(here):
        reader = here.start("events", "-f", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with doors() as listening, here.cgroup() as cgroup:
            here.ok("attach", cgroup, "-p", here.policy("one", listening.ports[1]))
            with knocking(cgroup, listening.ports[0]):
                assert reader.stdout and reader.stdout.readline()
            here.ok("detach", cgroup)
    _, errors = reader.communicate(timeout=TIMEOUT)
    assert reader.returncode == 1
    assert "has ended" in errors and "Traceback" not in errors
    assert "node" not in here.status()
    here.ok("events")


def test_an_agent_that_was_killed(here: Site) -> None:
    """Its socket is still there, and nobody behind it: the kernel is read directly."""
    path = ask.door(here.place.pins, {})
    path.parent.mkdir(mode=0o700)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
            killed.bind(os.fspath(path))
            killed.listen()
        assert "node" not in here.status()
        here.ok("events")
    finally:
        path.unlink()
        path.parent.rmdir()


def test_without_a_door_the_pump_is_the_one_reader(here: Site, tmp_path: Path) -> None:
    """`weir events` that is told of no socket does not take the agent's events away."""
    with serving(here):
        settings = {**here.environment, "WEIR_SOCKET": str(tmp_path / "nobody.sock")}
        said = one_line(here.weir("events", env=settings))
    assert "another process reads the events already" in said["message"]
