"""What is in force on this host and what it has counted, for machines: the facts of `weir status` and `weir top`.

The kernel's tables say what is in force. An agent adds what only it knows: which cgroups are a container, the names, why
a policy is not the one asked for, and how the agent itself is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from agent import names
from agent.cgroups import tree
from agent.kernel.abi import PROGRAMS, Flag
from agent.kernel.seam import NOTHING, Enrolment, Kernel, Reading, Refused, total
from agent.node.state import NodeState, Row
from agent.place import Place


def gather(place: Place, kernel: Kernel, state: NodeState | None = None) -> dict[str, Any]:
    """Everything that status shows. ``state`` is what the agent knows, None where there is no agent.

    One item of ``cgroups`` for each container of the state, and one for each enrolled cgroup that belongs to none.
    ``monotonic`` is the time of the counters, in seconds of CLOCK_MONOTONIC.
    """
    build = kernel.build()
    node = {"node": node_data(state)} if state else {}
    if build is None:
        return {"loaded": False, "other_versions": place.pins.foreign(), "cgroups": [], "maps": {}, **node}
    reading, now, paths = kernel.read(), time.monotonic(), place.living()
    hooked = hooks(paths, kernel.attached(), place.root)
    labels = {} if state else kernel.labels()
    facts = Facts(place.root, reading, paths, hooked, refused_by_slot(reading.refusals), labels)
    groups = grouped(reading.enrolments, state.rows if state else ())
    return {
        "loaded": True,
        "build": f"{build.build:016x}",
        "errno": "EACCES" if build.has_retval else "EPERM",
        "monotonic": now,
        "cgroups": sorted((facts.item(group) for group in groups), key=_order),
        "maps": {name: {"entries": n, "capacity": size} for name, (n, size) in kernel.max_capacity().items()},
        **node,
    }


def _order(data: Mapping[str, Any]) -> tuple[str, str]:
    return names.who(data), str(data["cgroup"])


@dataclass(frozen=True)
class Group:
    """The enrolled cgroups that are shown as one, the one that gives its name first; ``row`` where the agent knows it."""

    cgroup_ids: tuple[int, ...]
    row: Row | None = None


def grouped(enrolments: Mapping[int, Enrolment], rows: tuple[Row, ...]) -> Iterator[Group]:
    """Each container with its enrolled cgroups, and each enrolled cgroup that is in none of them.

    A container that is gone is left out when nothing of it is enrolled any more.
    """
    taken: set[int] = set()
    for row in rows:
        enrolled = tuple(number for number in row.cgroup_ids if number in enrolments)
        if enrolled or row.gone is None:
            taken.update(enrolled)
            yield Group(enrolled or row.cgroup_ids[:1], row)
    for number in enrolments:
        if number not in taken:
            yield Group((number,))


def hooks(paths: Mapping[int, Path], attached: Mapping[int, frozenset[str]], root: Path) -> frozenset[int]:
    """The ids of the cgroups that have all programs attached, to themselves or to a cgroup above them."""
    complete = {paths[number] for number, programs in attached.items() if programs >= set(PROGRAMS) and number in paths}
    return frozenset(
        number
        for number, path in paths.items()
        if path in complete or any(parent in complete for parent in path.parents if parent.is_relative_to(root))
    )


def refused_by_slot(refusals: Mapping[Refused, int]) -> dict[int, Counter[Refused]]:
    """Refusal counters by slot; their keys have slot 0, so that those of a container's slots add up."""
    found: dict[int, Counter[Refused]] = {}
    for refused, count in refusals.items():
        found.setdefault(refused.slot, Counter())[replace(refused, slot=0)] += count
    return found


