"""``weir attach`` and ``weir detach``: a cgroup that others made, enrolled while it runs."""

from __future__ import annotations

import json
import sys

import click

from agent import names
from agent.cgroups import tree
from agent.cgroups.classid import require_cgroup_of_sockets
from agent.controller import Controller, compiled
from agent.errors import WeirError
from agent.kernel.abi import Flag
from agent.kernel.load import load
from agent.kernel.pinned import PinnedKernel
from agent.place import Place
from agent.policy.find import load as load_policy


@click.command(
    epilog="\b\nExamples:\n  weir attach /system.slice/job.service --policy appengine\n"
    "  weir attach /system.slice/job.service --policy audit     # switch: one map write"
)
@click.argument("cgroup")
@click.option("--policy", "-p", required=True, help="A policy file, or a shipped policy's name.")
def attach(cgroup: str, policy: str) -> int:
    """Put CGROUP, and everything below it that has no policy of its own, under a policy; or switch it to another.

    CGROUP is a directory, or a path below the cgroup2 mount. Processes that run already are governed from the next
    call and packet on; sockets that they hold keep working where the policy allows.
    """
    place = Place.here()
    path = tree.resolve(cgroup, place.root)
    require_cgroup_of_sockets()
    ready = compiled(load_policy(policy))
    kernel = PinnedKernel(place.pins)
    try:
        with place.locked():
            if not kernel.is_loaded():
                print("weir: loading the programs", file=sys.stderr, flush=True)
                load(place.pins)
            controller = Controller(kernel, place.root)
            controller.manage(path)
            controller.enrol(path, ready, Flag(0) if tree.processes(path) else Flag.BORN)
    finally:
        kernel.close()
    print(f"{names.cgroup_name(path, place.root, 0)} is under policy {ready.version.name}")
    for sentence in names.not_in_force(ready.version.flags):
        print(f"weir: {sentence}", file=sys.stderr)
    print("weir: No seccomp filter: sockets that are neither inet nor inet6 are not refused here.", file=sys.stderr)
    return 0


@click.command(epilog="\b\nExample:\n  weir detach /system.slice/job.service")
@click.argument("cgroup")
@click.option("--json", "as_json", is_flag=True, help="Write the last counters as JSON.")
def detach(cgroup: str, as_json: bool) -> int:
    """Take CGROUP from under its policy and print what it has sent.

    A policy of one of its parents counts again. CGROUP may also be the number of a cgroup that is gone (weir status).
    """
    place = Place.here()
    number = int(cgroup) if cgroup.isdigit() else tree.cgroup_id(tree.resolve(cgroup, place.root))
    kernel = PinnedKernel(place.pins)
    try:
        with place.locked():
            if not kernel.is_loaded() or number not in {**kernel.enrolments(), **kernel.attached()}:
                raise WeirError(f"{cgroup} is under no policy of its own", "See which are: weir status")
            enrolment = kernel.enrolments().get(number)
            controller = Controller(kernel, place.root)
            if enrolment:
                controller.withdraw(number)
            controller.release(number)
            counters = controller.totals(enrolment.slot)[0] if enrolment else None
            needed = number in kernel.attached()
    finally:
        kernel.close()
    if counters is None:  # attached by `weir load --attach-root`, or by a command that was killed
        if needed:
            raise WeirError(f"cgroups below {cgroup} need the programs that are attached to it", "Detach them first.")
        print(f"{cgroup} was under no policy; weir's programs are detached from it")
    elif as_json:
        print(json.dumps({"cgroup": cgroup, "bytes": counters.bytes, "packets": counters.packets}))
    else:
        print(f"{cgroup} detached; it sent " + "; ".join(f"{kind} {n:,} B" for kind, n in counters.bytes.items()))
    return 0
