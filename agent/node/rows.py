"""Members → the rows that are shown; pure."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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
    nested: Iterable[int],
    filters: Filters,
    *,
    hooks: bool,
    before: Row | None = None,
) -> Row:
    """One member. ``hooks``: whether its managed parent is enrolled and has all programs.

    ``nested`` are the enrolled cgroups inside the member. One without an entry of its own is under its parent's.
    ``before`` is the row that the same member had last: it is returned when nothing else has changed either.
    """
    identity = member.identity
    ids = tuple(number for number in (member.cgroup, *nested) if number in present)
    covered = layers(hooks, 0 < filters.processes == filters.filtered)
    counted = (filters.processes, filters.filtered)
    if (
        before
        and before.layers is covered
        and (before.processes, before.filtered) == counted
        and before.cgroup_ids == ids
    ):
        return before
    return Row(
        f"/{member.path}",
        ids,
        member.names.namespace or "",
        member.names.pod or "",
        member.names.container or "",
        identity.id if identity else "",
        identity.runtime if identity else "",
        member.choice.policy,
        member.choice.problem or ("" if member.cgroup in present else NO_PLACE),
        covered,
        *counted,
    )


def words(member: Member) -> dict[str, str]:
    """What the log says of a member."""
    names = member.names
    known = {"namespace": names.namespace, "pod": names.pod, "container": names.container}
    return {key: value for key, value in known.items() if value} | {"policy": member.choice.policy}
