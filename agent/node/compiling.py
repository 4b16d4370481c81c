"""Files of policies → what the kernel needs of them, in a process of its own that lives for a second.

The agent stays small: YAML, pydantic and the sources of policies never come into it. And it stays alive: a file on
which the process hangs or dies is named as wrong, and the rest are compiled by another one.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from agent.controller import Compiled
from agent.node.state import PolicyState
from agent.policy.model import Prefix, Selector

TIMEOUT = 60
"""Seconds for one file: the largest that the format allows takes ten."""

STARTED = "started"
"""The first word of the process, once it has imported what it needs."""


@dataclass(frozen=True)
class Loaded:
    """A policy ready for use on a node. ``profile`` is its seccomp profile in JSON; "" when none can be made."""

    compiled: Compiled
    selector: Selector | None
    state: PolicyState
    profile: str = ""


@dataclass(frozen=True)
class Task:
    """A file to compile. ``key`` is what the answer is found by, ``known`` the digest of bytes that need no answer.

    With ``shipped``, ``file`` is the name of a shipped policy.
    """

    key: str
    file: str
    known: str = ""
    shipped: bool = False


@dataclass(frozen=True)
class Answer:
    """A policy, or the problem of a file, or neither of them: the bytes are those known.

    ``digest`` is the SHA-256 of the bytes in hex, empty when they could not be read.
    """

    digest: str
    loaded: Loaded | None = None
    problem: str = ""


class Compiling:
    """The tasks on their way: ask ``ended()`` from time to time, then read ``answers``.

    ``failure`` is a sentence when the process could not be started at all; there are no answers then.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        resolvers: Sequence[Prefix] | None,
        seconds: float = TIMEOUT,
        seccomp_base: Path | None = None,
    ) -> None:
        self.answers: dict[str, Answer] = {}
        self.failure = ""
        self._left = list(tasks)
        self._resolvers = resolvers
        self._seconds = seconds
        self._seccomp_base = seccomp_base
        self._child = self._start()

    def ended(self) -> bool:
        """Return whether every task has its answer, or none will come. Never waits."""
        if self._child is None:
            return True
        ending = self._child.ending()
        if ending is None:
            return False
        started, answers = self._child.answers()
        self._child.close()
        self.answers |= answers
        self._left = [task for task in self._left if task.key not in answers]
        if not started:
            self.failure = f"policies cannot be compiled: the process for it {ending}"
            self._left = []
        elif self._left:
            guilty = self._left.pop(0)  # the tasks are done in order
            self.answers[guilty.key] = Answer("", problem=f"{guilty.file}: compiling it failed: the process {ending}")
        self._child = self._start()
        return self._child is None

    def close(self) -> None:
        """End the process, if there is one."""
        if self._child:
            self._child.close()
            self._child = None

    def _start(self) -> Child | None:
        if not self._left:
            return None
        try:
            return Child(self._left, self._resolvers, self._seconds, self._seccomp_base)
        except OSError as error:
            self.failure = f"policies cannot be compiled: no process can be started: {error.strerror}"
            return None


class Child:
    """One process. What it reads and writes lies in memory, so that neither side waits for the other."""

    def __init__(
        self, tasks: Sequence[Task], resolvers: Sequence[Prefix] | None, seconds: float, seccomp_base: Path | None
    ) -> None:
        order = {
            "tasks": [asdict(task) for task in tasks],
            "resolvers": None if resolvers is None else [str(prefix) for prefix in resolvers],
            "seconds": int(seconds) + 1,
            "seccomp_base": str(seccomp_base) if seccomp_base else None,
        }
        self._seconds = seconds
        self._written, self._since = 0, time.monotonic()
        self._out, self._errors = memory(), memory()
        with memory() as orders:
            orders.write(json.dumps(order).encode())
            orders.seek(0)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "agent.node.compile_policies"],
                    stdin=orders,
                    stdout=self._out,
                    stderr=self._errors,
                )
            except OSError:
                self._out.close()
                self._errors.close()
                raise

    def ending(self) -> str | None:
        """Return how the process ended, None while it runs. One that has answered nothing for too long is ended."""
        status = self._process.poll()
        if status is None:
            written, now = os.fstat(self._out.fileno()).st_size, time.monotonic()
            if written != self._written:
                self._written, self._since = written, now
            if now - self._since <= self._seconds:
                return None
            self._process.kill()
            self._process.wait()
            return f"took longer than {self._seconds:g} s"
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{how} ({said[-1][:200]})" if said else how

    def answers(self) -> tuple[bool, dict[str, Answer]]:
        """Return whether the process came to begin, and the answers that it finished."""
        found: dict[str, Answer] = {}
        self._out.seek(0)
        reader = pickle.Unpickler(self._out)  # noqa: S301 - written by our own process, into memory that nobody else has
        try:
            if reader.load() != STARTED:
                return False, found
        except (EOFError, pickle.UnpicklingError):
            return False, found
        while True:
            try:
                key, answer = reader.load()
            except (EOFError, pickle.UnpicklingError):  # the end, or where it was killed
                return True, found
            found[key] = answer

    def close(self) -> None:
        """End the process and give its memory back."""
        self._process.kill()
        self._process.wait()
        self._out.close()
        self._errors.close()


def memory() -> BinaryIO:
    """Return a file in memory, gone when nobody has it open: a full disk or a read-only one is no matter."""
    return os.fdopen(os.memfd_create("weir-policies"), "w+b")
