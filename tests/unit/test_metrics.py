"""What /metrics says of a node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from agent.errors import WeirError
from agent.kernel.abi import PROGRAMS, Flag
from agent.kernel.seam import Enrolment, Reading, RuleName, Version
from agent.metrics import Collector, Sources, registry
from agent.node.page import page
from agent.node.state import LAYERS, NodeState, PolicyState, Reloads, Row
from tests import nodes
from tests.nodes import counted, refusal, row

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def fail(error: Exception) -> None:
    raise error


def samples(metrics: Iterable[Metric]) -> Samples:
    """Every sample by name and labels; none may be there twice."""
    found: Samples = {}
    for metric in metrics:
        for sample in metric.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def scraped(state: NodeState, reading: Reading) -> Samples:
    return samples(Collector(nodes.sources(state, reading), fail).collect())


def value(found: Samples, name: str, **labels: str) -> float:
    """The one sample of that name with those labels among its own."""
    wanted = labels.items()
    (only,) = [v for (other, has), v in found.items() if other == name and wanted <= dict(has).items()]
    return only


def named(found: Samples, name: str) -> list[dict[str, str]]:
    return [dict(labels) for other, labels in found if other == name]


PROMISED = {
    "weir_egress_bytes_total": {"namespace", "pod", "container", "cgroup", "destination"},
    "weir_egress_packets_total": {"namespace", "pod", "container", "cgroup", "destination"},
    "weir_refused_total": {"namespace", "pod", "container", "cgroup", "policy", "hook", "reason", "rule"},
    "weir_audited_total": {"namespace", "pod", "container", "cgroup", "policy", "hook", "reason", "rule"},
    "weir_sockets": {"namespace", "pod", "container", "cgroup"},
    "weir_sockets_adopted_total": {"namespace", "pod", "container", "cgroup"},
    "weir_enforced": {"namespace", "pod", "container", "cgroup", "layer"},
    "weir_container_policy": {"namespace", "pod", "container", "cgroup", "policy", "mode"},
    "weir_policy_mismatch": {"namespace", "pod", "container", "cgroup"},
    "weir_policy_info": {"policy", "sha256", "mode"},
    "weir_policy_reload_successes_total": set(),
    "weir_policy_reload_failures_total": set(),
    "weir_policy_reload_last_success_timestamp_seconds": set(),
    "weir_policy_file_invalid": {"file"},
    "weir_events_total": {"outcome"},
    "weir_events_lost_total": set(),
    "weir_refusals_uncounted_total": set(),
    "weir_map_entries": {"map"},
    "weir_map_capacity": {"map"},
    "weir_program_attached": {"program", "hook", "cgroup"},
    "weir_cri_up": set(),
    "weir_ready": set(),
    "weir_containers": {"state"},
    "weir_scrape_errors_total": set(),
    "weir_build_info": {"version", "build", "abi"},
}


def everything() -> tuple[NodeState, Reading]:
    """A node on which each family has a sample."""
    state = nodes.state([row(2, problem="the annotation names no policy")])
    reading = nodes.reading({2: 7}, {7: counted(10)}, {refusal(7): 1, refusal(7, audited=True): 2})
    return replace(state, reloads=Reloads(failures={"bad.yaml": "line 3"})), reading


def test_every_promised_name_with_its_labels() -> None:
    found = scraped(*everything())
    labels = {name: {frozenset(dict(has)) for other, has in found if other == name} for name, _ in found}
    assert labels == {name: {frozenset(has)} for name, has in PROMISED.items()}


def test_process_metrics_stand_beside() -> None:
    made = registry(Collector(nodes.sources(*everything()), fail))
    assert "process_resident_memory_bytes" in {metric.name for metric in made.collect()}


def test_numbers_of_a_container() -> None:
    counters = {7: counted(1000, sockets_created=9, sockets_released=4, sockets_adopted=2)}
    found = scraped(nodes.state([row(2)]), nodes.reading({2: 7}, counters, {}))
    who = {"namespace": "team-2", "pod": "web-00002", "container": "php", "cgroup": nodes.cgroup(2)}
    assert value(found, "weir_egress_bytes_total", destination="public", **who) == 1000
    assert value(found, "weir_egress_packets_total", destination="loopback", **who) == 100
    assert value(found, "weir_sockets", **who) == 5
    assert value(found, "weir_sockets_adopted_total", **who) == 2
    assert value(found, "weir_container_policy", **who) == 1
    assert value(found, "weir_container_policy", **who, policy="appengine", mode="enforce") == 1


def test_a_socket_released_while_we_read_is_not_less_than_none() -> None:
    counters = {7: counted(sockets_created=1, sockets_released=2)}
    assert (
        value(scraped(nodes.state([row(2)]), nodes.reading({2: 7}, counters, {})), "weir_sockets", pod="web-00002") == 0
    )


def test_nested_cgroups_count_once_for_each_slot() -> None:
    """Cgroups 2 and 3 count in one slot, 4 in one of its own, 5 in none yet."""
    reading = nodes.reading({2: 7, 3: 7, 4: 8}, {7: counted(100), 8: counted(10)}, {refusal(7): 5, refusal(8): 6})
    found = scraped(nodes.state([row(2, 3, 4, 5)]), reading)
    assert value(found, "weir_egress_bytes_total", pod="web-00002", destination="public") == 110
    assert value(found, "weir_refused_total", pod="web-00002") == 11


def test_a_counter_never_falls_while_cgroups_nest_and_go() -> None:
    """The life of a nested cgroup: in its container's slot, in one of its own, gone (its slot is then folded)."""
    steps = [
        ([row(2)], nodes.reading({2: 7}, {7: counted(100)}, {})),
        ([row(2, 3)], nodes.reading({2: 7, 3: 7}, {7: counted(110)}, {})),
        ([row(2, 3)], nodes.reading({2: 7, 3: 8}, {7: counted(110), 8: counted(5)}, {})),
        ([row(2, 3)], nodes.reading({2: 7}, {7: counted(120)}, {})),  # folded before the agent's next look
        ([row(2)], nodes.reading({2: 7}, {7: counted(121)}, {})),
    ]
    seen = [
        value(scraped(nodes.state(rows), reading), "weir_egress_bytes_total", pod="web-00002", destination="public")
        for rows, reading in steps
    ]
    assert seen == sorted(seen)


