"""A container's birth: when it has an entry of its own and its own policy, and what its first socket costs."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from pathlib import Path
from statistics import median, quantiles
from typing import final

from agent.cgroups import tree
from agent.controller import Controller, Placement, compiled
from agent.kernel import abi, libbpf
from agent.kernel.abi import Flag
from agent.kernel.pinned import PinnedKernel
from agent.place import Place
from tests.bench.node import Node, Pod
from tests.bench.once import Cost
from tests.bench.place import policy_with
from tests.bench.programs import Weir
from tests.node.agent import PATIENCE

OWN = "bench-own"
"""A policy that containers ask for by their pod's annotation."""

_STEP = 0.0002
"""Seconds between two looks at the kernel's table."""


def coming(containers: int, births: int) -> list[Pod]:
    """Pods that the runtime lists before they have a cgroup."""
    return [Pod(containers + number) for number in range(births)]


@final
class _Table:
    """The map of enrolments."""

    def __init__(self, made: Node) -> None:
        self._fd = libbpf.obj_get(made.site.weir.place.pins.maps / "cgroups")

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def wait(self, cgroup: Path, policy: int | None = None) -> float:
        """Until a cgroup has an entry (under a policy version, when one is given): the time.perf_counter() of that."""
        key, entry, began = ctypes.c_uint64(tree.cgroup_id(cgroup)), abi.Enrolled(), time.perf_counter()
        while (now := time.perf_counter()) - began < PATIENCE:
            if libbpf.lookup(self._fd, key, entry) and policy in (None, entry.policy):
                return now
            time.sleep(_STEP)
        raise AssertionError(f"{cgroup} was not enrolled")


def to_entry(made: Node, times: int) -> Cost:
    """mkdir of a container's cgroup, in a pod that is enrolled already → its own entry, made by the agent.

    Nothing in it opens a socket: the kernel would enrol it at once.
    """
    taken = []
    with _Table(made) as table:
        for pod in coming(len(made.made), times):
            path = made.parent / pod.cgroup
            path.parent.mkdir(parents=True)
            table.wait(path.parent)
            began = time.perf_counter()
            path.mkdir()
            taken.append((table.wait(path) - began) * 1000)
            path.rmdir()
            path.parent.rmdir()
    name = f"birth to its own entry, {len(made.made):,} other containers"
    return Cost(name, tuple(taken), "ms", _p99(taken))


def to_own_policy(made: Node, times: int) -> Cost:
    """A pod's and its container's mkdir, just when the runtime lists them → the policy that the pod's annotation asks for."""
    kernel = PinnedKernel(made.site.weir.place.pins)
    taken = []
    with _Table(made) as table:
        for number in range(times):
            pod = Pod(10**6 + number, OWN)
            made.tell([pod])
            path = made.parent / pod.cgroup
            began = time.perf_counter()
            path.mkdir(parents=True)
            table.wait(path)
            while not (own := [n for n, version in kernel.versions().items() if version.name == OWN]):
                time.sleep(_STEP)
            taken.append((table.wait(path, own[0]) - began) * 1000)
            path.rmdir()
            path.parent.rmdir()
    kernel.close()
    note = f"{_p99(taken)}; the default policy until then"
    return Cost(f"birth to the policy of its annotation, {len(made.made):,} others", tuple(taken), "ms", note)


def _p99(taken: list[float]) -> str:
    return f"p99 {quantiles(taken, n=100, method='inclusive')[98]:,.1f}" if len(taken) > 1 else ""


def first_socket(place: Place, times: int) -> list[Cost]:
    """The first socket of a cgroup born below a managed parent, which the program enrols, and of one enrolled before."""
    loaded = Weir(place)
    controller = Controller(loaded.kernel, place.root)
    born, enrolled = [], []
    try:
        loaded.attach()
        policy = compiled(policy_with(10))
        version, flags = controller.install(policy), policy.version.flags
        controller.place([Placement(tree.cgroup_id(place.slice), version, flags, Flag.PARENT)])
        controller.stock(times)
        for number in range(times):
            fresh, known = place.slice / f"born-{number}", place.slice / f"known-{number}"
            for path in (fresh, known):
                path.mkdir()
            controller.place([Placement(tree.cgroup_id(known), version, flags, Flag.BORN)])
            born.append(_microseconds(fresh))
            enrolled.append(_microseconds(known))
            assert tree.cgroup_id(fresh) in loaded.kernel.enrolments(), "it was not enrolled by its first socket"
    finally:
        loaded.close()
    added = median(a - b for a, b in zip(born, enrolled, strict=True))
    return [
        Cost("first socket() of a cgroup that nobody has enrolled yet", tuple(born), "µs", f"added: {added:+.1f}"),
        Cost("first socket() of a cgroup that is enrolled", tuple(enrolled), "µs"),
    ]


def _microseconds(cgroup: Path) -> float:
    """What socket() takes in a process that has just joined a cgroup, CPU time of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()  # warms what has nothing to do with the cgroup
            time.thread_time_ns()
            (cgroup / "cgroup.procs").write_text("0")
            began = time.thread_time_ns()
            one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            os.write(writer, struct.pack("Q", time.thread_time_ns() - began))
            one.close()
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    (taken,) = struct.unpack("Q", os.read(reader, 8))
    os.close(reader)
    os.waitpid(pid, 0)
    return float(taken) / 1000