@dataclass(frozen=True)
class Facts:
    """One look at the kernel. ``paths``: cgroup id → directory; ``hooked``: as ``hooks`` says.

    ``labels`` is what an agent that does not run now has called the cgroups.
    """

    root: Path
    reading: Reading
    paths: Mapping[int, Path]
    hooked: frozenset[int]
    by_slot: Mapping[int, Mapping[Refused, int]]
    labels: Mapping[int, str]

    @cached_property
    def enrolled(self) -> Mapping[Path, Enrolment]:
        """The enrolments by directory."""
        entries = self.reading.enrolments.items()
        return {self.paths[number]: enrolment for number, enrolment in entries if number in self.paths}

    def covering(self, number: int) -> Enrolment | None:
        """The enrolment that a cgroup is under: its own, or that of the nearest cgroup above it that has one."""
        path, enrolments = self.paths.get(number), self.reading.enrolments
        if path is None or number in enrolments:
            return enrolments.get(number)
        return next((self.enrolled[parent] for parent in path.parents if parent in self.enrolled), None)

    def item(self, group: Group) -> dict[str, Any]:
        """One container or cgroup."""
        row, number = group.row, group.cgroup_ids[0] if group.cgroup_ids else 0
        path, enrolment = self.paths.get(number), self.covering(number)
        version = self.reading.versions.get(enrolment.policy) if enrolment else None
        enrolments = self.reading.enrolments
        slots = {enrolments[one].slot for one in group.cgroup_ids if one in enrolments}
        counters = total([self.reading.counters.get(slot, NOTHING) for slot in slots])
        refusals: Counter[Refused] = Counter()
        for slot in slots:
            refusals.update(self.by_slot.get(slot, {}))
        filtered, processes = (row.filtered, row.processes) if row else seccomp(path) if path else (0, 0)
        flags, hook = enrolment.flags if enrolment else Flag(0), number in self.hooked
        gone = path is None if row is None else row.gone is not None
        open_ends = not_covered(flags, hook, bool(enrolment), filtered < processes, bool(version))
        label = names.label(self.labels.get(number))
        told = {key: getattr(row, key) for key in (*names.WHO, "id", "runtime", "problem")} if row else label
        known = {key: value for key, value in told.items() if value and key != "cgroup"}
        return {
            "cgroup": row.cgroup if row else names.cgroup_name(path, self.root, number, label.get("cgroup", "")),
            "cgroup_id": number,
            **known,
            "gone": gone,
            "policy": version.name if version else None,
            "sha256": version.sha256.hex() if version else None,
            "mode": names.mode(flags) if version else "refuse all" if enrolment else "none",
            "layers": {
                "hooks": hook,
                "packets": hook,
                "seccomp": f"{filtered}/{processes}",
                "lsm": bool(row and row.layers.get("lsm")),
            },
            "not_covered": [] if gone else open_ends,
            "bytes": counters.bytes,
            "packets": counters.packets,
            "sockets": counters.sockets_created - counters.sockets_released,
            "sockets_adopted": counters.sockets_adopted,
            "events_lost": counters.events_lost + counters.events_suppressed,
            "refusals_uncounted": counters.refusals_uncounted,
            "refused": names.refusals(refusals, self.reading.versions),
        }


def seccomp(path: Path) -> tuple[int, int]:
    """(Processes with a seccomp filter, processes) of a cgroup, from /proc/PID/status."""
    filtered = total = 0
    for pid in tree.processes(path):
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue  # ended while we looked
        total += 1
        filtered += "\nSeccomp:\t2\n" in text
    return filtered, total


def not_covered(flags: Flag, hooks: bool, enrolled: bool, unfiltered: bool, has_policy: bool) -> list[str]:
    """What the layers in force leave open, in plain sentences."""
    if not hooks:
        return ["EVERYTHING: the programs are not attached to this cgroup or a parent of it."]
    if not enrolled:
        return ["EVERYTHING: neither this cgroup nor a parent of it is under a policy."]
    if not has_policy:
        return []
    open_ends = names.not_in_force(flags)
    if unfiltered:
        open_ends.insert(0, "Processes without a seccomp filter can open sockets that are neither inet nor inet6.")
    return open_ends


def node_data(state: NodeState) -> dict[str, Any]:
    """A NodeState for machines. ``gone`` is how many seconds ago, null for what runs."""
    now = time.monotonic()
    return {
        "rows": [row_data(row, now) for row in state.rows],
        "policies": [asdict(policy) for policy in state.policies],
        "reloads": {
            "successes_total": state.reloads.successes_total,
            "failures_total": state.reloads.failures_total,
            "last_success": state.reloads.last_success,
            "failures": dict(state.reloads.failures),
        },
        "roots": list(state.roots),
        "default": state.default,
        "cri": state.cri,
        "not_ready": list(state.not_ready),
    }


def row_data(row: Row, now: float) -> dict[str, Any]:
    """A Row for machines. ``now`` is time.monotonic()."""
    return {
        **vars(row),
        "cgroup_ids": list(row.cgroup_ids),
        "layers": dict(row.layers),
        "gone": None if row.gone is None else max(0.0, now - row.gone),
    }