def test_rows_with_equal_labels_are_added() -> None:
    """A container that comes back under its old path, while the last values of the old one are still shown."""
    old, new = row(2, gone=1.0, policy="old"), replace(row(2), cgroup_ids=(9,))
    reading = nodes.reading({2: 7, 9: 8}, {7: counted(100), 8: counted(1)}, {refusal(7): 1, refusal(8): 2})
    found = scraped(nodes.state([old, new]), reading)
    assert value(found, "weir_egress_bytes_total", pod="web-00002", destination="public") == 101
    assert value(found, "weir_refused_total", pod="web-00002") == 3
    assert value(found, "weir_enforced", pod="web-00002", layer="hooks") == 1
    assert value(found, "weir_containers", state="running") == 1
    assert value(found, "weir_containers", state="gone") == 1


def test_rows_with_equal_labels_share_a_slot_without_counting_it_twice() -> None:
    found = scraped(nodes.state([row(2), row(2)]), nodes.reading({2: 7}, {7: counted(100)}, {refusal(7): 1}))
    assert value(found, "weir_egress_bytes_total", pod="web-00002", destination="public") == 100
    assert value(found, "weir_refused_total", pod="web-00002") == 1


def test_what_is_gone_keeps_its_numbers_and_has_nothing_in_force() -> None:
    found = scraped(nodes.state([row(2, gone=5.0, layers={})]), nodes.reading({2: 7}, {7: counted(100)}, {}))
    assert value(found, "weir_egress_bytes_total", pod="web-00002", destination="private") == 100
    assert not [labels for labels in named(found, "weir_enforced") if labels["pod"]]


def test_a_layer_is_in_force_only_for_all() -> None:
    half = replace(row(2), layers={**dict.fromkeys(LAYERS, True), "seccomp": False})
    found = scraped(nodes.state([row(2), half]), nodes.reading({}, {}, {}))
    assert value(found, "weir_enforced", pod="web-00002", layer="seccomp") == 0
    assert value(found, "weir_enforced", pod="web-00002", layer="hooks") == 1


