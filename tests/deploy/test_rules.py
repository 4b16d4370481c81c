"""deploy/prometheus: rules that Prometheus takes, and each alert fires when it should and only then."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import yaml

from tests import need
from tests.deploy.copies import DEPLOY

PROMETHEUS = DEPLOY / "prometheus"
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}


def promtool(*arguments: str) -> None:
    command = [need.command("promtool"), *arguments]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments", ["check rules --lint-fatal rules.yaml", "test rules rules_test.yaml", "check config scrape.yaml"]
)
def test_promtool(arguments: str) -> None:
    promtool(*arguments.split())


def test_each_alert_is_seen_to_fire_and_to_be_silent() -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yaml").read_text())["tests"]
    cases: list[dict[str, Any]] = [case for test in tests for case in test.get("alert_rule_test", ())]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(ALERTS)
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_says_what_to_do(name: str) -> None:
    """At night: one sentence in the alert, and a section of the README that it leads to."""
    annotations = ALERTS[name]["annotations"]
    assert set(annotations) == {"summary", "description", "runbook"}
    page, _, section = annotations["runbook"].partition("#")
    assert section == name.lower()
    assert f"\n### {name}\n" in (DEPLOY.parent / page).read_text()
    assert ALERTS[name]["labels"]["severity"] in ("info", "warning", "critical")
