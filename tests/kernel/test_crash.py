"""kill -9 at every step of load, attach, switch, detach, run and unload, with a client connecting all the while.

What must hold after each: no connection that the policy refuses has ever succeeded, the cgroup is under one policy, whole,
or under none, and the same command again leaves everything as if nothing had happened.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.controller import Controller
from agent.kernel import abi, libbpf
from agent.kernel.pinned import PinnedKernel
from tests import need
from tests.kernel.knocker import Doors, Knocker, doors, forbidden_command, knocker
from tests.kernel.site import TIMEOUT, Site, site, wait_until_blocked
from tests.kernel.steps import kill_before, steps

CAPACITY = 64


@dataclass(frozen=True)
class Scene:
    """A site with the programs loaded, three doors, and two policies that leave a different one of two doors open."""

    site: Site
    doors: Doors
    first: Path
    second: Path

    def attach(self, cgroup: Path, policy: Path) -> list[str]:
        """The command line that puts a cgroup under a policy."""
        return self.site.command("attach", cgroup, "--policy", policy)

    def kernel_is_tidy(self, versions: int) -> None:
        """The maps of maps hold the named versions and nothing else; every link directory is whole; no other pin.

        ``versions``: at most so many. A version stays as long as a counter of refusals needs the names of its rules.
        """
        kernel = PinnedKernel(self.site.place.pins)
        try:
            named = sorted(kernel.versions())
            assert len(named) <= versions
            assert sorted(int(pin.name) for pin in self.site.place.pins.rules.iterdir()) == named
            for name in ("addresses", "clauses"):
                fd = libbpf.obj_get(self.site.place.pins.maps / name)
                with open(fd, "rb"):
                    assert sorted(key.value for key in libbpf.keys(fd, ctypes.c_uint32)) == named, name
            assert all(names == frozenset(abi.PROGRAMS) for names in kernel.attached().values())
            assert len(kernel.attached()) == len(list(self.site.place.pins.links.iterdir()))
        finally:
            kernel.close()
        pins = self.site.place.pins
        assert sorted(path.name for path in pins.programs.iterdir()) == sorted(abi.PROGRAMS)
        assert sorted(path.name for path in pins.maps.iterdir()) == sorted(abi.MAPS)
        assert self.site.rest() == []

    def forget_slice(self) -> None:
        """As before the first run: no slice, and no programs attached to it."""
        kernel = PinnedKernel(self.site.place.pins)
        try:
            number = tree.cgroup_id(self.site.place.slice)
            kernel.withdraw([number])
            kernel.detach(number)
            self.site.place.slice.rmdir()
        finally:
            kernel.close()
        self.forget_refusals()

    def forget_refusals(self) -> None:
        """Zero the counters of slots that no cgroup has, and let the versions go that they named."""
        kernel = PinnedKernel(self.site.place.pins)
        try:
            used = {enrolment.slot for enrolment in kernel.enrolments().values()}
            kernel.clear({refused.slot for refused in kernel.refusals()} - used)
            Controller(kernel, self.site.place.root).collect()
        finally:
            kernel.close()

    def judged_by_one_policy(self, client: Knocker, name: str | None) -> None:
        """The shut door stayed shut, and the two others are as the policy of that name says."""
        attempts, successes, others = client.ask()
        assert attempts > 0
        assert successes == 0, f"{successes} of {attempts} attempts got through the shut door"
        assert others == {"first": (True, False), "second": (False, True)}[name or "none"]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    need.root()
    with site(tmp_path) as made, doors() as listening:
        made.ok("load", "--max-containers", str(CAPACITY))
        _, first, second = listening.ports
        yield Scene(made, listening, made.policy("first", first), made.policy("second", second))


def test_the_client_gets_through_where_no_policy_is(scene: Scene) -> None:
    """What the tests below rely on: without a policy every attempt succeeds."""
    with scene.site.cgroup() as cgroup, knocker(cgroup, scene.doors) as client:
        attempts, successes, others = client.ask()
        assert (attempts > 0, successes, others) == (True, attempts, (True, True))


def test_switch(scene: Scene) -> None:
    with scene.site.cgroup() as cgroup, knocker(cgroup, scene.doors) as client:
        scene.site.ok("attach", cgroup, "--policy", scene.first)
        client.ask()
        scene.judged_by_one_policy(client, "first")
        switch = scene.attach(cgroup, scene.second)
        killed = []
        for step in steps(switch, scene.site.environment):
            scene.site.ok("attach", cgroup, "--policy", scene.first)
            scene.judged_by_one_policy(client, "first")
            killed.append(kill_before(step, switch, scene.site.environment))
            scene.judged_by_one_policy(client, scene.site.policy_of(cgroup))
            scene.site.ok("attach", cgroup, "--policy", scene.second)
            scene.judged_by_one_policy(client, "second")
            scene.kernel_is_tidy(versions=2)
        assert nearly_all(killed)


def test_attach(scene: Scene) -> None:
    with scene.site.cgroup() as cgroup, knocker(cgroup, scene.doors) as client:
        attach = scene.attach(cgroup, scene.first)
        killed = []
        for step in steps(attach, scene.site.environment):
            scene.site.weir("detach", cgroup)
            scene.forget_refusals()
            killed.append(kill_before(step, attach, scene.site.environment))
            enrolled_means_refused(scene, cgroup, client)
            scene.site.ok("attach", cgroup, "--policy", scene.first)
            client.ask()
            scene.judged_by_one_policy(client, "first")
            scene.kernel_is_tidy(versions=1)
        assert nearly_all(killed)


def test_detach(scene: Scene) -> None:
    with scene.site.cgroup() as cgroup, knocker(cgroup, scene.doors) as client:
        detach = scene.site.command("detach", cgroup)
        scene.site.ok("attach", cgroup, "--policy", scene.first)
        killed = []
        for step in steps(detach, scene.site.environment):
            scene.site.ok("attach", cgroup, "--policy", scene.first)
            killed.append(kill_before(step, detach, scene.site.environment))
            enrolled_means_refused(scene, cgroup, client)
            scene.site.weir("detach", cgroup)  # an error when it was complete already
            assert scene.site.policy_of(cgroup) is None
            client.ask()
            attempts, successes, _ = client.ask()
            assert successes == attempts
            assert not list(scene.site.place.pins.links.glob("*/*")), step
        scene.site.ok("attach", cgroup, "--policy", scene.first)
        scene.kernel_is_tidy(versions=1)
        assert nearly_all(killed)


def nearly_all(killed: list[bool]) -> bool:
    """The client's refusals change how many calls a command makes, so a few of the last steps may not be reached."""
    return sum(killed) >= 0.8 * len(killed)


