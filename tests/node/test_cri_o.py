"""What a real CRI-O made and said, recorded: its cgroups and the bytes of its two answers, for one pod of two containers.

tests/README.md, "Tried by hand", says how. Debian has no CRI-O, so none runs here.
"""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from agent.cgroups.containers import Kind, identify, may_hold
from agent.node.choose import Why
from agent.node.members import members
from agent.node.naming import Naming
from tests.node.grpc_server import Answer, grpc_server

Json = dict[str, Any]

RECORDED: list[Json] = json.loads(Path(__file__).with_name("cri_o.json").read_bytes())


def title(recorded: Json) -> str:
    infra = "without infra" if recorded["drop_infra_ctr"] else "infra"
    return f"{recorded['cgroup_manager']}, {recorded['runtime']}, {infra}"


def said(recorded: Json, method: str) -> Answer:
    return lambda *_: base64.b64decode(recorded[method])


@pytest.mark.parametrize("recorded", RECORDED, ids=title)
def test_who_each_cgroup_is(recorded: Json, tmp_path: Path) -> None:
    """The pod and its containers, by their names and under their policy; nothing else is a member."""
    cgroups = {PurePosixPath(path): number for number, path in enumerate(recorded["cgroups"], 1)}
    root = next(iter(cgroups))
    answers = {method: said(recorded, method) for method in ("ListContainers", "ListPodSandbox")}
    arrived = threading.Event()
    with grpc_server(tmp_path / "s.sock", answers):
        naming = Naming([tmp_path / "s.sock"], 3600, arrived.set)
        naming.start()
        try:
            assert arrived.wait(60)
            found = [*members(cgroups, root, naming, [("mine", None)], "default", {})]
        finally:
            naming.stop()
    assert (found[0].path, found[0].identity) == (root, None)
    who = []
    for member in found[1:]:
        assert member.named
        assert member.identity
        assert (member.names.namespace, member.names.pod) == ("shop", "web-0")
        assert (member.choice.policy, member.choice.why) == ("mine", Why.ANNOTATION)
        assert member.names.labels
        assert member.names.labels["app"] == "web"
        who.append((member.identity.kind, member.identity.runtime, member.names.container))
    # systemd's slices hold scopes: the plain cgroup of a sandbox without a process is CRI-O's, for cAdvisor.
    sandbox = not recorded["drop_infra_ctr"] or recorded["cgroup_manager"] == "cgroupfs"
    expected = [(Kind.POD, "", None), *((Kind.CONTAINER, "cri-o", name) for name in ("POD", "main", "side"))]
    assert sorted(who, key=str) == sorted((one for one in expected if sandbox or one[2] != "POD"), key=str)


@pytest.mark.parametrize("recorded", RECORDED, ids=title)
def test_what_lies_in_a_container_is_the_container_s(recorded: Json) -> None:
    """crun's cgroup inside of the scope, and what CRI-O makes there for commands with CPUs of their own (execCPUAffinity)."""
    paths = [PurePosixPath(path) for path in recorded["cgroups"]]
    for path in paths[1:]:
        found = identify(path, paths[0])
        assert found
        assert found.path == path or (found.path in paths and found.identity.kind is Kind.CONTAINER)
        if found.identity.kind is Kind.CONTAINER:
            assert not may_hold(path, paths[0])
            inner = identify(path / "exec", paths[0])
            assert inner
            assert inner.path == found.path
