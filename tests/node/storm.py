"""Many cgroups in a short time: made and removed, some with a process that tries what is forbidden; what the pages say of those."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.kernel.site import remove
from tests.meanwhile import meanwhile
from tests.node.agent import Scrape
from tests.node.faults import EACCES, Node, id_of
from tests.node.probe import run_in


@dataclass
class Storm:
    """``made`` cgroups so far, in ``seconds``."""

    root: Path
    made: int = 0
    seconds: float = 0.0

    def blow(self, count: int, living: int = 20) -> None:
        """Make and remove so many cgroups as fast as it goes, ``living`` at a time."""
        began = time.monotonic()
        alive: list[Path] = []
        try:
            for number in range(count):
                path = (
                    self.root / f"storm-{self.made}{'.slice' if number % 2 else ''}"
                )  # below a slice can be containers
                path.mkdir()
                self.made += 1
                alive.append(path)
                if len(alive) > living:
                    alive.pop(0).rmdir()
        finally:
            for path in alive:
                path.rmdir()
        self.seconds += time.monotonic() - began


@dataclass
class Attempts:
    """Cgroups whose first and last act is a connect that no policy allows; ``ends`` are its exit codes.

    ``seen`` are the refusals on pages, by cgroup: each is on one at least, as long as the last values of the gone stay
    for longer than it takes from one scrape to the next. ``names`` are those of the gone whose names nobody knows.
    """

    here: Node
    ends: list[int] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    names: dict[str, str] = field(default_factory=dict)

    def make(self, name: str) -> None:
        """One more, from its birth to its end."""
        path = self.here.cgroup(name)
        self.names[f"(gone: id {id_of(path)})"] = self.here.label(name)
        self.ends.append(run_in(path, self.here.probe, "udp", str(self.here.wall.port)).returncode)
        self.here.refusals[name] += self.ends[-1] == EACCES
        remove(path)

    def look(self, page: Scrape) -> bool:
        """Note what a page says; whether every refusal has been seen.

        One that found no spare slot counts with the parent. The page's other thousands of samples are not looked at.
        """
        parent = re.escape(self.here.site.parent)
        who = rf"/{parent}(?:/attempt-\d+)?|\(gone: id \d+\)"
        for cgroup, count in re.findall(
            rf'^weir_refused_total{{.*cgroup="({who})".*}} (\S+)$', page.page, re.MULTILINE
        ):
            name = self.names.get(cgroup, cgroup)
            self.seen[name] = max(self.seen[name], int(float(count)))
        return self.seen.total() == len(self.ends)


@contextmanager
def attempts(here: Node) -> Iterator[Attempts]:
    """One after the other beside the `with`."""
    made, numbers = Attempts(here), itertools.count()
    with meanwhile(lambda: made.make(f"attempt-{next(numbers)}")):
        yield made
