"""The verbs as a stranger types them: help, attach and detach, events, load and unload, what machines read."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cgroups import tree
from agent.cli import VERBS
from tests import need
from tests.kernel.knocker import doors
from tests.kernel.site import TIMEOUT, Site, one_line, site


@pytest.fixture(scope="module", name="here")
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One site for all: the commands leave it as they found it, and test_nothing_is_left checks that."""
    with site(tmp_path_factory.mktemp("cli")) as made:
        made.ok("load")
        yield made


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(here: Site, verb: str) -> None:
    """Each verb's help says what it does and shows a command that begins with its name."""
    text = here.ok(verb, "--help")
    assert re.search(rf"Examples?:\s+weir {verb}\b", text), text
    assert verb in here.ok("--help")


def test_unknown_verb_and_option(here: Site) -> None:
    for arguments in (["frobnicate"], ["status", "--frobnicate"], ["run"], ["attach", "/x"]):
        done = here.weir(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Usage:" in done.stderr


def test_attach_switch_and_detach(here: Site) -> None:
    with doors() as listening, here.cgroup() as cgroup:
        shut, first, second = listening.ports
        name = f"/{cgroup.relative_to(here.place.root)}"
        here.ok("attach", name, "--policy", here.policy("one", first))
        assert open_ports(cgroup, listening.ports) == [first]
        here.ok("attach", cgroup, "--policy", here.policy("two", second))  # a path of the file system will do, too
        assert open_ports(cgroup, listening.ports) == [second]
        (row,) = [row for row in here.status()["cgroups"] if row["cgroup"] == name]
        assert (row["policy"], row["mode"], row["layers"]["hooks"], row["layers"]["lsm"]) == (
            "two",
            "enforce",
            True,
            False,
        )
        assert row["bytes"]["loopback"] > 0
        assert sum(refused["count"] for refused in row["refused"]) == 4  # two under each policy
        last = json.loads(here.ok("detach", "--json", name))
        assert last["bytes"] == row["bytes"]
        assert open_ports(cgroup, listening.ports) == [shut, first, second]
        assert name not in here.ok("status")


def open_ports(cgroup: Path, ports: tuple[int, ...]) -> list[int]:
    """To which ports of this host a process in a cgroup can connect."""
    script = 'echo 0 > "$0"; for p in "$@"; do (exec 3<>/dev/tcp/127.0.0.1/$p) 2>/dev/null && echo $p; done; true'
    command = ["bash", "-c", script, str(cgroup / "cgroup.procs"), *map(str, ports)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_a_cgroup_that_is_gone_is_detached_by_its_number(here: Site) -> None:
    with here.cgroup() as cgroup:
        number = tree.cgroup_id(cgroup)
        here.ok("attach", cgroup, "-p", "audit")
    (row,) = [row for row in here.status()["cgroups"] if row["cgroup_id"] == number]
    assert (row["gone"], row["policy"]) == (True, "audit")
    here.ok("detach", str(number))
    assert not [row for row in here.status()["cgroups"] if row["cgroup_id"] == number]


def test_attach_below_and_above(here: Site) -> None:
    """A parent's programs serve its children; the other way round is refused, since both would count each byte."""
    with here.cgroup() as parent:
        child = parent / "child"
        child.mkdir()
        here.ok("attach", child, "-p", "audit")
        said = one_line(here.weir("attach", parent, "-p", "audit"))
        assert "attached below" in said["message"]
        assert f"weir detach {child}" in said["hint"]
        here.ok("detach", child)
        here.ok("attach", parent, "-p", "audit")
        here.ok("attach", child, "-p", "untrusted")
        assert (here.policy_of(parent), here.policy_of(child)) == ("audit", "untrusted")
        here.ok("detach", child)
        here.ok("detach", parent)


def test_events(here: Site) -> None:
    with doors() as listening, here.cgroup() as cgroup:
        here.ok("events")  # those of the tests before
        here.ok("attach", cgroup, "-p", here.policy("one", listening.ports[1]))
        open_ports(cgroup, listening.ports)
        lines = [json.loads(line) for line in here.ok("events", "--json").splitlines()]
        assert [(line["port"], line["rule"], line["action"], line["comm"]) for line in lines] == [
            (port, "default", "refused", "bash") for port in (listening.ports[0], listening.ports[2])
        ]
        assert lines[0]["cgroup"] == f"/{cgroup.name}"
        assert here.ok("events") == ""
        here.ok("detach", cgroup)


def test_events_as_they_happen_and_for_one_reader(here: Site) -> None:
    with doors() as listening, here.cgroup() as cgroup:
        here.ok("attach", cgroup, "-p", here.policy("one", listening.ports[1]))
        reader = here.start("events", "-f", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert reader.stdout
        open_ports(cgroup, listening.ports)
        assert json.loads(reader.stdout.readline())["port"] == listening.ports[0]
        said = one_line(here.weir("events"))
        assert "another process reads the events already" in said["message"]
        reader.send_signal(signal.SIGINT)
        _, errors = reader.communicate(timeout=TIMEOUT)
        assert (reader.returncode, errors.strip()) == (130, "")
        here.ok("events")
        here.ok("detach", cgroup)


def test_version_and_probe(here: Site) -> None:
    version = json.loads(here.ok("version", "--json"))
    assert version["kernel"] == os.uname().release
    assert version["weir"] in here.ok("version")
    facts = json.loads(here.ok("probe", "--json"))
    assert facts["works"] is True


def test_load_twice_and_status_of_an_empty_site(here: Site) -> None:
    assert "already loaded" in here.ok("load")
    assert "loaded in" in here.ok("load", "--force")
    assert here.ok("status").startswith("loaded: build ")


def test_attach_root(here: Site) -> None:
    """The programs on a parent that nobody is enrolled in; detach takes them away again, but not under a child's feet."""
    with here.cgroup() as parent:
        child = parent / "child"
        child.mkdir()
        here.ok("load", "--attach-root", parent)
        here.ok("attach", child, "-p", "audit")
        assert "need the programs" in one_line(here.weir("detach", parent))["message"]
        here.ok("detach", child)
        here.ok("detach", parent)
        assert "under no policy" in one_line(here.weir("detach", parent))["message"]


def test_unload(tmp_path: Path) -> None:
    """Refused while a cgroup is enrolled; afterwards nothing is left, and a second unload is no error."""
    with site(tmp_path) as made:
        assert made.ok("unload") == "nothing is loaded\n"
        assert "not loaded" in made.ok("status")
        assert "nothing is loaded" in one_line(made.weir("events"))["message"]
        with made.cgroup() as cgroup:
            made.ok("run", "-p", "audit", "--", "true")  # loads by itself
            made.ok("attach", cgroup, "-p", "audit")
            said = one_line(made.weir("unload"))
            assert str(cgroup) in said["message"]
            assert "--force" in said["hint"]
            assert made.policy_of(cgroup) == "audit"
            made.ok("unload", "--force")
        assert not made.place.pins.root.exists()
        assert not made.place.slice.exists()


def test_nothing_is_left(here: Site) -> None:
    """After all of the above."""
    need.root()
    assert here.rest() == []
    assert here.status()["cgroups"] == []
