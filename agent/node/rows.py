"""Members → the rows that are shown; pure."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from agent.kernel.seam import Enrolment
from agent.node.members import Member
from agent.node.state import Row

NO_PLACE = "there is no room for an entry of its own: its parent's policy is in force, and it counts with its parent"


@dataclass(frozen=True)
class Filters:
    """How many of a container's processes have a seccomp filter."""

    filtered: int = 0
    processes: int = 0


@functools.cache
def layers(hooks: bool, seccomp: bool) -> Mapping[str, bool]:
    """The same object for the same answer: thousands of rows share four."""
    return {"hooks": hooks, "packets": hooks, "seccomp": seccomp, "lsm": False}


def row(
    member: Member,
    present: Mapping[int, Enrolment],
    covered: Mapping[PurePosixPath, bool],
    nested: Iterable[int],
    filters: Filters,
) -> Row:
    """One member. ``covered``: whether each managed parent is enrolled and has all programs.

    ``nested`` are the enrolled cgroups inside the member. One without an entry of its own is under its parent's.
    """
    identity = member.identity
    hooks = any(holds for root, holds in covered.items() if member.path.is_relative_to(root))
    return Row(
        f"/{member.path}",
        tuple(number for number in (member.cgroup, *nested) if number in present),
        member.names.namespace or "",
        member.names.pod or "",
        member.names.container or "",
        identity.id if identity else "",
        identity.runtime if identity else "",
        member.choice.policy,
        member.choice.problem or ("" if member.cgroup in present else NO_PLACE),
        layers(hooks, 0 < filters.processes == filters.filtered),
        filters.processes,
        filters.filtered,
    )


def words(member: Member) -> dict[str, str]:
    """What the log says of a member."""
    names = member.names
    known = {"namespace": names.namespace, "pod": names.pod, "container": names.container}
    return {key: value for key, value in known.items() if value} | {"policy": member.choice.policy}
