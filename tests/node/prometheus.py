"""Debian's Prometheus for one test, with deploy/prometheus/scrape.yaml and rules.yaml as they are but for what is said here.

with prometheus(tmp_path, agent_port) as p:
    p.until(lambda: p.query("weir_ready == 1"))
    p.fires("WeirAgentDown")

Other than in a user's configuration everything is looked at once a second and every alert's `for:` is a second, because a
test cannot wait for five minutes; the expressions are untouched. It listens on loopback and ends with the test.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from tests import need
from tests.deploy.copies import DEPLOY
from tests.node.ports import reserve

PATIENCE = 300.0
"""Seconds that anything may take; never what is measured."""

INTERVAL = "1s"

DISCOVERED = {"namespace": "weir", "pod": "weir-x7k2p", "container": "agent"}
"""Labels of the agent's own pod, as discovery in Kubernetes gives them to a target; `honor_labels` is about these."""


@dataclass(frozen=True)
class Curve:
    """A series with its samples: (seconds since 1970, value)."""

    labels: Mapping[str, str]
    samples: tuple[tuple[float, float], ...]


class Prometheus:
    """One server that runs."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.address = f"127.0.0.1:{port}"
        self._process = process
        self._log = log

    def ask(self, path: str, **arguments: str) -> Any:
        """The `data` of an answer of the HTTP API; fails with what the server says is wrong."""
        with urlopen(f"http://{self.address}{path}?{urlencode(arguments)}", timeout=30) as answer:
            said = json.load(answer)
        assert said["status"] == "success", said
        return said["data"]

    def query(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of an instant query, now or then."""
        when = {} if at is None else {"time": f"{at:.3f}"}
        found = self.ask("/api/v1/query", query=expression, **when)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def raw(self, selector: str, seconds: float, at: float | None = None) -> list[Curve]:
        """The samples of so many seconds as they were stored, each with the time of its scrape."""
        when = {} if at is None else {"time": f"{at:.3f}"}
        return self._curves("/api/v1/query", query=f"{selector}[{seconds * 1000:.0f}ms]", **when)

    def over(self, expression: str, since: float) -> list[Curve]:
        """What a graph shows from then to now, with a point for every second."""
        return self._curves(
            "/api/v1/query_range", query=expression, start=f"{since:.3f}", end=f"{time.time():.3f}", step="1"
        )

    def _curves(self, path: str, **arguments: str) -> list[Curve]:
        return [
            Curve(one["metric"], tuple((float(at), float(value)) for at, value in one["values"]))
            for one in self.ask(path, **arguments)["result"]
        ]

    def values(self, label: str, selector: str) -> list[str]:
        """The values of a label: what Grafana's label_values() asks for."""
        return list(self.ask(f"/api/v1/label/{label}/values", **{"match[]": selector}))

    def firing(self) -> list[dict[str, Any]]:
        """The alerts that fire now, as /api/v1/alerts has them."""
        return [alert for alert in self.ask("/api/v1/alerts")["alerts"] if alert["state"] == "firing"]

    def fires(self, name: str, **labels: str) -> dict[str, Any]:
        """Wait for an alert to fire; returns it."""
        wanted = {"alertname": name, **labels}
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [alert for alert in self.firing() if wanted.items() <= alert["labels"].items()]
            return bool(found)

        self.until(is_there, lambda: f"{wanted} does not fire; these do: {self.firing()}")
        return found[0]

    def is_silent(self, name: str) -> bool:
        """Whether an alert does not fire."""
        return all(alert["labels"]["alertname"] != name for alert in self.firing())

    def scraped_since(self, then: float, job: str = "weir") -> None:
        """Wait for a scrape of the job that began after ``then``, and found somebody."""
        up = f'up{{job="{job}"}}'
        newest = f"timestamp({up}) > {then:.3f} and {up} == 1"
        self.until(lambda: self.query(newest), lambda: f"no scrape of {job}: {self.ask('/api/v1/targets')}")

    def until(self, holds: Callable[[], Any], otherwise: Callable[[], str] = lambda: "it never came") -> None:
        """Wait for something to hold."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, otherwise()
            time.sleep(0.1)

    def answers(self) -> bool:
        """Whether it serves."""
        try:
            with urlopen(f"http://{self.address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def impatient(rules: dict[str, Any]) -> dict[str, Any]:
    """The rules with a `for:` of a second in each alert that has one."""
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = INTERVAL
    return rules


def configuration(folder: Path, target: int, others: Mapping[str, int]) -> dict[str, Any]:
    """scrape.yaml for the agent at a port, with rules.yaml beside it and jobs (name → port) of the test's own."""
    (folder / "rules.yaml").write_text(
        yaml.safe_dump(impatient(yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text())))
    )
    made: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus/scrape.yaml").read_text())
    made["global"] = dict.fromkeys(made["global"], INTERVAL)
    assert len(made["scrape_configs"]) == 1
    made["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{target}"], "labels": DISCOVERED}]
    for name, port in others.items():
        job = {"job_name": name, "honor_labels": True, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        made["scrape_configs"].append(job)
    return made


@contextmanager
def prometheus(folder: Path, target: int, others: Mapping[str, int] | None = None) -> Iterator[Prometheus]:
    """A server that answers and has data of its own only; ended by its pid."""
    command = need.command("prometheus")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration(folder, target, others or {})))
    log = folder / "prometheus.log"
    with ExitStack() as kept, log.open("w") as file:
        port = reserve(kept)
        process = subprocess.Popen(
            [
                command,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
        try:
            made = Prometheus(port, process, log)
            made.until(made.answers, log.read_text)
            yield made
        finally:
            process.terminate()
            process.wait()
