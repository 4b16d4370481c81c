"""The policies of a node: a directory, watched, and the last good version of everything in it.

Nothing that happens to the directory opens anything by itself: what is wrong, half-written, or suddenly gone as a whole
changes nothing but ``reloads``. Only a file that is removed while others stay takes its policy with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from agent.errors import WeirError
from agent.node.compiling import TIMEOUT, Answer, Compiling, Loaded, Task
from agent.node.policy_files import File, Look, Stamp, decide, look
from agent.node.state import Reloads
from agent.policy.model import Prefix

SETTLED = 0.1
"""Seconds without a change before files are read: then nobody is in the middle of copying them, and a later change has
another time than the one seen (file systems stamp with the kernel's tick, at most 10 ms)."""

PATIENCE = 5.0
"""Seconds after which files are read although they change all the time."""

RETRY = 10.0
"""Seconds before the next attempt when no process could be started to compile."""

SHIPPED = ""
"""The key of the shipped policy among the answers; no file has it."""


class Directory:
    """Policies in force by their name, in file order; the default is always among them once ``read()`` has returned.

    ``loaded`` and ``reloads`` are replaced, never changed, so that other threads may read them.
    ``resolvers`` is what the set of that name stands for; None takes the host's resolv.conf. The policies' seccomp profiles
    are merged onto ``seccomp_base``.
    """

    def __init__(
        self,
        path: Path,
        default: str,
        resolvers: Sequence[Prefix] | None = None,
        seconds: float = TIMEOUT,
        seccomp_base: Path | None = None,
    ) -> None:
        self.loaded: Mapping[str, Loaded] = {}
        self.reloads = Reloads()
        self._path = path
        self._default = default
        self._resolvers = resolvers
        self._seconds = seconds
        self._seccomp_base = seccomp_base
        self._files: dict[str, File] = {}
        self._shipped: Answer | None = None
        self._seen: Look | None = None  # what ``loaded`` was made of
        self._looked = Look({}, ())  # what is being compiled
        self._compiling: Compiling | None = None
        self._since: float | None = None  # when a difference was seen first
        self._not_before = 0.0

    @property
    def busy(self) -> bool:
        """Whether a change was seen and is not in force yet: call refresh() again within a tenth of a second or so."""
        return self._since is not None

    def read(self) -> bool:
        """Wait until what is in the directory now is in force or found wrong; True when the set changed.

        Raises WeirError when there is no default policy, neither here nor shipped.
        """
        changed = self.refresh()
        while self.busy:
            time.sleep(0.01)
            changed |= self.refresh()
        if self._default not in self.loaded:
            reasons = dict.fromkeys([*self.reloads.failures.values(), self._shipped.problem if self._shipped else ""])
            raise WeirError(
                "\n".join([f"there is no default policy {self._default!r}", *filter(None, reasons)]),
                f"Put it into {self._path}, or name another with --default.",
            )
        return changed

    def refresh(self) -> bool:
        """Look for changes and take the next step towards having them in force; True when the set changed.

        Never waits: compiling goes on in a process of its own while ``busy``. Without a change it costs a stat() a file.
        """
        if self._compiling is None:
            self._begin()
        if self._compiling is None or not self._compiling.ended():
            return False
        done, self._compiling = self._compiling, None
        if self._impatient() or look(self._path) == self._looked:
            return self._finish(done)
        return False  # it changed meanwhile; what was compiled may be half old and half new

    def close(self) -> None:
        """End the process that compiles, if there is one."""
        if self._compiling:
            self._compiling.close()
            self._compiling = None

    def _begin(self) -> None:
        seen, now = look(self._path), time.monotonic()
        if seen == self._seen:
            self._since = None
        elif now >= self._not_before:
            self._since = now if self._since is None else self._since
            if self._impatient() or not 0 <= time.time_ns() - seen.newest < SETTLED * 1e9:
                self._looked = seen
                self._compiling = Compiling(self._tasks(seen), self._resolvers, self._seconds, self._seccomp_base)

    def _impatient(self) -> bool:
        return self._since is not None and time.monotonic() - self._since > PATIENCE

    def _tasks(self, seen: Look) -> list[Task]:
        tasks = [Task(SHIPPED, self._default, shipped=True)] if self._shipped is None else []
        for name, stamp in seen.stamps.items():
            file = self._files.get(name)
            if file is None or file.stamp != stamp:
                tasks.append(Task(name, str(self._path / name), file.digest if file else ""))
        return tasks

    def _finish(self, done: Compiling) -> bool:
        self._since = None
        if done.failure:
            self._not_before = time.monotonic() + RETRY
            return self._take(self.loaded, {**self.reloads.failures, str(self._path): done.failure})
        self._seen = self._looked
        self._shipped = done.answers.get(SHIPPED, self._shipped)
        if self._seen.problem:
            _, problems = decide(self._files)
            problems[str(self._path)] = self._seen.problem
        else:
            files = {
                name: updated(self._files.get(name), stamp, done.answers.get(name))
                for name, stamp in self._seen.stamps.items()
            }
            self._files, problems = decide(files)
        return self._take(*self._with_default(problems))

    def _with_default(self, problems: dict[str, str]) -> tuple[dict[str, Loaded], dict[str, str]]:
        """The policies of the files and, behind them, the last good default when none of the files has it."""
        loaded = {file.good.state.name: file.good for file in self._files.values() if file.good}
        if self._default in loaded:
            return loaded, problems
        shipped = self._shipped.loaded if self._shipped else None
        kept = self.loaded.get(self._default, shipped)
        if kept:
            loaded[self._default] = kept
            if kept is not shipped:
                problems[Path(kept.state.file).name] = (
                    f"the default policy {self._default} is no longer in it; its last good version stays in force\n"
                    "  Put it back, or start the agent with another --default."
                )
        return loaded, problems

    def _take(self, loaded: Mapping[str, Loaded], problems: Mapping[str, str]) -> bool:
        """Put policies in force and count how it went."""
        before = self.reloads
        changed = [*map(id, loaded.values())] != [*map(id, self.loaded.values())]
        if any(before.failures.get(name) != problem for name, problem in problems.items()):
            self.reloads = replace(before, failures_total=before.failures_total + 1, failures=problems)
        elif changed or before.failures != problems:
            count = before.successes_total + 1
            self.reloads = replace(before, successes_total=count, last_success=time.time(), failures=problems)
        self.loaded = loaded
        return changed


def updated(file: File | None, stamp: Stamp, answer: Answer | None) -> File:
    """Return a file with what was found in it; without an answer, or with one about known bytes, it says what it said."""
    file = file or File(stamp)
    if answer is None or not (answer.loaded or answer.problem):
        return replace(file, stamp=stamp)
    present = file.good if answer.loaded == file.good else answer.loaded  # what it was is back: not a change
    return replace(file, stamp=stamp, digest=answer.digest, present=present, wrong=answer.problem)
