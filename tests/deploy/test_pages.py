"""deploy/: pages and dashboard say what the code has: flags, metrics, queries, examples."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from agent.families import Facts, collect
from agent.kernel.seam import Reading
from agent.node.state import NodeState
from agent.policy.model import Prefix
from agent.policy.parse import parse
from tests import need
from tests.deploy.copies import DEPLOY
from tests.deploy.manifests import KUBERNETES, agent_container
from tests.deploy.test_rules import RULES

PAGES = sorted(DEPLOY.rglob("README.md"))
BLOCKS = [
    (page, kind, text)
    for page in PAGES
    for kind, text in re.findall(r"(?ms)^ *```(\w+)\n(.*?)^ *```", page.read_text())
]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/weir.json").read_text())

VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$namespace": ".*", "$pod": ".*", "$instance": ".*"}
FOREIGN = ("container_network_transmit_bytes_total",)
"""cAdvisor's, in an example that joins with it."""


def flags() -> dict[str, click.Option]:
    """Of `weir agent`, by name."""
    command = importlib.import_module("agent.verbs.agent").agent
    return {option.opts[0]: option for option in command.params if option.opts[0] != "--help"}


def exported() -> set[str]:
    """The names of the agent's metrics as they stand in its page."""
    reading = Reading(enrolments={}, counters={}, refusals={}, versions={})
    facts = Facts(NodeState(), reading, maps={}, attached={}, build=None)
    endings = {"counter": "_total", "info": "_info"}
    return {family.name + endings.get(family.type, "") for family in collect(facts, ())}


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", ())]


def metrics_in(query: str) -> set[str]:
    """Names of metrics: words that are neither a label, a function, a keyword nor recorded by a rule."""
    bare = re.sub(r'"[^"]*"', "", query)
    return set(re.findall(r"(?<![\w:$])(weir_\w+|process_\w+|container_\w+)(?![\w:])", bare))


def recorded_in(query: str) -> set[str]:
    return set(re.findall(r"\w+:\w+:\w+", query))


def promql() -> list[str]:
    """Every query of the pages, the rules and the dashboard."""
    return [*queries(), *(text for _, kind, text in BLOCKS if kind == "promql"), *(rule["expr"] for rule in RULES)]


def test_flags_and_their_variables_are_those_of_the_command() -> None:
    rows = re.findall(r"(?m)^\| `(--[a-z-]+)[^`]*` \| `(WEIR_\w+)` \| (.*?) \|", (DEPLOY / "README.md").read_text())
    options = flags()
    assert {flag: variable for flag, variable, _ in rows} == {flag: option.envvar for flag, option in options.items()}
    for flag, _, left_out in rows:
        default = options[flag].to_info_dict()["default"]
        if isinstance(default, str):
            assert left_out == f"`{default}`", flag


def test_flags_of_the_manifest_and_of_the_env_file_are_the_command_s() -> None:
    first, *arguments = agent_container()["args"]
    assert first == "agent"
    assert {argument.partition("=")[0] for argument in arguments} <= set(flags())
    named = set(re.findall(r"(?m)^#?(WEIR_\w+)=", (DEPLOY / "systemd/agent.env").read_text()))
    assert named
    assert named <= {option.envvar for option in flags().values()}


def test_every_metric_is_described() -> None:
    table = (DEPLOY / "prometheus/README.md").read_text().partition("## Metrics")[2].partition("## Queries")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `weir_")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == exported()


def test_every_query_is_about_metrics_that_there_are() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for query in promql():
        unknown = {name for name in metrics_in(query) if not name.startswith("process_")} - exported() - {*FOREIGN}
        assert not unknown, query
        assert recorded_in(query) <= recorded, query
    assert recorded <= {name for query in promql() for name in recorded_in(query)}


def test_every_query_is_promql(tmp_path: Path) -> None:
    """As rules: promtool parses these."""

    def plain(query: str) -> str:
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        assert "$" not in query
        return query

    rules = [{"record": f"query_{number}", "expr": plain(query)} for number, query in enumerate(promql())]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    command = [need.command("promtool"), "check", "rules", "--lint=none", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_is_whole() -> None:
    everything = list(panels())
    assert len({panel["id"] for panel in everything}) == len(everything)
    for panel in everything:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert names == {"datasource", "instance", "namespace", "pod"}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            assert metrics_in(variable["definition"]) <= exported()


def test_panels_do_not_lie_over_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        taken |= cells


@pytest.mark.parametrize(("page", "kind", "text"), BLOCKS)
def test_every_example_is_good(page: Path, kind: str, text: str, tmp_path: Path) -> None:
    if kind != "yaml":
        assert kind in ("console", "promql"), page
        return
    found = yaml.safe_load(text)
    what = found.get("kind")
    if what == "SocketPolicy":
        parse(text, page.name, (Prefix.parse("10.96.0.10"),))
    elif what == "Kustomization":
        build_overlay(found, tmp_path)
    elif what is None:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "example"}}
        container = {"name": "main", "image": "busybox", **found}
        kubernetes_validate.validate({**pod, "spec": {"containers": [container]}}, "1.30", strict=True)
    else:
        kubernetes_validate.validate(found, "1.30", strict=True)


def build_overlay(kustomization: dict[str, Any], directory: Path) -> None:
    """With the repository where the example has it, and its policy file."""
    copied = directory / "kubernetes"
    subprocess.run(["cp", "-r", str(KUBERNETES), str(copied)], check=True)
    text = yaml.safe_dump(kustomization).replace("weir/deploy/kubernetes", "../kubernetes")
    overlay = directory / "overlay"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(text)
    for generator in kustomization["configMapGenerator"]:
        for name in generator["files"]:
            (overlay / name).write_text("# a policy\n")
    done = subprocess.run(
        [need.command("kubectl"), "kustomize", str(overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    objects = {item["kind"]: item for item in yaml.safe_load_all(done.stdout)}
    assert len(objects["ConfigMap"]["data"]) == 1 + len(list((KUBERNETES / "policies").iterdir()))
    images = re.findall(r"image: (\S+)", done.stdout)
    assert len(images) == 2
    assert {image.partition("/")[0] for image in images} == {"registry.example"}
    for item in objects.values():
        kubernetes_validate.validate(item, "1.30", strict=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DEPLOY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, section = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if section:
            assert section in {slug(line) for line in file.read_text().splitlines() if line.startswith("#")}, target


def slug(heading: str) -> str:
    """As the forges make anchors of headings."""
    words = heading.lstrip("#").strip().lower()
    return re.sub(r"[^\w -]", "", words).replace(" ", "-")
