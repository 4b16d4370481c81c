"""Debian's Prometheus beside the agent: what it stores is what left, its alerts fire, every panel has something to show."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from agent.cgroups import tree
from agent.kernel import libbpf
from agent.kernel.abi import PROGRAMS
from tests import addresses, need
from tests.deploy.copies import DEPLOY
from tests.deploy.test_pages import BLOCKS, DASHBOARD, panels
from tests.kernel.network import quiet
from tests.node.kubelet import Container
from tests.node.monitored import POLICIES, Node, monitored
from tests.node.probe import run_in
from tests.node.prometheus import DISCOVERED, Curve
from tests.node.remains import wait
from tests.servers import SINK_PORT
from tests.world import Count

EACCES = 13
EARLY = {"namespace": "old", "pod": "early-0"}
OTHER = "203.0.114.7"
"""A second public address."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    need.root()
    need.command("prometheus")
    with monitored(tmp_path_factory.mktemp("monitored")) as made:
        yield made


# What follows happens once, in this order when all is asked for; the tests look at what Prometheus remembers of it.


@dataclass(frozen=True)
class Sent:
    """What two containers sent while the agent was killed and started, in that time: by pod, as the peer counted it."""

    since: float
    till: float
    counts: dict[str, Count]
    total: Count
    down: dict[str, Any]


@pytest.fixture(scope="module")
def calm(node: Node) -> tuple[Container, Container]:
    """Two pods, known and quiet; nothing is wrong with the node."""
    web = node.start("shop", "web-0", policy="appengine")
    api = node.start("bank", "api-0")
    node.named(web)
    node.named(api)
    return web, api


@pytest.fixture(scope="module")
def healthy(node: Node, calm: tuple[Container, Container]) -> list[dict[str, Any]]:
    """The alerts of that node, three evaluations later; one that fires for a moment, on a machine that stands still, is none."""
    node.prometheus.scraped_since(time.time() + 3)
    alerts = node.prometheus.firing()

    def silent() -> bool:
        alerts[:] = node.prometheus.firing()
        return not alerts

    node.prometheus.until(silent, lambda: str(alerts))
    return alerts


@pytest.fixture(scope="module")
def sent(node: Node, calm: tuple[Container, Container], healthy: list[dict[str, Any]]) -> Sent:
    web, api = calm
    node.world.add_counter("web", f"ip daddr {addresses.PUBLIC}")
    node.world.add_counter("api", f"ip daddr {OTHER}")
    before, since = quiet(node.world.counters), time.time()
    node.prometheus.scraped_since(since)
    with ThreadPoolExecutor() as pool:
        busy = [
            pool.submit(node.send, web, "udp", addresses.PUBLIC, 2500, 1000, 2000),
            pool.submit(node.send, api, "udp", OTHER, 2500, 77, 2000),
        ]
        begun = 'weir_egress_bytes_total{destination="public", pod=~"web-0|api-0", container="main"} > 0'
        node.prometheus.until(lambda: len(node.prometheus.query(begun)) == 2)
        node.end()
        assert node.send(web, "tcp", addresses.PUBLIC, 50, 20_000) == 0
        down = node.prometheus.fires("WeirAgentDown")
        node.restart()
        node.prometheus.scraped_since(time.time())
        assert node.send(api, "tcp", OTHER, 10, 3333) == 0
        assert [one.result() for one in busy] == [0, 0]
    total = quiet(node.world.counters) - before
    counts = {"web-0": node.world.counter("web"), "api-0": node.world.counter("api")}
    for job in ("weir", "kubelet"):
        node.prometheus.scraped_since(time.time(), job)
    return Sent(since, time.time(), counts, total, down)


@pytest.fixture(scope="module")
def refused(node: Node, calm: tuple[Container, Container], sent: Sent) -> float:
    """Refusals: one, and then many; a file that is wrong, and one more that is good. The time before them."""
    web, api = calm
    since = time.time()
    assert node.send(web, "udp", addresses.PRIVATE[0], 1, 10) == EACCES
    assert node.send(api, "udp", addresses.PRIVATE[0], 1, 10) == 0
    node.prometheus.until(lambda: node.prometheus.query('weir_refused_total{pod="web-0"}'))
    node.prometheus.until(lambda: node.prometheus.query('weir_audited_total{pod="api-0"}'))
    assert node.send(web, "udp", addresses.PRIVATE[0], 2000, 10) == EACCES
    assert node.send(api, "udp", addresses.PRIVATE[0], 5, 10) == 0
    node.site.write(
        "wrong", "apiVersion: weir.dev/v1\nkind: SocketPolicy\nmetadata: {name: wrong}\nspec: {egres: []}\n"
    )
    return since


@pytest.fixture(scope="module")
def asked(node: Node) -> Container:
    """A pod whose annotation names no policy."""
    return node.start("shop", "typo-0", policy="apengine")


