"""What members are called, beside their entries in the kernel: a later agent reads it of those that are gone by then."""

from __future__ import annotations

from collections.abc import Mapping

from agent.errors import WeirError
from agent.kernel.seam import Enrolment, Kernel
from agent.node.members import Member


class Labels:
    """``earlier``: by cgroup id what an earlier agent wrote, of those that this one has not seen."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._written: dict[int, Member] = {}
        self.earlier: dict[int, str] = {}

    def adopt(self) -> None:
        """Read what an earlier agent wrote; what belongs to no entry goes."""
        self.earlier = dict(self._kernel.labels())
        for number in self.earlier.keys() - self._kernel.enrolments().keys():
            self._kernel.label(number, "")

    def write(self, members: Mapping[int, Member], present: Mapping[int, Enrolment], troubles: list[str]) -> None:
        """Write what differs, for those that have an entry; ``troubles`` gets a sentence for what cannot be written."""
        current = {number: member for number, member in members.items() if number in present}
        for number, member in current.items():
            if self._written.get(number) != member:
                try:
                    text = member.label
                    if self.earlier.get(number) != text:
                        self._kernel.label(number, text)
                    self._written[number] = member
                except WeirError as e:
                    troubles.append(e.message)
        self.earlier = {n: text for n, text in self.earlier.items() if n in present and n not in self._written}
        self._written = {n: member for n, member in self._written.items() if n in current}
