"""What is around the agent fails: the runtime, bpffs, another agent, the clock. Rules stay, counts stay, it is told."""

from __future__ import annotations

import secrets
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.kernel.pins import Pins
from tests.kernel.prefixes import without
from tests.node.containerd import Containerd
from tests.node.faults import Node, ended, in_mounts_of, keeping_mounts_of, plain_node
from tests.node.kubelet import Kubelet
from tests.node.probe import Peer, closed


@pytest.fixture(name="here")
def _here(tmp_path: Path, probe: Path, door: Peer, wall: Peer) -> Iterator[Node]:
    with plain_node(tmp_path, probe, door, wall) as made:
        yield made


@pytest.fixture
def elsewhere(here: Node, tmp_path: Path) -> Iterator[tuple[Node, str]]:
    """A node whose pins are on a bpffs that only the agent sees, and its directory."""
    weir = here.site.weir
    (tmp_path / "bpf").mkdir()
    here.site.weir = replace(weir, place=replace(weir.place, pins=Pins(tmp_path / "bpf/weir")))
    yield here, str(tmp_path / "bpf")
    here.site.weir = weir


def test_bpffs_unmounted(elsewhere: tuple[Node, str]) -> None:
    """The agent holds the rules without their pins, says that they hang by it, and pins them when it can."""
    here, bpffs = elsewhere
    with here.agent(prefix=without(f"mount -t bpf bpf {bpffs}")) as agent:
        here.works("web")
        here.await_exact(agent)
        before = here.settled(agent)
        for _ in range(2):
            in_mounts_of(agent, f"umount --lazy {bpffs}")
            here.await_reason(agent, "is not on a BPF file system")
            here.lives(agent)
            assert agent.metric("weir_enforced", layer="hooks", cgroup=here.label("web")) == 1
            here.works("web")
            here.works("born-meanwhile")
            here.await_exact(agent, "web")
            in_mounts_of(agent, f"mount -t bpf bpf {bpffs}")
            agent.ready()
            in_mounts_of(agent, f"test -e {bpffs}/weir/abi-*/maps/config -a -e {bpffs}/weir/abi-*/links/*/connect4")
            in_mounts_of(agent, f"ls {bpffs}/weir/abi-*/rules/*")
            here.works("web")
            here.works("born-later")
            here.await_exact(agent)
        here.leaks_nothing(agent, before, watches=2)
        with keeping_mounts_of(agent) as inside:
            # What was pinned again is what is in force: it outlives the agent.
            agent.end(signal.SIGKILL)
            here.is_refused("web")
            here.is_refused("born-after-it")
            with here.agent(prefix=inside) as again:
                here.works("web")
                here.await_exact(again)
                here.lives(again)


def test_containerd_killed(
    tmp_path: Path, node: Containerd, kubelet: Kubelet, probe: Path, door: Peer, wall: Peer
) -> None:
    """Names come from what it said last, then from the next one; rules and counts need none."""
    with plain_node(tmp_path, probe, door, wall, f"{node.cgroups.strip('/')}/kubepods") as here:
        here.site.options["--cri"] = str(node.socket)
        before, after = kubelet.pod("shop", "before-0"), None
        main = kubelet.container(before, "main")
        name = kubelet.cgroup(main).removeprefix(here.label(""))
        with here.agent() as agent:
            who = {"namespace": "shop", "pod": "before-0", "container": "main"}
            agent.until(lambda: agent.samples("weir_egress_bytes_total", **who))
            size = here.settled(agent)
            try:
                node.kill()
                agent.until(lambda: agent.metric("weir_cri_up") == 0)
                assert agent.status()["node"]["cri"]
                here.works(name)
                here.works("without-a-name")
                here.await_exact(agent)
                assert agent.metric("weir_egress_bytes_total", **who) == here.sent[name]
                assert agent.get("/readyz")[0] == 200
            finally:
                node.start()
            agent.until(lambda: agent.metric("weir_cri_up") == 1)
            after = kubelet.pod("shop", "after-0")
            agent.until(lambda: agent.samples("weir_egress_bytes_total", pod="after-0"))
            here.lives(agent)
            here.leaks_nothing(agent, size, watches=2)
        for pod in (before, after):
            kubelet.remove_pod(pod)