@pytest.fixture(scope="module")
def ended(node: Node) -> None:
    """A pod that is gone, a process in a cgroup that is no pod's, and a socket older than the agent: all send."""
    job = f"send udp {addresses.PUBLIC} {SINK_PORT} 40 100 0; exec sleep 100000"
    gone = node.start("batch", "job-0", ("/bin/sh", "-c", job))
    node.named(gone)
    node.kubelet.stop(gone)
    node.kubelet.remove_pod(gone.pod)
    assert node.kubelet.exec(node.early, ["/bin/touch", "/tmp/go"]).code == 0
    jobs = tree.mount() / node.site.parent.strip("/") / "jobs"
    jobs.mkdir()
    for _ in range(2):  # the second time it is known
        node.prometheus.scraped_since(time.time() + 1)
        command = node.world.command([str(node.client), "udp", addresses.PUBLIC, str(SINK_PORT), "5", "50", "0"])
        assert run_in(jobs, *command).returncode == 0
    adopted = 'weir_sockets_adopted_total{pod="early-0"} > 0'
    node.prometheus.until(lambda: node.prometheus.query(adopted))


@contextmanager
def occupied(cgroup: Path, program: Path) -> Iterator[None]:
    """A hook of a cgroup with a program that tolerates no other there, as one attached without BPF_F_ALLOW_MULTI does.

    The program is weir's own, so it brings no rule of somebody else's; attached in this way it is none of weir's links.
    """
    attach_type = PROGRAMS[program.name][1]
    made, where = libbpf.obj_get(program), os.open(cgroup, os.O_RDONLY)
    try:
        # The kernel ends a link a moment after its last pin is gone.
        wait("the hook to be free", lambda: libbpf.library().bpf_prog_attach(made, where, attach_type, 0) == 0)
        try:
            yield
        finally:
            assert libbpf.library().bpf_prog_detach2(made, where, attach_type) == 0
    finally:
        os.close(made)
        os.close(where)


@pytest.fixture(scope="module")
def unruled(node: Node, calm: tuple[Container, Container], sent: Sent) -> list[dict[str, Any]]:
    """The alerts while somebody else's program keeps one of weir's from the managed parent; then it is gone again."""
    pins = node.site.weir.place.pins
    parent = tree.mount() / node.site.parent.strip("/")
    node.end()
    (pins.links / str(tree.cgroup_id(parent)) / "connect4").unlink()
    with occupied(parent, pins.programs / "connect4"):
        node.restart(ready=False)
        alerts = [
            node.prometheus.fires("WeirNotInForce", pod="web-0", container="main", layer="hooks"),
            node.prometheus.fires("WeirNotReady"),
        ]
    node.agent.ready()
    return alerts


@pytest.fixture(scope="module")
def everything(
    node: Node,
    sent: Sent,
    refused: float,
    asked: Container,
    ended: None,
    unruled: list[dict[str, Any]],
) -> None:
    """All of it, and two scrapes after it."""
    node.site.write("good", (POLICIES / "untrusted.yaml").read_text())
    node.prometheus.until(lambda: node.prometheus.query('weir_policy_info{policy="untrusted"}'))
    node.prometheus.scraped_since(time.time() + 1)


