"""The facts of `weir status` from the kernel in memory and what an agent knows, and how they read."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.controller import Controller, compiled
from agent.kernel.abi import Hook, Reason
from agent.kernel.pins import Pins
from agent.kernel.seam import NOTHING, Refused
from agent.node.state import NodeState, PolicyState, Reloads, Row
from agent.place import Place
from agent.policy.model import Action, Mode, Policy
from agent.status import gather
from agent.verbs.status import node_lines, show
from tests.fake_kernel import FakeKernel
from tests.policies import OPEN_SOCKETS

POLICY = compiled(Policy("open", Mode.AUDIT, OPEN_SOCKETS, (), Action.ALLOW, "open.yaml", "0" * 64, ""))

READY = NodeState(
    rows=(),
    policies=(PolicyState("open", "/p/open.yaml", "ab", "audit"),),
    reloads=Reloads(2, 1, 1.0, {"/p/bad.yaml": "line 3: no such key"}),
    roots=("/kubepods",),
    default="open",
    cri="the CRI at /run/cri.sock does not answer",
    not_ready=(),
)


@pytest.fixture(name="place")
def _place(tmp_path: Path) -> Place:
    for name in ("kubepods/pod/c1/nested", "kubepods/pod/c2", "job"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "cgroup.procs").touch()
    return Place(Pins(tmp_path / "pins"), tmp_path, tmp_path / "weir")


@pytest.fixture(name="kernel")
def _kernel(place: Place) -> FakeKernel:
    """The parent and the job have programs; c1, the cgroup nested in it, and the job are enrolled."""
    made = FakeKernel()
    controller = Controller(made, place.root)
    for name in ("kubepods", "job"):
        controller.manage(place.root / name)
    for name in ("kubepods/pod/c1", "kubepods/pod/c1/nested", "job"):
        controller.enrol(place.root / name, POLICY)
    for number, entry in made.entries.items():
        sent = {"public": 100 if number == inode(place, "kubepods/pod/c1") else 1, "private": 0, "loopback": 0}
        made.counted[entry.slot] = replace(NOTHING, bytes=sent, sockets_created=2, sockets_released=1)
        made.refused[Refused(entry.slot, entry.policy, Hook.CONNECT, Reason.RULE, None, audited=True)] = 3
    return made


def inode(place: Place, name: str) -> int:
    return (place.root / name).stat().st_ino


def container(place: Place, name: str, *numbers: int) -> Row:
    return Row(
        f"/kubepods/pod/{name}", numbers or (inode(place, f"kubepods/pod/{name}"),), "shop", "cart", name, "id-" + name
    )


def test_without_an_agent_each_enrolled_cgroup_is_an_item(place: Place, kernel: FakeKernel) -> None:
    data = json.loads(json.dumps(gather(place, kernel)))
    assert [item["cgroup"] for item in data["cgroups"]] == ["/job", "/kubepods/pod/c1", "/kubepods/pod/c1/nested"]
    job = data["cgroups"][0]
    assert (job["policy"], job["mode"], job["sockets"], job["bytes"]["public"]) == ("open", "audit", 1, 1)
    assert (job["layers"]["hooks"], job["refused"][0]["count"], job["gone"]) == (True, 3, False)
    assert "node" not in data
    assert not {"namespace", "pod", "container", "problem"} & job.keys()


def test_a_container_is_one_item_with_all_that_is_in_it(place: Place, kernel: FakeKernel) -> None:
    numbers = (inode(place, "kubepods/pod/c1"), inode(place, "kubepods/pod/c1/nested"))
    row = replace(container(place, "c1", *numbers), problem="no policy is called nope", processes=4, filtered=3)
    data = json.loads(json.dumps(gather(place, kernel, replace(READY, rows=(row,)))))
    job, c1 = data["cgroups"]
    assert (job["cgroup"], c1["cgroup"]) == ("/job", "/kubepods/pod/c1")
    assert (c1["namespace"], c1["pod"], c1["container"], c1["id"]) == ("shop", "cart", "c1", "id-c1")
    assert (c1["bytes"]["public"], c1["sockets"], c1["refused"][0]["count"]) == (101, 2, 6)
    assert (c1["problem"], c1["layers"]["seccomp"]) == ("no policy is called nope", "3/4")
    assert data["node"]["rows"][0]["cgroup_ids"] == list(numbers)


def test_cgroups_that_share_a_slot_are_counted_once(place: Place, kernel: FakeKernel) -> None:
    numbers = (inode(place, "kubepods/pod/c1"), inode(place, "kubepods/pod/c1/nested"))
    kernel.entries[numbers[1]] = kernel.entries[numbers[1]]._replace(slot=kernel.entries[numbers[0]].slot)
    data = gather(place, kernel, replace(READY, rows=(container(place, "c1", *numbers),)))
    assert data["cgroups"][1]["bytes"]["public"] == 100


def test_a_container_without_an_entry_of_its_own(place: Place, kernel: FakeKernel) -> None:
    """It opened no socket yet: it is under its parent's policy, and has counted nothing."""
    state = replace(READY, rows=(container(place, "c2"),))

    def c2() -> dict[str, Any]:
        found: list[dict[str, Any]] = [one for one in gather(place, kernel, state)["cgroups"] if one.get("container")]
        return found[0]

    assert (c2()["policy"], c2()["mode"], c2()["layers"]["hooks"]) == (None, "none", True)
    assert "neither this cgroup nor a parent" in c2()["not_covered"][0]
    Controller(kernel, place.root).enrol(place.root / "kubepods", POLICY)
    assert (c2()["policy"], c2()["mode"], c2()["bytes"]["public"], c2()["refused"]) == ("open", "audit", 0, [])


