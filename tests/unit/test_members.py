"""Which cgroups are enrolled, what they are called, and under which policy each comes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cgroups.containers import Identity, Kind
from agent.kernel.abi import LABELS
from agent.node.choose import Choice, Why
from agent.node.members import Member, Names, members
from agent.policy.model import Selector

ROOT = PurePosixPath("kubepods")
C, D = "c" * 64, "d" * 64
POD = ROOT / "burstable/pod29349498-197c-4919-b13f-9a928e7d001b"
UID = "29349498-197c-4919-b13f-9a928e7d001b"


@dataclass(frozen=True)
class Told:
    """A CRI that has answered once."""

    containers: dict[str, Names] = field(default_factory=dict)
    pods: dict[str, Names] = field(default_factory=dict)

    @property
    def answer(self) -> object:
        return {**self.containers}, {**self.pods}

    def container(self, container_id: str) -> Names | None:
        return self.containers.get(container_id)

    def pod(self, pod_uid: str) -> Names | None:
        return self.pods.get(pod_uid)


WEB = Names("shop", "web-0", None, {"app": "web"}, {})
FRONT = Names("shop", "web-0", "front", {"app": "web"}, {})
SHOP = Selector(namespaces=("shop",))
FRONTS = Selector(namespaces=("shop",), containers=("front",))


def found(
    *paths: PurePosixPath,
    told: Told,
    policies: tuple[tuple[str, Selector | None], ...] = (),
    root: PurePosixPath = ROOT,
) -> dict[PurePosixPath, Member]:
    """The members among these cgroups by path."""
    listed = {path: number for number, path in enumerate((root, *paths), 1)}
    made = {member.path: member for member in members(listed, root, told, policies, "default", {})}
    assert all(member.cgroup == listed[path] for path, member in made.items())
    return made


def test_what_has_not_changed_is_the_same_object() -> None:
    listed, policies = {ROOT: 1, POD: 2, POD / C: 3, POD / D: 4}, ()
    told = Told({C: FRONT}, {UID: WEB})
    first = {member.cgroup: member for member in members(listed, ROOT, told, policies, "default", {})}
    moved = {ROOT: 1, POD: 2, POD / C: 3, ROOT / "burstable" / POD.name / "x" / D: 4}
    told.containers[D] = FRONT
    for now in (listed, moved):
        known = {member.cgroup: member for member in members(now, ROOT, told, policies, "default", first)}
        assert known == {m.cgroup: m for m in members(now, ROOT, told, policies, "default", {})}
        assert [known.get(number) is first[number] for number in (2, 3, 4)] == [True, True, False]


def test_when_nothing_else_is_new_only_what_is_nameless_is_asked_for() -> None:
    listed, policies = {ROOT: 1, POD: 2, POD / C: 3, POD / D: 4}, [("shop", SHOP)]
    told = Told({C: FRONT}, {})
    first = {member.cgroup: member for member in members(listed, ROOT, told, policies, "default", {})}
    told.containers.update({C: replace(FRONT, container="renamed"), D: replace(FRONT, container="late")})
    told.pods[UID] = WEB
    listed = {**listed, POD / ("e" * 64): 5}
    made = {m.cgroup: m for m in members(listed, ROOT, told, policies, "default", first, settled=True)}
    assert made[3] is first[3]
    assert [made[number].names.pod for number in (2, 4, 5)] == ["web-0", "web-0", "web-0"]
    assert [made[number].choice.policy for number in (1, 2, 3, 4, 5)] == ["default", "shop", "shop", "shop", "shop"]


def test_a_managed_parent_is_under_the_default_whatever_selects_it() -> None:
    made = found(told=Told(), policies=(("everything", Selector(cgroups=("*",))),))[ROOT]
    assert (made.choice, made.identity, made.is_parent, made.named) == (
        Choice("default", Why.DEFAULT),
        None,
        True,
        True,
    )


def test_structure_and_what_is_inside_a_container_are_no_members() -> None:
    paths = (ROOT / "burstable", POD, POD / C, POD / C / "init.scope", POD / C / "init.scope" / D)
    assert found(*paths, told=Told()).keys() == {ROOT, POD, POD / C}


def test_a_container_by_its_names() -> None:
    made = found(POD, POD / C, told=Told({C: FRONT}, {UID: WEB}), policies=(("fronts", FRONTS), ("shop", SHOP)))
    assert (made[POD / C].choice.policy, made[POD / C].names, made[POD / C].named) == ("fronts", FRONT, True)
    assert not made[POD / C].is_parent


def test_a_pod_has_the_policy_of_its_next_container() -> None:
    """Whose name nobody knows: no selector of container names decides."""
    made = found(POD, told=Told({}, {UID: WEB}), policies=(("fronts", FRONTS), ("shop", SHOP)))[POD]
    assert (made.choice.policy, made.is_parent, made.named) == ("shop", True, True)


def test_a_container_before_its_name_has_come_has_its_pod_s() -> None:
    made = found(POD / C, told=Told({}, {UID: WEB}), policies=(("fronts", FRONTS), ("shop", SHOP)))[POD / C]
    assert (made.choice.policy, made.names.pod, made.names.container, made.named) == ("shop", "web-0", None, False)


def test_before_the_cri_answers_everything_is_under_the_default() -> None:
    made = found(POD, POD / C, told=Told(), policies=(("shop", SHOP),))
    assert {member.choice.policy for member in made.values()} == {"default"}
    assert not made[POD].named
    assert not made[POD / C].named


@pytest.mark.parametrize("asked", ["strict", "nonsense"])
def test_the_annotation_of_a_pod_is_that_of_its_containers(asked: str) -> None:
    annotations = {"weir.dev/policy": asked}
    told = Told(
        {C: Names("shop", "web-0", "front", {}, annotations)}, {UID: Names("shop", "web-0", None, {}, annotations)}
    )
    made = found(POD, POD / C, told=told, policies=(("shop", SHOP), ("strict", None)))
    wanted = "strict" if asked == "strict" else "default"
    assert {made[POD].choice.policy, made[POD / C].choice.policy} == {wanted}
    assert all(("nonsense" in made[path].choice.problem) == (asked == "nonsense") for path in (POD, POD / C))


@pytest.mark.parametrize("name", [f"libpod-{C}.scope", f"docker-{C}.scope", "worker"])
def test_who_is_no_container_of_the_cri_s_is_never_asked_about(name: str) -> None:
    """A user of the host could give a cgroup another's id: it would have that one's names and policy."""
    root = PurePosixPath("machine.slice")
    made = found(root / name, told=Told({C: FRONT, "": FRONT}), policies=(("shop", SHOP),), root=root)[root / name]
    assert (made.names, made.choice.policy, made.named) == (Names(), "default", True)


def test_a_plain_cgroup_by_its_path() -> None:
    root = PurePosixPath("tenants")
    policies = (("ones", Selector(cgroups=("/tenants/one*",))),)
    made = found(root / "one", root / "two", root / "one/inner", told=Told(), policies=policies, root=root)
    assert {path.name: member.choice.policy for path, member in made.items()} == {
        "tenants": "default",
        "one": "ones",
        "two": "default",
    }


def test_the_label_says_who_it_is() -> None:
    member = found(POD / C, told=Told({C: FRONT}))[POD / C]
    assert json.loads(member.label) == {
        "cgroup": f"/{POD / C}",
        "namespace": "shop",
        "pod": "web-0",
        "container": "front",
        "id": C,
        "runtime": "",
    }


any_text = st.text(st.characters(min_codepoint=1), max_size=2000)  # surrogates too: bytes that are not UTF-8


@given(any_text, any_text, any_text)
def test_a_label_fits_and_can_be_read_whatever_the_names(path: str, pod: str, number: str) -> None:
    identity = Identity(Kind.CONTAINER, "containerd", number)
    names = Names("shop", pod, "front")
    member = Member(PurePosixPath("root", path), 1, identity, names, Choice("default", Why.DEFAULT))
    assert len(member.label.encode()) < LABELS
    known = json.loads(member.label)
    assert known["namespace"] == "shop"
    assert f"/{member.path}".endswith(known["cgroup"].removeprefix("…"))
    if len(json.dumps(path + pod + number)) < 800:
        assert (known["pod"], known["id"]) == (pod, number)
