"""Enrolled cgroups that are no members: nested in a container, outside every managed parent, or gone unseen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import PurePosixPath

from agent.cgroups import tree
from agent.cgroups.containers import identify
from agent.controller import Controller
from agent.errors import WeirError
from agent.kernel.abi import Flag
from agent.kernel.seam import Enrolment
from agent.node.gone import Gone
from agent.node.members import Member
from agent.place import Place


class Others:
    """``elsewhere``: the path of each that lies in no managed parent. Not for use by several threads."""

    def __init__(self, place: Place, controller: Controller, gone: Gone) -> None:
        self._place = place
        self._controller = controller
        self._gone = gone
        self._nested: dict[int, int] = {}
        self.elsewhere: dict[int, PurePosixPath] = {}

    def inside(self) -> dict[int, list[int]]:
        """Container → the enrolled cgroups nested in it."""
        inside: dict[int, list[int]] = {}
        for nested, container in self._nested.items():
            inside.setdefault(container, []).append(nested)
        return inside

    def forget(self, numbers: Iterable[int]) -> None:
        """These are gone with their container."""
        for number in numbers:
            self._nested.pop(number, None)

    def settle(
        self,
        present: Mapping[int, Enrolment],
        members: Mapping[int, Member],
        roots: Iterable[PurePosixPath],
        labels: Mapping[int, str],
        *,
        full: bool,
    ) -> None:
        """Find out about those of ``present`` that nobody knows. ``labels``: what an earlier agent called them."""
        # Some came before their container was known: since then they are members, or lie in one.
        earlier = {n: p for n, p in self.elsewhere.items() if not full and n not in members and self._is_at(p, n)}
        before, self.elsewhere = self.elsewhere, {}
        known = members.keys() | self._nested.keys() | earlier.keys() | self._gone.ids()
        unknown = present.keys() - known
        self._nested = {n: c for n, c in self._nested.items() if n in present}
        containers = {member.path: number for number, member in members.items()} if earlier or unknown else {}
        for number, relative in earlier.items():
            self._sort(number, relative, roots, containers)
        if not unknown and not (full and self._nested):
            return
        living = self._place.living()
        for number in [n for n in self._nested if n not in living]:
            self._drop(number, present)
        for number in unknown:
            path = living.get(number)
            if path is None:
                if not present[number].flags & Flag.RUN:
                    self._gone.remember(number, labels.get(number), before.get(number))
                continue
            self._sort(number, PurePosixPath(path.relative_to(self._place.root)), roots, containers)

    def _sort(
        self,
        number: int,
        path: PurePosixPath,
        roots: Iterable[PurePosixPath],
        containers: Mapping[PurePosixPath, int],
    ) -> None:
        found = next(filter(None, (identify(path, root) for root in roots)), None)
        container = containers.get(found.path) if found else None
        if found and container and self._is_at(found.path, container):
            self._nested[number] = container
        else:
            self.elsewhere[number] = path

    def _is_at(self, path: PurePosixPath, number: int) -> bool:
        """False when it is gone, or a successor has the name already, of which the watch has not told yet."""
        with suppress(WeirError):
            return tree.cgroup_id(self._place.root / path) == number
        return False

    def _drop(self, number: int, present: Mapping[int, Enrolment]) -> None:
        """A nested cgroup is gone and its container is not: its counts stay, for they are in the container's slot."""
        container = present.get(self._nested[number])
        if container and present[number].slot == container.slot:
            self._controller.withdraw_all([number])
            del self._nested[number]