def enrolled_means_refused(scene: Scene, cgroup: Path, client: Knocker) -> None:
    """After a killed attach or detach: under the policy and judged by it, or under none and free; open sockets too."""
    client.ask()
    if scene.site.policy_of(cgroup):
        scene.judged_by_one_policy(client, "first")
    else:
        attempts, successes, others = client.ask()
        assert others == (True, True)
        assert successes == attempts


def test_first_load(tmp_path: Path) -> None:
    """Nothing is in force after a killed first load, and the next one, even of another size, is whole."""
    with site(tmp_path) as made:
        command = [sys.executable, "-m", "agent.kernel.loader"]
        order = json.dumps({"pins": str(made.place.pins.root), "capacity": 3})
        made.place.pins.make()
        found = steps(command, made.environment, order)
        found = [step for step in found if "bpf" in step.call]
        for number, step in enumerate(found):
            made.place.pins.remove()
            made.place.pins.make()
            assert kill_before(step, command, made.environment, order), step
            kernel = PinnedKernel(made.place.pins)
            assert kernel.build() is None, step
            kernel.close()
            if number % 4 and step is not found[-1]:
                continue  # a load takes a second
            made.ok("load", "--max-containers", str(CAPACITY))
            build = kernel.build()
            assert build
            assert build.capacity == CAPACITY, step
            kernel.close()
            assert made.rest() == []


