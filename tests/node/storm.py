"""Many cgroups in a short time: made and removed, some with a process that tries what is forbidden."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.node.faults import EACCES, Node


@dataclass
class Storm:
    """``made`` cgroups so far, in ``seconds``; ``ends`` are the exit codes of the attempts."""

    root: Path
    made: int = 0
    seconds: float = 0.0
    ends: list[int] = field(default_factory=list)

    def blow(self, count: int, pace: float = 0.0, living: int = 20) -> None:
        """Make and remove so many cgroups, ``living`` at a time; ``pace``: at most so many a second, 0 for no limit."""
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
                if pace and number % 50 == 0:
                    time.sleep(max(0.0, number / pace - (time.monotonic() - began)))
        finally:
            for path in alive:
                path.rmdir()
        self.seconds += time.monotonic() - began


@contextmanager
def attempts(here: Node, storm: Storm) -> Iterator[None]:
    """Beside the `with`: one cgroup after the other whose first act is a connect that no policy allows."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            name = f"attempt-{len(storm.ends)}"
            path = here.cgroup(name)
            command = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
            done = subprocess.run(
                ["/bin/sh", "-c", command, path, here.probe, "udp", str(here.wall.port)],
                stderr=subprocess.DEVNULL,
                check=False,
            )
            storm.ends.append(done.returncode)
            here.refusals[name] += done.returncode == EACCES
            with suppress(OSError):  # its process is not quite gone: the site removes it at the end
                os.rmdir(path)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
