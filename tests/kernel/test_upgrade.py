"""Pins of an older ABI, taken over by `weir load` while a client knocks: no refused connect succeeds, no count is lost."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.errors import WeirError
from agent.kernel import abi, adopt, libbpf
from agent.kernel.pinned import PinnedKernel
from agent.kernel.seam import Counters
from tests import need
from tests.kernel.knocker import doors, knocker
from tests.kernel.site import Site, site
from tests.kernel.steps import kill_before, steps
from tests.kernel.test_crash import Scene

NEW_IN_2 = ("spare", "slots", "labels")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    need.root()
    with site(tmp_path) as made, doors() as opened:
        made.ok("load", "--max-containers", "64")
        yield Scene(made, opened, made.policy("first", opened.ports[1]), made.policy("second", opened.ports[2]))


def make_old(made: Site) -> None:
    """What ABI 1 left behind: the same programs and maps by another name, without the maps that it did not have.

    The names of its rules were in a map of maps.
    """
    pins = made.place.pins
    old = pins.root / "abi-1"
    pins.base.rename(old)
    for name in NEW_IN_2:
        (old / "maps" / name).unlink()
    inner = [(int(pin.name), libbpf.obj_get(pin)) for pin in (old / "rules").iterdir()]
    if inner:
        outer = map_of_maps(inner[0][1])
        for number, fd in inner:
            libbpf.update(outer, c.c_uint32(number), c.c_uint32(fd))
            os.close(fd)
            (old / "rules" / str(number)).unlink()
        libbpf.obj_pin(outer, old / "maps/rules")
        os.close(outer)
    (old / "rules").rmdir()


def map_of_maps(inner: int) -> int:
    """A BPF_MAP_TYPE_HASH_OF_MAPS (13) for maps like ``inner``; weir itself lets BCC make such maps."""

    class Options(c.Structure):
        _fields_ = [("sz", c.c_size_t), ("btf", c.c_uint32 * 4), ("inner_map_fd", c.c_uint32), ("rest", c.c_uint32 * 6)]

    options = Options(sz=c.sizeof(Options), inner_map_fd=inner)
    fd: int = libbpf.library().bpf_map_create(13, b"rules", 4, 4, 256, c.byref(options))
    assert fd >= 0, os.strerror(c.get_errno())
    return fd


def counted(made: Site, cgroup: Path) -> tuple[Counters, int]:
    """(Bytes and so on, refusals) of a cgroup."""
    kernel = PinnedKernel(made.place.pins)
    try:
        read = kernel.read()
        slot = read.enrolments[tree.cgroup_id(cgroup)].slot
        return read.counters[slot], sum(n for refused, n in read.refusals.items() if refused.slot == slot)
    finally:
        kernel.close()


def rules_of(made: Site) -> list[str]:
    """The names of all rules of all policy versions."""
    kernel = PinnedKernel(made.place.pins)
    try:
        return [rule.name for version in kernel.versions().values() for rule in version.rules]
    finally:
        kernel.close()


def test_it_goes_on_where_the_older_one_was(scene: Scene) -> None:
    with scene.site.cgroup() as cgroup, knocker(cgroup, scene.doors) as client:
        scene.site.ok("attach", cgroup, "--policy", scene.first)
        client.ask()
        before = counted(scene.site, cgroup)
        make_old(scene.site)
        client.ask()
        scene.site.ok("load")
        scene.judged_by_one_policy(client, "first")
        assert rules_of(scene.site) == ["door"]
        after = counted(scene.site, cgroup)
        assert after[1] > before[1] > 0
        assert all(after[0].bytes[kind] >= count for kind, count in before[0].bytes.items())
        assert after[0].sockets_created > before[0].sockets_created > 0
        assert scene.site.place.pins.foreign() == []
        scene.kernel_is_tidy(versions=1)
        scene.site.ok("attach", cgroup, "--policy", scene.second)
        scene.judged_by_one_policy(client, "second")


def test_killed_at_every_step(scene: Scene) -> None:
    with scene.site.cgroup() as cgroup, knocker(cgroup, scene.doors) as client:
        load = scene.site.command("load")
        scene.site.ok("attach", cgroup, "--policy", scene.first)
        make_old(scene.site)
        for step in steps(load, scene.site.environment)[::5]:
            make_old(scene.site)
            assert kill_before(step, load, scene.site.environment), step
            client.ask()
            scene.site.ok("load")
            scene.judged_by_one_policy(client, "first")
            scene.kernel_is_tidy(versions=1)
            assert scene.site.place.pins.foreign() == []


def test_a_layout_that_changed_is_not_taken(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    make_old(scene.site)
    scene.site.place.pins.make()
    monkeypatch.setitem(abi.MAPS, "counters", (abi.MAPS["counters"][0], abi.Config))
    with pytest.raises(WeirError, match="another layout"):
        adopt.adopt(scene.site.place.pins)
    assert list(scene.site.place.pins.maps.iterdir()) == []


def test_another_size_is_refused(scene: Scene) -> None:
    make_old(scene.site)
    done = scene.site.weir("load", "--max-containers", "65")
    assert done.returncode == 1
    assert "loaded for 64 containers" in done.stderr
    scene.site.ok("load")
    scene.kernel_is_tidy(versions=0)
