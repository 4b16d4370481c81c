"""`weir agent` as its user runs it: a process, with pins, socket, policies and a managed parent of a test's own.

with agent_site(tmp_path, c.cgroups) as made:
    made.write("appengine", text)
    with made.running() as agent:
        agent.ready()
        agent.metric("weir_egress_bytes_total", pod="web-0", destination="public")
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from tests.kernel.site import ROOT, Site, remove, site
from tests.node.ports import reserve

PATIENCE = 300.0
"""Seconds that anything may take; never what is measured."""


@dataclass(frozen=True)
class Scrape:
    """/metrics at one moment."""

    page: str

    def samples(self, name: str, **labels: str) -> list[tuple[Mapping[str, str], float]]:
        """The samples of a metric that have these labels."""
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(self.page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of those samples; 0 without any."""
        return sum(value for _, value in self.samples(name, **labels))


@dataclass
class Page:
    """What an agent serves on a port of this host."""

    port: int

    def get(self, path: str) -> tuple[int, str]:
        """(Status, body) of a request; (0, reason) when nobody answers."""
        try:
            with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as e:
            return e.code, e.read().decode()
        except (URLError, OSError) as e:
            return 0, str(e)

    def scrape(self) -> Scrape:
        """What it says now, for facts that have to hold together: the next scrape may say something else."""
        status, page = self.get("/metrics")
        assert status == 200, page
        return Scrape(page)

    def samples(self, name: str, **labels: str) -> list[tuple[Mapping[str, str], float]]:
        """The samples of a metric that have these labels now."""
        return self.scrape().samples(name, **labels)

    def metric(self, name: str, **labels: str) -> float:
        """Their sum; 0 without any."""
        return self.scrape().metric(name, **labels)


@dataclass
class Running(Page):
    """One agent's process."""

    process: subprocess.Popen[str]
    site: AgentSite

    def ready(self) -> None:
        """Wait until /readyz says so; fails with what it says instead, or when the agent has ended."""
        self.until(lambda: self.get("/readyz")[0] == 200, lambda: self.get("/readyz")[1])

    def until(self, holds: Any, otherwise: Any = lambda: "it never came") -> None:
        """Wait for something to hold."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{otherwise()}\n{self.site.log.read_text()[-4000:]}")
            time.sleep(0.05)

    def status(self) -> dict[str, Any]:
        """What `weir status --json` says while the agent runs."""
        answer: dict[str, Any] = json.loads(self.site.weir.ok("status", "--json", env=self.site.environment))
        return answer

    def events(self) -> list[dict[str, Any]]:
        """The events that the agent has written to its standard output; a line is read when it is whole."""
        lines = self.site.out.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the agent by a signal; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@dataclass
class AgentSite:
    """Where a test's agents keep their things. ``parent`` is the managed parent, below the cgroup2 mount.

    ``kept`` are the ports that agents have been given.
    """

    weir: Site
    folder: Path
    parent: str
    kept: ExitStack
    options: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """The agents' standard error, one after the other."""
        return self.folder / "agent.err"

    @property
    def out(self) -> Path:
        """The agents' standard output."""
        return self.folder / "agent.out"

    @property
    def policies(self) -> Path:
        """The policy directory."""
        return self.folder / "policies"

    @property
    def socket(self) -> Path:
        """The agents' Unix socket."""
        return self.folder / "run/agent.sock"

    @property
    def environment(self) -> dict[str, str]:
        """What makes verbs of weir meet this site's agent."""
        return {**self.weir.environment, "WEIR_SOCKET": str(self.socket)}

    def write(self, name: str, text: str) -> Path:
        """Write a policy file; the name is the file's."""
        path = self.policies / f"{name}.yaml"
        path.write_text(text)
        return path

    def start(self, *arguments: str, prefix: tuple[str, ...] = ()) -> Running:
        """Start an agent; the caller ends it."""
        port = reserve(self.kept)
        given = {
            "--policies": str(self.policies),
            "--root": self.parent.strip("/"),
            "--cri": "none",
            "--listen": f"127.0.0.1:{port}",
            "--socket": str(self.socket),
            "--reconcile": "2s",
            **self.options,
        }
        options = [word for pair in given.items() for word in pair]
        command = [*prefix, *self.weir.command("agent", *options, *arguments)]
        with self.log.open("a") as err, self.out.open("a") as out:
            process = subprocess.Popen(command, text=True, env=self.weir.environment, cwd=ROOT, stdout=out, stderr=err)
        return Running(port, process, self)

    @contextmanager
    def running(self, *arguments: str) -> Iterator[Running]:
        """An agent that is ready; ended at the end, if it has not ended by itself."""
        made = self.start(*arguments)
        try:
            made.ready()
            yield made
        finally:
            if made.process.poll() is None:
                made.process.kill()
            made.process.wait()

    def bugs(self) -> list[str]:
        """Lines of the log that no agent should ever write."""
        return re.findall(r".*(?:Traceback|bug in weir).*", self.log.read_text() if self.log.exists() else "")


@contextmanager
def agent_site(folder: Path, parent: str) -> Iterator[AgentSite]:
    """A site for agents; unloaded at the end, after a look for bugs in the log."""
    folder = folder / f"agent-{os.urandom(3).hex()}"
    with site(folder) as weir, ExitStack() as kept:
        (folder / "policies").mkdir(parents=True)
        made = AgentSite(weir, folder, parent, kept)
        root = weir.place.root / parent.strip("/")
        root.mkdir(parents=True, exist_ok=True)
        try:
            yield made
        finally:
            remove(root)
        assert not made.bugs(), made.log.read_text()