def test_cri_hangs(here: Node, tmp_path: Path) -> None:
    """Containers that nobody names come and go under their policy."""
    here.site.options |= {"--cri": str(tmp_path / "cri"), "--retain": "1s"}
    names = [f"cri-containerd-{secrets.token_hex(32)}.scope" for _ in range(8)]
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "cri"))
        silent.listen(1)
        with here.agent() as agent:
            assert agent.metric("weir_cri_up") == 0
            before = here.settled(agent)
            room = here.room()
            for name in names:
                here.works(name)
            here.await_exact(agent)
            for name in names:
                here.cgroup(name).rmdir()
            agent.until(lambda: here.room() >= room, lambda: f"{here.room()} of {room}")
            here.works("last")
            here.await_exact(agent, "last")
            here.lives(agent)
            here.leaks_nothing(agent, before, watches=1)
            assert agent.end() == 0
    here.is_tidy()


def test_two_agents(here: Node) -> None:
    """The second ends and says why. With a socket of its own it does no harm."""
    with here.agent() as first:
        here.works("web")
        with here.agent(ready=False) as second:
            assert ended(second) == 1
        assert "weir: another agent listens at" in here.site.log.read_text()
        here.site.options["--socket"] = str(here.site.folder / "run2/agent.sock")
        with here.agent(ready=False) as third:
            third.until(lambda: "another process reads the events already" in third.get("/readyz")[1])
            for name in ("web", "new"):
                here.works(name)
            here.await_exact(first)
            here.await_exact(third)
            here.lives(third)
            assert third.end() == 0
        here.works("web")
        here.works("newer")
        here.await_exact(first)
        del here.site.options["--socket"]
        here.lives(first)
        assert first.end() == 0
    here.is_tidy()


def test_pins_of_another_version(here: Node) -> None:
    with here.agent() as agent:
        here.works("web")
        assert agent.end() == 0
    pins = here.site.weir.place.pins
    pins.base.rename(pins.root / "abi-99")
    with here.agent(ready=False) as agent:
        assert ended(agent) == 1
    assert "another version of weir (abi-99)" in here.site.log.read_text()
    here.works("web")
    pins.remove_base(pins.base)  # empty
    (pins.root / "abi-99").rename(pins.base)
    with here.agent() as agent:
        here.await_exact(agent)
        here.lives(agent)


def empty(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


def remove(directory: Path) -> None:
    empty(directory)
    directory.rmdir()


def make_a_file(directory: Path) -> None:
    remove(directory)
    directory.write_text("not a directory")


def close(directory: Path) -> None:
    directory.chmod(0)


def break_file(directory: Path) -> None:
    (directory / "closed.yaml").write_text("spec: {egress: [")


def close_file(directory: Path) -> None:
    (directory / "closed.yaml").chmod(0)


def test_policy_directory_damaged(here: Node) -> None:
    """Whatever becomes of it, what was in force stays; an agent that begins with it so says what is wrong, and ends."""
    directory = here.site.policies
    as_in_a_pod = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    damages = (empty, remove, make_a_file, close, break_file, close_file)
    with here.agent(prefix=as_in_a_pod) as agent:
        before = here.settled(agent)
        for number, damage in enumerate(damages):
            failures = agent.metric("weir_policy_reload_failures_total")
            damage(directory)
            agent.until(lambda f=failures: agent.metric("weir_policy_reload_failures_total") > f)
            assert agent.status()["node"]["reloads"]["failures"], damage
            assert agent.metric("weir_policy_file_invalid") >= 1
            here.works("web")
            here.works(f"new-{number}")
            mend(here)
            agent.until(lambda: not agent.status()["node"]["reloads"]["failures"])
            assert agent.metric("weir_policy_file_invalid") == 0
        here.await_exact(agent)
        here.leaks_nothing(agent, before, watches=len(damages) + 1)
        here.lives(agent)
        assert agent.end() == 0
    for damage in (remove, close, break_file):
        damage(directory)
        with here.agent(prefix=as_in_a_pod, ready=False) as agent:
            status, said = ended(agent), here.site.log.read_text()
        assert (status, "weir: there is no default policy 'closed'" in said) == (1, True) or "is not readable" in said
        here.site.log.unlink()
        here.works("web")
        mend(here)


def mend(here: Node) -> None:
    """The directory as it was."""
    if here.site.policies.is_file():
        here.site.policies.unlink()
    here.site.policies.mkdir(exist_ok=True)
    here.site.policies.chmod(0o755)
    path = here.site.policies / "closed.yaml"
    path.unlink(missing_ok=True)
    here.site.write("closed", closed("closed", here.door.port))