def test_refusals_by_rule() -> None:
    refusals = {refusal(7, 1): 4, refusal(7, None): 3, refusal(7, 1, audited=True): 2, refusal(7, 9, policy=44): 1}
    found = scraped(nodes.state([row(2)]), nodes.reading({2: 7}, {7: counted()}, refusals))
    why = {"policy": "appengine", "hook": "connect", "reason": "rule"}
    assert value(found, "weir_refused_total", rule="web", **why) == 4
    assert value(found, "weir_refused_total", rule="default", **why) == 3
    assert value(found, "weir_audited_total", rule="web", **why) == 2
    assert value(found, "weir_refused_total", rule="unknown:9", policy="unknown:44") == 1


def test_two_versions_of_a_policy_are_one_series() -> None:
    """After a reload the kernel has refusals of the old version and of the new one: their names are the same."""
    reading = nodes.reading({2: 7}, {7: counted()}, {refusal(7, 0): 4, refusal(7, 0, policy=2): 3})
    both = replace(reading, versions={1: nodes.VERSION, 2: nodes.VERSION})
    assert value(scraped(nodes.state([row(2)]), both), "weir_refused_total", rule="smtp") == 7


def test_the_policy_in_force_is_the_kernels() -> None:
    """The agent has published what it asked for; the kernel has another version still, in audit mode."""
    other = Version("soft", bytes(32), Flag.AUDIT, ())
    reading = Reading({2: Enrolment(7, 5, Flag.AUDIT)}, {7: counted()}, {}, {5: other})
    found = scraped(nodes.state([row(2)]), reading)
    assert [(x["policy"], x["mode"]) for x in named(found, "weir_container_policy") if x["pod"]] == [("soft", "audit")]


def test_without_a_version_everything_is_refused() -> None:
    reading = Reading({2: Enrolment(7, 0, Flag(0))}, {7: counted()}, {}, {})
    found = scraped(nodes.state([row(2)]), reading)
    assert [(x["policy"], x["mode"]) for x in named(found, "weir_container_policy") if x["pod"]] == [("", "refuse all")]


def test_programs_of_each_managed_parent() -> None:
    state = replace(nodes.state([]), roots=(nodes.ROOT, "/other.slice"))
    found = scraped(state, nodes.reading({}, {}, {}))
    assert value(found, "weir_program_attached", program="connect4", hook="connect", cgroup=nodes.ROOT) == 1
    assert value(found, "weir_program_attached", program="egress", hook="egress", cgroup="/other.slice") == 0
    assert len(named(found, "weir_program_attached")) == 2 * len(PROGRAMS)


AWKWARD = ['quote"', "back\\slash", "new\nline", "ünï", "{}=,", "carriage\rreturn", ""]


@pytest.mark.parametrize("name", AWKWARD)
def test_names_arrive_as_they_are(name: str) -> None:
    state = nodes.state([replace(row(2), pod=name)])
    made = registry(Collector(nodes.sources(state, nodes.reading({2: 7}, {7: counted(1)}, {})), fail))
    families = text_string_to_metric_families(b"".join(page(made, "", "").chunks).decode())
    found = samples(families)
    assert value(found, "weir_sockets", cgroup=nodes.cgroup(2), pod=name) == 0


def test_a_name_that_is_not_utf8_spoils_nothing() -> None:
    bad = "\udcff"  # how Python shows the byte 0xff of a file name
    state = replace(nodes.state([replace(row(2), cgroup=f"/x{bad}")]), reloads=Reloads(failures={f"{bad}.yaml": "?"}))
    state = replace(state, roots=(f"/r{bad}",), policies=(PolicyState(bad, bad, nodes.SHA, "enforce"),))
    rule = RuleName(bad, 1, deny=True)
    reading = nodes.reading({2: 7}, {7: counted()}, {refusal(7): 1})
    reading = replace(reading, versions={1: replace(nodes.VERSION, name=bad, rules=(rule,))})
    made = registry(Collector(nodes.sources(state, reading), fail))
    assert rb'cgroup="/x\\udcff"' in generate_latest(made)


def test_a_number_is_exact() -> None:
    """A petabyte and a byte."""
    found = registry(
        Collector(
            nodes.sources(nodes.state([row(2)]), nodes.reading({2: 7}, {7: counted(10**15 + 1)}, {})),
            fail,
        )
    )
    families = text_string_to_metric_families(generate_latest(found).decode())
    assert value(samples(families), "weir_egress_bytes_total", pod="web-00002", destination="public") == 10**15 + 1