def test_a_container_that_is_gone(place: Place, kernel: FakeKernel) -> None:
    """Out of the table, once nothing of it is enrolled; the node's rows have it for as long as it is retained."""
    then = time.monotonic() - 5
    gone = [
        Row("/kubepods/pod/c8", (12345,), container="c8", gone=then),
        replace(container(place, "c1"), gone=then),
    ]
    data = gather(place, kernel, replace(READY, rows=tuple(gone)))
    assert [item.get("container") for item in data["cgroups"]] == [None, None, "c1"]
    assert (data["cgroups"][2]["gone"], data["cgroups"][2]["not_covered"]) == (True, [])
    assert all(row["gone"] >= 5 for row in data["node"]["rows"])


def test_what_is_gone_is_no_gap(place: Place, kernel: FakeKernel, capsys: pytest.CaptureFixture[str]) -> None:
    """The programs are on no cgroup that has it any more: nothing can run there without them."""
    row = replace(container(place, "c1"), gone=time.monotonic())
    shutil.rmtree(place.root / "kubepods/pod/c1")
    show(gather(place, kernel, replace(READY, rows=(row,))))
    out = capsys.readouterr().out
    assert re.search(r"^shop/cart/c1 +open +audit +gone ", out, re.MULTILINE), out
    assert "EVERYTHING" not in out


def test_hooks_of_a_half_attached_parent_are_not_in_force(place: Place, kernel: FakeKernel) -> None:
    kernel.links[inode(place, "kubepods")].discard("egress")
    hooks = {item["cgroup"]: item["layers"]["hooks"] for item in gather(place, kernel)["cgroups"]}
    assert hooks == {"/job": True, "/kubepods/pod/c1": False, "/kubepods/pod/c1/nested": False}


def test_a_cgroup_that_went_while_we_looked(place: Place, kernel: FakeKernel) -> None:
    for name in ("kubepods/pod/c1/nested/cgroup.procs",):
        (place.root / name).unlink()
    number = inode(place, "kubepods/pod/c1/nested")
    (place.root / "kubepods/pod/c1/nested").rmdir()
    (item,) = [item for item in gather(place, kernel)["cgroups"] if item["cgroup_id"] == number]
    assert (item["cgroup"], item["gone"]) == (f"(gone: id {number})", True)


def test_how_the_agent_is(place: Place, kernel: FakeKernel, capsys: pytest.CaptureFixture[str]) -> None:
    row = replace(container(place, "c1"), problem="no policy is called nope")
    show(gather(place, kernel, replace(READY, rows=(row,))))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "agent: ready; 1 containers below /kubepods",
        "  POLICY FILE WRONG: /p/bad.yaml: line 3: no such key",
        "  NO NAMES FROM THE CRI: the CRI at /run/cri.sock does not answer",
        "policies: open (audit); default open",
    ]
    assert lines[4] == "tables: cgroups 3/8, policies 1/256"
    assert any(line.startswith("shop/cart/c1 ") for line in lines)
    assert "shop/cart/c1: /kubepods/pod/c1" in lines
    assert "  PROBLEM: no policy is called nope" in lines


def test_why_it_is_not_ready(place: Place, kernel: FakeKernel) -> None:
    lines = list(node_lines(gather(place, kernel, NodeState())))
    assert lines[:2] == [
        "agent: NOT READY; 0 containers below no root",
        "  not ready: The agent has not finished its first look at the node.",
    ]
