"""What a runtime leaves when it is killed, and taking it away: processes, mounts and cgroups of one test's own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

_PATIENCE = 300.0  # seconds; the kernel takes milliseconds


def wait(what: str, done: Callable[[], bool], pause: float = 0.005) -> None:
    """Wait until ``done()`` is true. Raises AssertionError that names ``what`` after a long while."""
    end = time.monotonic() + _PATIENCE
    while not done():
        assert time.monotonic() < end, f"still waiting for: {what}"
        time.sleep(pause)


def started_with(argument: str) -> list[int]:
    """Pids of the processes with exactly this argument on their command line, this process excepted."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            if argument.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def descendants(pid: int) -> list[int]:
    """The pids of a process's children, their children and so on."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def alive(pid: int) -> bool:
    """True while a process runs; one that waits for its parent to notice its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def cgroup_of(pid: int) -> str:
    """The cgroup2 path of a process, from the root of the tree: line 0:: of /proc/PID/cgroup, on hybrid hosts too."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))


def kill(pids: list[int]) -> None:
    """Kill processes and wait until they are gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait(f"the end of processes {pids}", lambda: not any(alive(pid) for pid in pids))


def unmount_below(directory: Path) -> None:
    """Take away every mount at or below a directory, newest first."""
    mounts = [line.split()[4].encode().decode("unicode_escape") for line in _mountinfo()]
    for mount in reversed([mount for mount in mounts if Path(mount).is_relative_to(directory)]):
        subprocess.run(["umount", "--lazy", mount], check=True)


def _mountinfo() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def hierarchies() -> Iterator[Path]:
    """Where each cgroup hierarchy is mounted: cgroup2, and on hybrid hosts those of version 1."""
    for line in _mountinfo():
        fields, _, rest = line.partition(" - ")
        if rest.split()[0] in ("cgroup", "cgroup2"):
            yield Path(fields.split()[4])


def remove_cgroups(path: str) -> None:
    """Kill what is in the cgroup ``path`` and below it, and remove it, in every hierarchy; absent ones are passed over.

    The path is a test's own, of the form /weir-test-…: nothing else is touched.
    """
    assert path.startswith("/weir-test-"), f"{path} is not a test's own"
    for directory in _below(path):
        wait(f"the end of cgroup {directory}", partial(_remove, directory))


def remove_empty_cgroups(path: str) -> None:
    """Remove the cgroup ``path`` and those below it, in every hierarchy, as far as no process is in them."""
    for directory in _below(path):
        with suppress(OSError):
            directory.rmdir()


def _below(path: str) -> Iterator[Path]:
    """A cgroup and those below it, in every hierarchy, the innermost first."""
    for root in hierarchies():
        for directory, _, _ in os.walk(root / path.strip("/"), topdown=False):
            yield Path(directory)


def _remove(directory: Path) -> bool:
    """Kill what is in one cgroup and remove it; false while the kernel is still busy with it."""
    with suppress(FileNotFoundError):
        for pid in (directory / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            directory.rmdir()
        except OSError:
            return not directory.exists()
    return True