def losing(lost: dict[int, int]) -> tuple[NodeState, Reading]:
    counters = {number: counted(events_lost=n, events_suppressed=n, refusals_uncounted=n) for number, n in lost.items()}
    return nodes.state([row(number) for number in lost]), nodes.reading({n: n for n in lost}, counters, {})


def test_losses_never_fall_when_a_container_goes() -> None:
    steps = [{2: 5, 3: 1}, {2: 5, 3: 2}, {3: 4}, {3: 4, 4: 1}, {}]
    now = losing(steps[0])
    ask = nodes.sources(*now)
    collector = Collector(replace(ask, state=lambda: now[0], read=lambda: now[1]), fail)
    seen = []
    for step in steps:
        now = losing(step)
        found = samples(collector.collect())
        assert value(found, "weir_events_total", outcome="lost") == value(found, "weir_refusals_uncounted_total")
        assert value(found, "weir_events_lost_total") == 2 * value(found, "weir_events_total", outcome="suppressed")
        assert value(found, "weir_events_total", outcome="reported") == 3
        seen.append(value(found, "weir_events_total", outcome="lost"))
    assert seen == [6, 7, 9, 10, 10]


def test_losses_are_not_counted_again_under_a_new_name() -> None:
    """A container that has lost events before the runtime tells its names, and one that had its cgroup's path before."""
    _, reading = losing({2: 5, 3: 1})
    gone = row(3, cgroup=row(2).cgroup, gone=1.0)
    now = nodes.state([row(2, namespace="", pod="", container=""), gone])
    collector = Collector(replace(nodes.sources(now, reading), state=lambda: now), fail)
    assert value(samples(collector.collect()), "weir_events_total", outcome="lost") == 6
    now = nodes.state([row(2), gone])
    assert value(samples(collector.collect()), "weir_events_total", outcome="lost") == 6


def broken() -> Reading:
    raise WeirError("the counters cannot be read", "Mount bpffs.")


@pytest.mark.parametrize("fact", ["read", "maps", "attached", "build"])
def test_what_cannot_be_read_is_visible(fact: str) -> None:
    heard: list[Exception] = []
    now, read = everything()
    whole = nodes.sources(now, read)
    calls: dict[str, Callable[[], object]] = {fact: broken}
    made = registry(Collector(Sources(**{**vars(whole), **calls}), heard.append))
    assert "weir_ready 0.0" in generate_latest(made).decode()
    text = generate_latest(made).decode()
    assert "weir_scrape_errors_total 2.0" in text
    assert 'weir_containers{state="running"} 1.0' in text
    assert [str(error) for error in heard] == ["the counters cannot be read\n  Mount bpffs."] * 2
    assert ("weir_egress_bytes_total{" in text) == (fact != "read"), "a number that was not read is not 0"


def test_a_scrape_fails_once_however_much_cannot_be_read() -> None:
    now, read = everything()
    ask = replace(nodes.sources(now, read), read=broken, maps=broken_maps)
    assert value(samples(Collector(ask, lambda _: None).collect()), "weir_scrape_errors_total") == 1


def broken_maps() -> dict[str, tuple[int, int]]:
    raise OSError("no such map")


def test_ready_is_the_agents_word() -> None:
    now, read = everything()
    assert value(scraped(now, read), "weir_ready") == 1
    assert value(scraped(replace(now, not_ready=("Not yet.",)), read), "weir_ready") == 0
    assert value(scraped(now, read), "weir_cri_up") == 1
    assert value(scraped(replace(now, cri="It does not answer."), read), "weir_cri_up") == 0


def test_before_the_first_look() -> None:
    found = scraped(NodeState(), nodes.reading({}, {}, {}))
    assert value(found, "weir_ready") == 0
    assert value(found, "weir_containers", state="running") == 0


def test_a_parent_is_no_container() -> None:
    found = scraped(nodes.state([]), nodes.reading({1: 3}, {3: counted(9)}, {}))
    assert value(found, "weir_containers", state="running") == 0
    assert value(found, "weir_egress_bytes_total", cgroup=nodes.ROOT, destination="public") == 9


def test_an_enrolled_row_without_counters_is_at_zero() -> None:
    """Prometheus counts what is added to a series from its first value on: it has to be there from the start."""
    found = scraped(nodes.state([Row("/a", (2,), id="a")]), nodes.reading({}, {}, {}))
    assert value(found, "weir_egress_bytes_total", cgroup="/a", destination="public") == 0