@pytest.mark.parametrize("arguments", [["load", "--force"], ["unload"], ["load"]], ids=" ".join)
def test_a_loader_whose_weir_was_killed(tmp_path: Path, arguments: list[str]) -> None:
    """It works on, without the lock of the command that started it: the next load or unload waits for its end."""
    with site(tmp_path) as made:
        made.place.pins.make()
        if "--force" in arguments:
            made.ok("load")
        with made.place.pins.loading():  # as the orphan does
            command = made.start(*arguments)
            wait_until_blocked(command.pid)
            assert command.poll() is None
        assert command.wait(TIMEOUT) == 0
        assert made.place.pins.root.exists() is (arguments[0] == "load")


def test_load_over_a_loaded_one(scene: Scene) -> None:
    """Programs are replaced one by one while the client knocks; each killed load leaves every link with a program."""
    command = [sys.executable, "-m", "agent.kernel.loader"]
    order = json.dumps({"pins": str(scene.site.place.pins.root), "capacity": CAPACITY})
    with scene.site.cgroup() as cgroup, knocker(cgroup, scene.doors) as client:
        scene.site.ok("attach", cgroup, "--policy", scene.first)
        client.ask()
        found = steps(command, scene.site.environment, order)
        for step in [step for step in found if scene.site.place.slice.name in step.call or "bpf" in step.call]:
            assert kill_before(step, command, scene.site.environment, order), step
            scene.judged_by_one_policy(client, scene.site.policy_of(cgroup))
        scene.site.ok("load", "--force")
        scene.judged_by_one_policy(client, "first")
        scene.kernel_is_tidy(versions=1)


def test_run(scene: Scene, tmp_path: Path) -> None:
    """The command's first act is refused, also when weir is killed while it starts; the next run tidies up."""
    witness = tmp_path / "it-got-through"
    command = forbidden_command(scene.doors.ports[0], witness)
    scene.site.ok("run", "--policy", "audit", "--", *command)
    assert witness.exists(), "without a policy that refuses, the command must get through"
    witness.unlink()
    run = ["run", "--policy", str(scene.first), "--", *command]
    scene.forget_slice()
    killed = []
    for step in steps(scene.site.command(*run), scene.site.environment):
        scene.forget_slice()
        killed.append(kill_before(step, scene.site.command(*run), scene.site.environment))
        wait_for_orphans(scene.site)
        assert not witness.exists(), step
        scene.site.ok(*run)
        assert not witness.exists(), step
        scene.kernel_is_tidy(versions=1)
        only_the_slice_is_enrolled(scene.site)
    assert nearly_all(killed)


def wait_for_orphans(made: Site) -> None:
    """Wait until the command of a killed run has ended: it lives on under its policy."""
    while tree.processes(made.place.slice):
        time.sleep(0.02)


def only_the_slice_is_enrolled(made: Site) -> None:
    kernel = PinnedKernel(made.place.pins)
    try:
        assert list(kernel.enrolments()) == [tree.cgroup_id(made.place.slice)]
        assert Controller(kernel, made.place.root).parent_of(made.place.slice, kernel.attached()) == made.place.slice
    finally:
        kernel.close()


def test_unload(scene: Scene) -> None:
    """Half an unload is finished by the next, or repaired by the next load."""
    with scene.site.cgroup() as cgroup, knocker(cgroup, scene.doors) as client:
        unload = scene.site.command("unload", "--force")
        scene.site.ok("attach", cgroup, "--policy", scene.first)
        found = steps(unload, scene.site.environment)
        for number, step in enumerate(found[::3]):
            scene.site.ok("attach", cgroup, "--policy", scene.first)
            client.ask()
            assert kill_before(step, unload, scene.site.environment), step
            if number % 2:
                scene.site.ok("unload", "--force")
                assert not scene.site.place.pins.root.exists()
            scene.site.ok("attach", cgroup, "--policy", scene.second)
            client.ask()
            scene.judged_by_one_policy(client, "second")
            scene.kernel_is_tidy(versions=2)
