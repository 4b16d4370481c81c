"""From two readings of what is counted to what happens a second: the rows of `weir top`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from agent import names

Key = tuple[str | None, str, str, bool]
"""What a refusal counter of `weir status` counts: policy, hook, rule, audited."""


class Sort(str, Enum):
    """What the table is sorted by; all but names with the largest first."""

    PUBLIC = "public"
    PRIVATE = "private"
    LOOPBACK = "loopback"
    REFUSED = "refused"
    NAME = "name"


@dataclass(frozen=True)
class RuleRate:
    """Refusals (or audits) a second by one rule at one hook."""

    policy: str | None
    hook: str
    rule: str
    audited: bool
    per_second: float


@dataclass(frozen=True)
class Row:
    """One container or cgroup. ``public``, ``private`` and ``loopback`` are bytes a second, ``refused`` refusals a second.

    ``rules`` has those that refused in between, the busiest first. ``hooks`` False: no rule is in force there, unless it is
    ``gone`` and its last values stay for a while.
    """

    name: str
    cgroup: str
    cgroup_id: int
    policy: str | None
    mode: str
    gone: bool
    hooks: bool
    seccomp: str
    lsm: bool
    sockets: int
    public: float
    private: float
    loopback: float
    refused: float
    rules: tuple[RuleRate, ...]

    def as_data(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Row]:
    """What happened between two answers of agent.status.gather, for each container or cgroup of the later one.

    A counter that is smaller than before began anew, so all that it shows has happened since; what was not there before
    has counted since it came. So no rate is ever negative.
    """
    if not after["loaded"]:
        return []
    seconds = max(after["monotonic"] - before.get("monotonic", after["monotonic"]), 1e-3)
    known = {item["cgroup_id"]: item for item in before["cgroups"]}
    return [row(known.get(item["cgroup_id"]), item, seconds) for item in after["cgroups"]]


def row(before: Mapping[str, Any] | None, after: Mapping[str, Any], seconds: float) -> Row:
    """One container or cgroup; ``before`` None when it was not there."""
    sent = before["bytes"] if before else {}
    rate = {kind: increase(sent.get(kind, 0), count) / seconds for kind, count in after["bytes"].items()}
    refused, earlier = counted(after["refused"]), counted(before["refused"] if before else ())
    by_rule = {key: increase(earlier.get(key, 0), count) / seconds for key, count in refused.items()}
    rules = (RuleRate(*key, per_second) for key, per_second in by_rule.items() if per_second)
    return Row(
        name=names.who(after) or after["cgroup"],
        cgroup=after["cgroup"],
        cgroup_id=after["cgroup_id"],
        policy=after["policy"],
        mode=after["mode"],
        gone=after["gone"],
        hooks=after["layers"]["hooks"],
        seccomp=after["layers"]["seccomp"],
        lsm=after["layers"]["lsm"],
        sockets=after["sockets"],
        public=rate["public"],
        private=rate["private"],
        loopback=rate["loopback"],
        refused=sum(by_rule.values()),
        rules=tuple(sorted(rules, key=lambda one: -one.per_second)),
    )


def counted(refused: Iterable[Mapping[str, Any]]) -> dict[Key, int]:
    """The refusal counters of one container, those of several reasons or versions of a policy added up."""
    found: dict[Key, int] = {}
    for one in refused:
        key = (one["policy"], one["hook"], one["rule"], one["audited"])
        found[key] = found.get(key, 0) + one["count"]
    return found


def increase(before: int, after: int) -> int:
    """By how much a counter has grown; one that is smaller than before began anew at 0."""
    return after - before if after >= before else after


def arranged(found: Iterable[Row], sort: Sort, text: str = "") -> list[Row]:
    """The rows whose name, cgroup or policy contains ``text`` (in capitals or not), sorted."""
    wanted = text.lower()
    kept = [one for one in found if any(wanted in (part or "").lower() for part in (one.name, one.cgroup, one.policy))]
    if sort is Sort.NAME:
        return sorted(kept, key=lambda one: one.name)
    return sorted(kept, key=lambda one: (-getattr(one, sort.value), one.name))


def total(found: Sequence[Row], kind: str) -> float:
    """The sum over rows of one of their rates."""
    return float(sum(getattr(one, kind) for one in found))
