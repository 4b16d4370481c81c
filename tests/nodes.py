"""Made-up nodes of any size: the facts of the agent, for tests and measurements of what it shows."""

from __future__ import annotations

from collections.abc import Iterable

from agent.kernel.abi import PROGRAMS, Flag, Hook, Reason
from agent.kernel.seam import Build, Counters, Enrolment, Reading, Refused, RuleName, Version
from agent.metrics import Sources
from agent.node.state import LAYERS, NodeState, PolicyState, Row

SHA = "ab" * 32
VERSION = Version("appengine", bytes.fromhex(SHA), Flag(0), (RuleName("smtp", 12, True), RuleName("web", 15, False)))
BUILD = Build(build=0xFEED, has_retval=True, capacity=4096)
ROOT = "/kubepods.slice"


def counted(bytes_: int = 0, **others: int) -> Counters:
    """Counters with so many bytes for each destination, and a tenth of that in packets."""
    return Counters(
        bytes={"public": bytes_, "private": bytes_, "loopback": bytes_},
        packets={"public": bytes_ // 10, "private": bytes_ // 10, "loopback": bytes_ // 10},
        **{
            "sockets_created": 0,
            "sockets_released": 0,
            "sockets_adopted": 0,
            "events_suppressed": 0,
            "events_lost": 0,
            "refusals_uncounted": 0,
            **others,
        },
    )


def refusal(slot: int, rule: int | None = 0, policy: int = 1, audited: bool = False) -> Refused:
    """A connect() that a rule refused."""
    return Refused(slot, policy, Hook.CONNECT, Reason.RULE, rule, audited)


def cgroup(number: int) -> str:
    """A cgroup path as long as those of a kubelet with the systemd driver."""
    pod = f"kubepods-burstable-pod{number:08x}_1111_2222_3333_444455556666.slice"
    return f"{ROOT}/kubepods-burstable.slice/{pod}/cri-containerd-{number:064x}.scope"


def row(number: int, *nested: int, **others: object) -> Row:
    """A container whose cgroup has this number as its id."""
    facts: dict[str, object] = {
        "cgroup": cgroup(number),
        "cgroup_ids": (number, *nested),
        "namespace": f"team-{number % 50}",
        "pod": f"web-{number:05}",
        "container": "php",
        "id": f"{number:064x}",
        "policy": "appengine",
        "layers": dict.fromkeys(LAYERS, True),
    }
    return Row(**{**facts, **others})  # type: ignore[arg-type]


def reading(slots: dict[int, int], counters: dict[int, Counters], refusals: dict[Refused, int]) -> Reading:
    """``slots``: cgroup id → slot, all under one version."""
    entries = {number: Enrolment(slot, 1, Flag(0)) for number, slot in slots.items()}
    return Reading(entries, counters, refusals, {1: VERSION})


def state(rows: Iterable[Row]) -> NodeState:
    """A node that is ready, with one managed parent whose id is 1."""
    parent = Row(ROOT, (1,), policy="appengine", layers=dict.fromkeys(LAYERS, True))
    policies = (PolicyState("appengine", "appengine.yaml", SHA, "enforce"),)
    return NodeState((parent, *rows), policies, roots=(ROOT,), default="appengine", not_ready=())


def node(containers: int) -> tuple[NodeState, Reading]:
    """A node with so many containers, each of which sent something and was refused something."""
    numbers = range(2, containers + 2)
    numbers_and_root = range(1, containers + 2)
    return state([row(number) for number in numbers]), reading(
        {number: number for number in numbers_and_root},
        {number: counted(number * 12345) for number in numbers_and_root},
        {refusal(number): number for number in numbers},
    )


def sources(now: NodeState, read: Reading) -> Sources:
    """Facts that never change."""
    return Sources(
        state=lambda: now,
        read=lambda: read,
        maps=lambda: {"cgroups": (len(read.enrolments), BUILD.capacity)},
        attached=lambda: {1: frozenset(PROGRAMS)},
        build=lambda: BUILD,
        reported=lambda: 3,
    )
