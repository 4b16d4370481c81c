"""Which members are not as they shall be, and how each is to be enrolled; pure."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from agent.controller import KEPT, Placement
from agent.kernel.abi import Flag
from agent.kernel.seam import Enrolment
from agent.node.members import Member


def different(
    members: Mapping[PurePosixPath, Member],
    versions: Mapping[str, tuple[int, Flag]],
    inside: Mapping[int, Iterable[int]],
    present: Mapping[int, Enrolment],
) -> list[Placement]:
    """What is to be written, the deepest first. ``members`` by path; ``versions``: number and flags by policy.

    ``inside``: container → the enrolled cgroups nested in it. A member whose policy has no version stays as it is.
    """
    found = []
    for member in members.values():
        version = versions.get(member.choice.policy)
        nested = tuple(inside.get(member.cgroup, ()))
        if version and _differs(member, *version, nested, present):
            found.append((member, Placement(member.cgroup, *version, _how(member, members, present), nested)))
    return [placement for member, placement in sorted(found, key=lambda item: -len(item[0].path.parts))]


def _differs(
    member: Member, version: int, flags: Flag, nested: Iterable[int], present: Mapping[int, Enrolment]
) -> bool:
    entry = present.get(member.cgroup)
    if entry is None or entry.policy != version or _of_policy(entry.flags) != flags:
        return True
    if member.is_parent and not entry.flags & Flag.PARENT:
        return True
    within = [present[number] for number in nested if number in present]
    return any((one.slot, one.policy) != (entry.slot, entry.policy) for one in within)


@functools.cache
def _of_policy(flags: Flag) -> Flag:
    """Few combinations occur, and masking a Flag takes longer than all else about an entry."""
    return flags & ~KEPT


def _how(member: Member, members: Mapping[PurePosixPath, Member], present: Mapping[int, Enrolment]) -> Flag:
    """Born under a managed parent, a container can have no socket of unknown origin; found running, it may."""
    if member.identity is None:
        return Flag.PARENT
    if member.cgroup in present:  # how it was enrolled stays
        return Flag.PARENT if member.is_parent else Flag(0)
    above = (present.get(members[path].cgroup) for path in member.path.parents if path in members)
    born = any(entry and entry.flags & Flag.PARENT for entry in above)
    return (Flag.PARENT if member.is_parent else Flag(0)) | (Flag.BORN if born else Flag(0))
