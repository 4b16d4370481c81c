"""`make bench`: what weir costs, beside empty programs on the same hooks. Needs root; writes RESULTS.md."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from agent.place import Place
from tests.bench import agent, once, results
from tests.bench.clients import CORE, Arm, Samples, compile_client, measure
from tests.bench.figures import BARE, EMPTY, OUTSIDE, weir
from tests.bench.place import PREFIXES, own_place, policy_with, prepare
from tests.bench.programs import Empty, Weir
from tests.world import World


def traffic(place: Place, rounds: int, turns: int, prefixes: Sequence[int] = PREFIXES) -> Samples:
    """Run every workload in every way. Nothing of ours stays behind."""
    cores = sorted(os.sched_getaffinity(0))
    core = CORE if CORE in cores else cores[-1]
    with ExitStack() as stack:
        world = stack.enter_context(World())
        prepare(world)
        binary = compile_client(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weir-bench-"))))
        arms = []
        for name, attached in ((BARE, False), (OUTSIDE, True)):
            cgroup = place.root / f"{place.slice.name}-{'outside' if attached else 'bare'}"
            cgroup.mkdir()
            stack.callback(cgroup.rmdir)
            arms.append(Arm(name, cgroup, attached))
        empty_cgroup = place.root / f"{place.slice.name}-empty"
        empty = Empty(empty_cgroup)
        stack.callback(empty.close)
        arms.append(Arm(EMPTY, empty_cgroup, True))
        loaded = Weir(place)
        stack.callback(loaded.close)
        arms += [Arm(weir(n), loaded.enrol(f"prefixes-{n}", policy_with(n)), True) for n in prefixes]

        def attach(wanted: bool) -> None:
            for programs in (loaded, empty):
                programs.attach() if wanted else programs.detach()

        attach(False)
        attach(True)
        return measure(binary, world, arms, attach, rounds, turns, core)


def paid_once(place: Place, times: int, cgroups: int) -> list[once.Cost]:
    """Loading, attaching, switching, starting, memory."""
    costs = once.loading(place, times)
    loaded = Weir(place)
    try:
        costs.append(once.attaching(place, times))
        loaded.attach()
        costs.append(once.switching(place, cgroups, times))
        costs += once.starting(place, times)
        costs += once.memory(place)
    finally:
        loaded.close()
    return costs


@click.command()
@click.option(
    "--rounds", default=5, show_default=True, help="How often each workload gets fresh clients, for each load."
)
@click.option("--turns", default=20, show_default=True, help="Batches of each client.")
@click.option("--loads", default=5, show_default=True, help="How often the programs are loaded anew: see RESULTS.md.")
@click.option("--times", default=5, show_default=True, help="How often what is paid once is measured.")
@click.option("--cgroups", default=1000, show_default=True, help="Cgroups of the policy switch.")
@click.option("--containers", default=1000, show_default=True, help="Containers of the agent's node.")
@click.option("--seconds", default=60.0, show_default=True, help="How long an idle agent is watched.")
@click.option("--output", type=click.Path(path_type=Path), default=results.FILE, show_default=True)
def main(
    rounds: int, turns: int, loads: int, times: int, cgroups: int, containers: int, seconds: float, output: Path
) -> None:
    """Measure, and write the results."""
    of_agent = agent.costs(containers, 10 * containers, seconds, 40 * times)
    costs = paid_once(own_place(), times, cgroups)
    samples: Samples = {}
    for number in range(loads):
        for key, values in traffic(own_place(), rounds, turns).items():
            samples.setdefault(key, []).extend(values)
        click.echo(f"load {number + 1} of {loads} measured")
    output.write_text(results.text(samples, costs, of_agent, loads))
    click.echo(f"written: {output}")


if __name__ == "__main__":
    main()
