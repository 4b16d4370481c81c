"""What below deploy/ is a copy of something else, and how it is made: `python -m tests.deploy.copies` writes all of it.

kustomize reads no file above its own directory, so the policies are there twice; and the Prometheus Operator wants the rules
inside an object of Kubernetes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from agent.policy.sets import POLICIES

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

RULE_HEAD = """\
# Made from deploy/prometheus/rules.yaml by `python -m tests.deploy.copies`. Your Prometheus may select rules by a label
# (`ruleSelector`): add it here by an overlay.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: weir
  namespace: weir
  labels:
    app.kubernetes.io/name: weir
spec:
"""


def copies() -> Mapping[Path, str]:
    """File → what has to be in it."""
    policies = {DEPLOY / "kubernetes/policies" / file.name: file.read_text() for file in POLICIES.glob("*.yaml")}
    return policies | {DEPLOY / "kubernetes/monitoring/prometheusrule.yaml": prometheus_rule()}


def prometheus_rule() -> str:
    """The rules as an object of the Prometheus Operator: their text from `groups:` on, indented."""
    _, groups, rest = (DEPLOY / "prometheus/rules.yaml").read_text().partition("groups:\n")
    return RULE_HEAD + "".join(
        f"  {line}" if line.strip() else line for line in (groups + rest).splitlines(keepends=True)
    )


if __name__ == "__main__":
    for path, text in copies().items():
        path.write_text(text)
