"""Containers that are gone: their last values stay for a while, so that no scrape misses their tail."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from agent import names
from agent.controller import Controller
from agent.kernel.seam import Kernel
from agent.node.log import log
from agent.node.members import Member, Namer, names_of
from agent.node.state import Row


class Gone:
    """Rows by the cgroup id that their container had. Not for use by several threads."""

    def __init__(self, kernel: Kernel, controller: Controller, namer: Namer, retain: float) -> None:
        self._kernel = kernel
        self._controller = controller
        self._namer = namer
        self._retain = retain
        self._rows: dict[int, Row] = {}
        self._nameless: dict[int, Member] = {}  # the CRI lists a container after its end
        self._leaving: dict[int, Row] = {}

    def rows(self) -> tuple[Row, ...]:
        """Those to show."""
        return tuple(self._rows.values())

    def ids(self) -> set[int]:
        """Every cgroup id that counts for one of them."""
        return {number for row in (*self._rows.values(), *self._leaving.values()) for number in row.cgroup_ids}

    def add(self, member: Member, row: Row) -> None:
        """A member that is gone, and what it was last."""
        self._rows[member.cgroup] = replace(row, gone=time.monotonic())
        if not member.named:
            self._nameless[member.cgroup] = member

    def remember(self, cgroup: int, label: str | None, path: PurePosixPath | None) -> None:
        """An enrolled cgroup that was gone before it was a member, what an earlier agent called it, and where it was seen."""
        known = names.label(label)
        self._rows[cgroup] = Row(
            known.get("cgroup", f"/{path}" if path else f"(gone: id {cgroup})"),
            (cgroup,),
            known.get("namespace", ""),
            known.get("pod", ""),
            known.get("container", ""),
            known.get("id", ""),
            known.get("runtime", ""),
            gone=time.monotonic(),
        )

    def back(self, living: Mapping[int, Member]) -> None:
        """These are there after all: a look had failed to see them. What is gone for good is withdrawn, they may not be."""
        for number in [*(self._rows.keys() & living.keys()), *(self._leaving.keys() & living.keys())]:
            self._rows.pop(number, None)
            self._leaving.pop(number, None)
            self._nameless.pop(number, None)

    def name(self) -> None:
        """Give names that have come after the end."""
        for number, member in list(self._nameless.items()):
            if member.identity is None or number not in self._rows:
                del self._nameless[number]
                continue
            found, named = names_of(member.identity, self._namer)
            if named:
                late = replace(self._nameless.pop(number), names=found)
                row = self._rows[number]
                known = (found.namespace or "", found.pod or "", found.container or "")
                self._rows[number] = replace(row, namespace=known[0], pod=known[1], container=known[2])
                self._kernel.label(number, late.label)

    def forget(self, living: Mapping[PurePosixPath, Member]) -> None:
        """Let those go whose time is over: first out of sight, and at the next call out of the kernel.

        So no scrape shows one at 0. ``living``: members by path; where one has the path of one that goes (a service
        that was started again), the counts go on with it, since both are one series: at once, or it would fall.
        """
        self._withdraw(self._leaving)
        now = time.monotonic()
        late = {n: row for n, row in self._rows.items() if row.gone is not None and now - row.gone >= self._retain}
        again = {number: living.get(PurePosixPath(row.cgroup[1:])) for number, row in late.items()}
        self._leaving = {number: self._rows.pop(number) for number, into in again.items() if into is None}
        if any(again.values()):
            self._kernel.sweep()
        for number, into in again.items():
            if into:
                self._controller.fold(late[number].cgroup_ids, into.cgroup)
                log.debug("forgotten", cgroup=self._rows.pop(number).cgroup)

    def make_room(self, wanted: int) -> None:
        """Let so many of them go now, the oldest."""
        rows = dict([*self._leaving.items(), *self._rows.items()][:wanted])
        for number in rows:
            self._leaving.pop(number, None)
            self._rows.pop(number, None)
        self._withdraw(rows)

    def _withdraw(self, rows: Mapping[int, Row]) -> None:
        ids = [number for row in rows.values() for number in row.cgroup_ids]
        if ids:
            self._controller.withdraw_all(ids)
        for row in rows.values():
            log.debug("forgotten", cgroup=row.cgroup)
