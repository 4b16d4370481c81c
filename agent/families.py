"""The agent's facts → metric families, with the names and labels that Prometheus reads. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.samples import Sample

from agent import __version__, names
from agent.kernel.abi import ABI, PROGRAMS
from agent.kernel.seam import Build, Reading, Refused, Version
from agent.node.state import NodeState, Reloads
from agent.series import Series, text


@dataclass(frozen=True)
class Events:
    """Events since the agent started: written out, left out by the rate limit, lost because the ring buffer was full.

    ``uncounted`` are refusals that found no room in the table of refusal counters.
    """

    reported: int = 0
    suppressed: int = 0
    lost: int = 0
    uncounted: int = 0


@dataclass(frozen=True)
class Facts:
    """What one scrape shows. None stands for what could not be read."""

    state: NodeState
    reading: Reading | None
    maps: Mapping[str, tuple[int, int]] | None
    attached: Mapping[int, frozenset[str]] | None
    build: Build | None
    events: Events = Events()
    scrape_errors: int = 0


def collect(facts: Facts, series: Sequence[Series]) -> Iterator[Metric]:
    """The metric families, one at a time, so that whoever writes them out never holds them all.

    ``series`` is what ``series_of`` makes of the same facts.
    """
    if facts.reading is not None:
        yield from _counted(series)
        yield from _refused(series, facts.reading)
        yield from _losses(facts.events)
    yield from _in_force(series)
    yield from _policies(facts.state)
    yield from _reloads(facts.state.reloads)
    if facts.maps is not None:
        yield from _maps(facts.maps)
    if facts.attached is not None:
        yield _programs(facts.state, facts.attached)
    yield from _node(facts)


def _family(kind: str, name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    """``name`` as people see it. The library wants that of a counter or an info without its ending."""
    ending = {"counter": "_total", "info": "_info"}.get(kind, "")
    metric = Metric(name.removesuffix(ending), text, kind)
    metric.samples = [Sample(name, labels, value) for labels, value in samples]
    return metric


def _counted(series: Sequence[Series]) -> Iterator[Metric]:
    yield _family(
        "counter",
        "weir_egress_bytes_total",
        "IP bytes that left, as on the wire.",
        (({**one.who, "destination": kind}, n) for one in series for kind, n in one.counters.bytes.items()),
    )
    yield _family(
        "counter",
        "weir_egress_packets_total",
        "Packets that left, as on the wire.",
        (({**one.who, "destination": kind}, n) for one in series for kind, n in one.counters.packets.items()),
    )
    yield _family(
        "gauge",
        "weir_sockets",
        "Open inet sockets.",
        ((one.who, max(one.counters.sockets_created - one.counters.sockets_released, 0)) for one in series),
    )
    yield _family(
        "counter",
        "weir_sockets_adopted_total",
        "Sockets of unknown origin (older than the enrolment), judged as the container's own.",
        ((one.who, one.counters.sockets_adopted) for one in series),
    )


def _refused(series: Sequence[Series], reading: Reading) -> Iterator[Metric]:
    of_slot: dict[int, list[tuple[Refused, int]]] = {}
    for refused, count in reading.refusals.items():
        of_slot.setdefault(refused.slot, []).append((refused, count))
    sums: dict[bool, Counter[tuple[int, tuple[str, ...]]]] = {False: Counter(), True: Counter()}
    for index, one in enumerate(series):
        for slot in one.slots:
            for refused, count in of_slot.get(slot, ()):
                sums[refused.audited][index, _why(refused, reading.versions)] += count
    for audited, name, help_text in (
        (False, "weir_refused_total", "Calls and packets refused, by the rule that decided."),
        (True, "weir_audited_total", "Calls and packets that a policy in audit mode would have refused."),
    ):
        yield _family(
            "counter",
            name,
            help_text,
            (
                ({**series[index].who, **dict(zip(_WHY, why, strict=True))}, n)
                for (index, why), n in sums[audited].items()
            ),
        )


_WHY = ("policy", "hook", "reason", "rule")


def _why(refused: Refused, versions: Mapping[int, Version]) -> tuple[str, ...]:
    version = versions.get(refused.policy)
    unknown = f"unknown:{refused.policy}" if refused.policy else ""
    return (
        text(version.name) if version else unknown,
        refused.hook.name.lower(),
        refused.reason.name.lower(),
        text(names.rule_name(refused, versions)),
    )


def _losses(events: Events) -> Iterator[Metric]:
    outcomes = {"reported": events.reported, "suppressed": events.suppressed, "lost": events.lost}
    yield _family(
        "counter",
        "weir_events_total",
        "Refusals and audits as events: reported, suppressed by the rate limit of a container, or lost.",
        (({"outcome": outcome}, n) for outcome, n in outcomes.items()),
    )
    yield _single("counter", "weir_events_lost_total", "Events not reported.", events.suppressed + events.lost)
    yield _single(
        "counter",
        "weir_refusals_uncounted_total",
        "Refusals that found no room in the table of refusal counters.",
        events.uncounted,
    )


def _single(kind: str, name: str, help_text: str, value: float) -> Metric:
    return _family(kind, name, help_text, [({}, value)])


def _in_force(series: Sequence[Series]) -> Iterator[Metric]:
    yield _family(
        "gauge",
        "weir_enforced",
        "1 when the layer is in force for the whole container.",
        (
            ({**one.who, "layer": layer}, int(holds))
            for one in series
            if one.layers is not None
            for layer, holds in one.layers.items()
        ),
    )
    yield _family(
        "gauge",
        "weir_container_policy",
        "The policy in force.",
        (({**one.who, "policy": text(one.policy), "mode": one.mode}, 1) for one in series if one.policy or one.mode),
    )
    yield _family(
        "gauge",
        "weir_policy_mismatch",
        "1 while the policy in force is not the one that was asked for.",
        ((one.who, 1) for one in series if one.problem),
    )


def _policies(state: NodeState) -> Iterator[Metric]:
    found = {(text(policy.name), policy.sha256, policy.mode) for policy in state.policies}
    yield _family(
        "info",
        "weir_policy_info",
        "The policies that the agent knows; sha256 is that of the file.",
        (({"policy": name, "sha256": digest, "mode": mode}, 1) for name, digest, mode in sorted(found)),
    )


def _reloads(reloads: Reloads) -> Iterator[Metric]:
    yield _single(
        "counter",
        "weir_policy_reload_successes_total",
        "Looks at the policy directory that found every file good.",
        reloads.successes_total,
    )
    yield _single(
        "counter",
        "weir_policy_reload_failures_total",
        "Looks at the policy directory that found something wrong.",
        reloads.failures_total,
    )
    yield _single(
        "gauge",
        "weir_policy_reload_last_success_timestamp_seconds",
        "When the policy directory was last read without a failure, in seconds since 1970.",
        reloads.last_success,
    )
    yield _family(
        "gauge",
        "weir_policy_file_invalid",
        "1 for each file of the policy directory that is wrong now.",
        (({"file": file}, 1) for file in sorted({text(file) for file in reloads.failures})),
    )


def _maps(maps: Mapping[str, tuple[int, int]]) -> Iterator[Metric]:
    for index, (name, help_text) in enumerate(
        (("weir_map_entries", "Entries of a kernel table."), ("weir_map_capacity", "Entries that the table can hold."))
    ):
        yield _family("gauge", name, help_text, (({"map": table}, use[index]) for table, use in maps.items()))


def _programs(state: NodeState, attached: Mapping[int, frozenset[str]]) -> Metric:
    ids: dict[str, set[int]] = {root: set() for root in state.roots}
    for row in state.rows:
        if not row.id and row.cgroup in ids:
            ids[row.cgroup].update(row.cgroup_ids)
    return _family(
        "gauge",
        "weir_program_attached",
        "1 while the program is attached to the managed parent.",
        (
            (
                {"program": program, "hook": program.rstrip("46"), "cgroup": text(root)},
                int(any(program in attached.get(number, ()) for number in numbers)),
            )
            for root, numbers in ids.items()
            for program in PROGRAMS
        ),
    )


def _node(facts: Facts) -> Iterator[Metric]:
    state = facts.state
    readable = None not in (facts.reading, facts.maps, facts.attached, facts.build)
    yield _single(
        "gauge", "weir_ready", "1 when the node is wholly under control.", int(readable and not state.not_ready)
    )
    yield _single("gauge", "weir_cri_up", "1 while the container runtime answers.", int(not state.cri))
    containers = [row for row in state.rows if row.id or row.container]
    gone = sum(row.gone is not None for row in containers)
    yield _family(
        "gauge",
        "weir_containers",
        "Containers that the agent knows; those gone are shown for a while.",
        (({"state": word}, n) for word, n in (("running", len(containers) - gone), ("gone", gone))),
    )
    yield _single(
        "counter",
        "weir_scrape_errors_total",
        "Scrapes during which the kernel's tables could not be read; the page then lacks what they hold.",
        facts.scrape_errors,
    )
    build = f"{facts.build.build:016x}" if facts.build else ""
    labels = {"version": __version__, "build": build, "abi": str(ABI)}
    yield _family("info", "weir_build_info", "The agent, and the programs that are loaded.", [(labels, 1)])