def test_promtool_takes_the_page(node: Node, everything: None) -> None:
    status, page = node.agent.get("/metrics")
    assert status == 200
    command = [need.command("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=page, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_openmetrics(node: Node, everything: None) -> None:
    """The strict parser takes it, and it is what Prometheus was given: the same series."""
    connection = HTTPConnection("127.0.0.1", node.agent.port)
    connection.request("GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    answer = connection.getresponse()
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    families = list(text_string_to_metric_families(answer.read().decode()))  # type: ignore[no-untyped-call]
    connection.close()
    page = {sample.name for family in families for sample in family.samples if sample.name.startswith("weir_")}
    assert page == set(node.prometheus.values("__name__", '{job="weir", __name__=~"weir_.*"}'))


def test_every_rule_is_evaluated(node: Node, everything: None) -> None:
    groups = node.prometheus.ask("/api/v1/rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for group in RULES["groups"])
    assert [rule for rule in rules if rule["health"] != "ok"] == []


def test_the_difference_over_a_restart_is_what_left(node: Node, sent: Sent) -> None:
    """Byte for byte, by raw samples, and through the functions that people use."""
    assert sum(count.bytes for count in sent.counts.values()) == sent.total.bytes
    for pod, count in sent.counts.items():
        for metric, expected in (
            ("weir_egress_bytes_total", count.bytes),
            ("weir_egress_packets_total", count.packets),
        ):
            selector = f'{metric}{{destination="public", pod="{pod}", container="main"}}'
            (curve,) = node.prometheus.raw(selector, time.time() - sent.since)
            values = [value for _, value in curve.samples]
            assert values == sorted(values)
            assert values[-1] - values[0] == expected > 0
            first, last = curve.samples[0][0], curve.samples[-1][0]
            # A range that begins and ends with a sample leaves increase() nothing to guess.
            window = f"{selector}[{round((last - first) * 1000)}ms]"
            for query in (f"increase({window})", f"max_over_time({window}) - min_over_time({window})"):
                assert [value for _, value in node.prometheus.query(query, last)] == [expected], query


def test_the_restart_was_in_the_middle(node: Node, sent: Sent) -> None:
    """Before it, while nobody looked, and after it: each has its share."""
    selector = 'weir_egress_bytes_total{destination="public", pod="web-0", container="main"}'
    (curve,) = node.prometheus.raw(selector, time.time() - sent.since)
    gap, start = max((after[0] - before[0], before[0]) for before, after in pairs(curve))
    before = next(value for at, value in curve.samples if at == start)
    after = next(value for at, value in curve.samples if at > start)
    assert gap > 2
    assert curve.samples[0][1] < before < after
    (api,) = node.prometheus.raw(selector.replace("web", "api"), time.time() - sent.since)
    assert next(value for at, value in api.samples if at > start) < api.samples[-1][1]


def pairs(curve: Curve) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    return zip(curve.samples, curve.samples[1:], strict=False)


def test_sums_by_namespace_and_pod(node: Node, sent: Sent) -> None:
    """The labels are the container's, not the scrape's; a bill by namespace is the sum of its pods."""
    found = node.prometheus.query('sum by (namespace, pod) (weir_egress_bytes_total{destination="public"})')
    by_pod = {(labels["namespace"], labels["pod"]): value for labels, value in found if "pod" in labels}
    assert by_pod["shop", "web-0"] == sent.counts["web-0"].bytes
    assert by_pod["bank", "api-0"] == sent.counts["api-0"].bytes
    assert not node.prometheus.query('{__name__=~"weir_.*", exported_namespace!=""}')
    assert node.prometheus.query(f'weir_ready{{pod="{DISCOVERED["pod"]}"}} == 1')


def test_joins_with_cadvisor(node: Node, sent: Sent) -> None:
    """The query of deploy/prometheus/README.md: one answer for each pod that sends, and no pod sent more than its device."""
    (query,) = (text for _, kind, text in BLOCKS if kind == "promql" and "container_network" in text)
    found = {labels["pod"]: value for labels, value in node.prometheus.query(query, sent.till)}
    assert found.keys() >= {"web-0", "api-0"}
    assert 0 < found["api-0"] < found["web-0"] < 1


def test_a_healthy_node_has_no_alert(healthy: list[dict[str, Any]]) -> None:
    assert healthy == []


def test_alert_when_the_agent_is_down(node: Node, sent: Sent) -> None:
    assert sent.down["labels"]["instance"] == f"127.0.0.1:{node.agent.port}"
    assert sent.down["annotations"]["summary"].endswith("does not answer")
    node.prometheus.until(lambda: node.prometheus.is_silent("WeirAgentDown"))


def test_alert_when_refusals_spike(node: Node, refused: float) -> None:
    alert = node.prometheus.fires("WeirRefusalsSpiking")
    assert alert["labels"]["namespace"] == "shop"
    assert float(alert["value"]) > 1
    assert not [one for one in node.prometheus.firing() if one["labels"].get("namespace") == "bank"]


def test_alert_when_an_annotation_names_no_policy(node: Node, asked: Container) -> None:
    alert = node.prometheus.fires("WeirPolicyMismatch")
    assert (alert["labels"]["namespace"], alert["labels"]["pod"]) == ("shop", "typo-0")
    assert "shop/typo-0" in alert["annotations"]["summary"]


def test_alert_when_a_file_is_wrong(node: Node, refused: float) -> None:
    assert node.prometheus.fires("WeirPolicyFileInvalid")["labels"]["file"] == "wrong.yaml"


def test_alert_when_a_rule_is_not_in_force(node: Node, unruled: list[dict[str, Any]]) -> None:
    assert [alert["labels"]["severity"] for alert in unruled] == ["critical", "critical"]
    node.prometheus.until(lambda: node.prometheus.is_silent("WeirNotInForce"))
    node.prometheus.until(lambda: node.prometheus.is_silent("WeirNotReady"))


QUERIES = [
    pytest.param(panel, target["expr"], id=f"{panel['title']} {panel['type']} {target['refId']}")
    for panel in panels()
    for target in panel.get("targets", ())
]

RULES = yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text())

ZERO = [("Layers not in force", "table"), ("Scrapes that could not read the tables", "timeseries")]
"""Panels whose answer here is 0: the layers that are 0, and a failure that nothing here provokes."""


@pytest.mark.parametrize(("panel", "expression"), QUERIES)
def test_every_panel_shows_something(node: Node, everything: None, panel: dict[str, Any], expression: str) -> None:
    """Every query of the dashboard, drawn over all that happened here: it has data, and at some time it is not 0."""
    # $__rate_interval is Grafana's of a data source that is looked at once a second, as long as a page of ten minutes needs.
    for variable, value in (("$__rate_interval", "15s"), ("$__range", f"{time.time() - node.began:.0f}s")):
        expression = expression.replace(variable, value)
    expression = re.sub(r"\$(instance|namespace|pod)", ".*", expression)
    assert "$" not in expression
    curves = node.prometheus.over(expression, node.began)
    values = {value for curve in curves for _, value in curve.samples}
    assert values, expression
    if (panel["title"], panel["type"]) not in ZERO:
        assert values - {0.0}, f"always 0: {expression}"


@pytest.mark.parametrize("name", ["instance", "namespace", "pod"])
def test_every_variable_has_values(node: Node, everything: None, name: str) -> None:
    """As Grafana asks for them, with `All` for those before."""
    (variable,) = (one for one in DASHBOARD["templating"]["list"] if one["name"] == name)
    ((selector, label),) = re.findall(r"^label_values\((.*), (\w+)\)$", variable["definition"])
    values = node.prometheus.values(label, re.sub(r"\$\w+", ".*", selector))
    expected = {"instance": f"127.0.0.1:{node.agent.port}", "namespace": "shop", "pod": "web-0"}
    assert expected[name] in values


@pytest.mark.parametrize("page", sorted({page for page, kind, _ in BLOCKS if kind == "promql"}), ids=str)
def test_every_query_of_the_pages_has_an_answer(node: Node, everything: None, page: Path) -> None:
    for text in (text for where, kind, text in BLOCKS if (where, kind) == (page, "promql")):
        curves = node.prometheus.over(text, node.began)
        assert any(value for curve in curves for _, value in curve.samples), text


def events(node: Node) -> list[str]:
    """What `weir events` says."""
    return node.site.weir.ok("events", env=node.site.environment).splitlines()


def test_from_nothing_to_a_query(node: Node, sent: Sent) -> None:
    """deploy/README.md on a plain host: nothing is refused; its pod is, and its commands and queries say so."""
    told = [(kind, text) for page, kind, text in BLOCKS if page == DEPLOY / "README.md"]
    commands = [line.removeprefix("$ ") for kind, text in told if kind == "console" for line in text.splitlines()]
    (pod,) = (yaml.safe_load(text) for kind, text in told if kind == "yaml")
    (main,) = pod["spec"]["containers"]
    name, policy = pod["metadata"]["name"], pod["metadata"]["annotations"]["weir.dev/policy"]
    (attempt,) = (command.partition(" -- ")[2] for command in commands if f" exec {name} -- " in command)

    attempt = attempt.replace(" -T 3", "")  # crashes the wget of Debian 12's busybox-static, on any host
    free = node.start("default", "free", main["command"])
    assert node.kubelet.exec(free, shlex.split(attempt)) == (0, "ok\n", "")

    caller = node.start("default", name, main["command"], policy=policy)
    node.agent.until(lambda: node.agent.samples("weir_container_policy", pod=name, container="main", policy=policy))
    said = node.kubelet.exec(caller, shlex.split(attempt))
    assert said.code != 0
    assert "Permission denied" in said.stderr
    allowed = shlex.split(attempt.replace(addresses.METADATA, addresses.PUBLIC))
    assert node.kubelet.exec(caller, allowed) == (0, "ok\n", "")

    (explain,) = (command for command in commands if "policy explain" in command)
    weir, _, arguments = explain.partition(" policy ")
    assert weir.endswith(" -- weir")
    assert "by rule private" in node.site.weir.ok("policy", *shlex.split(arguments))
    assert any(command.partition("#")[0].endswith("-- weir events       ") for command in commands)
    node.agent.until(
        lambda: [line for line in events(node) if f"default/{name}/main" in line and addresses.METADATA in line]
    )

    sending, refusing = (text for kind, text in told if kind == "promql")
    refused = {"namespace": "default", "pod": name, "rule": "private"}
    node.prometheus.until(lambda: (refused, 1.0) in node.prometheus.query(refusing))

    def sends(pod: str, at: float | None = None) -> float | None:
        return next((value for labels, value in node.prometheus.query(sending, at) if labels.get("pod") == pod), None)

    assert sends("web-0", sent.till)
    node.prometheus.until(lambda: sends(name) is not None)
    assert node.kubelet.exec(caller, allowed).code == 0
    node.prometheus.until(lambda: sends(name))
