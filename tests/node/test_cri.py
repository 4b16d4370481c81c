"""The agent's client of the CRI, against containerd, and against what else may be at a socket's path."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest

from agent.cri import api_pb2 as api
from agent.cri.client import SANDBOX, Client, CriUnavailable, Inventory, PodInfo
from agent.node.naming import FEW, Naming
from tests import need
from tests.node import remains
from tests.node.containerd import Containerd
from tests.node.grpc_server import Answer, grpc_server
from tests.node.kubelet import Kubelet

SHORT = 0.3
"""Seconds until the client gives up, where nothing ever answers. Coming back at all is what is tested."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


def unavailable(path: Path, timeout: float = 30) -> str:
    """The sentence of the error that asking there gives; it has a hint."""
    with pytest.raises(CriUnavailable) as caught:
        Client(path, timeout).inventory()
    assert caught.value.hint
    return caught.value.message


# containerd


def test_names_labels_and_annotations(node: Containerd, kubelet: Kubelet) -> None:
    web = kubelet.pod("shop", "web-0", {"app": "web", "tier": "1"}, {"weir.dev/policy": "strict", "other": "x" * 5000})
    job = kubelet.pod("batch", "job-0", {"app": "job"})
    front, side, worker = (kubelet.container(p, n) for p, n in ((web, "front"), (web, "side"), (job, "worker")))
    inventory = Client(node.socket).inventory()

    named = inventory.named(front.id)
    assert named is not None
    assert (named.namespace, named.pod, named.container) == ("shop", "web-0", "front")
    assert named.labels["app"] == "web"
    assert named.labels["tier"] == "1"
    assert named.annotations == {"weir.dev/policy": "strict"}
    assert names(inventory, side.id) == ("shop", "web-0", "side")
    assert names(inventory, worker.id) == ("batch", "job-0", "worker")
    assert names(inventory, web.id) == ("shop", "web-0", SANDBOX)
    assert inventory.named("0" * 64) is None

    some = Client(node.socket).some([front.id, web.id, "0" * 64], [job.uid, "00000000-0000-0000-0000-000000000000"])
    assert set(some.containers) == {front.id}
    assert set(some.pods) == {web.id, job.id}
    assert [some.named(one.id) for one in (front, web)] == [inventory.named(one.id) for one in (front, web)]
    assert some.pod_of_uid(job.uid) == inventory.pod_of_uid(job.uid)
    assert inventory.with_more(some) is inventory
    assert some.with_more(inventory).with_more(some) == inventory

    found = inventory.pod_of_uid(web.uid)
    assert found is not None
    assert (found.sandbox_id, found.name, found.labels["app"]) == (web.id, "web-0", "web")
    assert inventory.pod_of_uid("00000000-0000-0000-0000-000000000000") is None

    kubelet.stop(front)
    assert names(Client(node.socket).inventory(), front.id) == ("shop", "web-0", "front")
    kubelet.remove(front)
    inventory = Client(node.socket).inventory()
    assert inventory.named(front.id) is None
    assert names(inventory, side.id) == ("shop", "web-0", "side")
    kubelet.remove_pod(web)
    inventory = Client(node.socket).inventory()
    assert inventory.named(side.id) is None
    assert inventory.named(web.id) is None
    assert inventory.pod_of_uid(web.uid) is None
    kubelet.remove_pod(job)


def names(inventory: Inventory, container_id: str) -> tuple[str, str, str]:
    named = inventory.named(container_id)
    assert named is not None
    return named.namespace, named.pod, named.container


def test_a_new_sandbox_of_the_same_pod(node: Containerd, kubelet: Kubelet) -> None:
    """After a sandbox died the kubelet makes another with the same uid; the dead one is listed for a while."""
    old = kubelet.pod("shop", "web-1", {"version": "old"})
    kubelet.stop_pod(old)
    new = kubelet.pod("shop", "web-1", {"version": "new"}, uid=old.uid, attempt=1)
    inventory = Client(node.socket).inventory()
    assert {old.id, new.id} <= set(inventory.pods)
    pod = inventory.pod_of_uid(old.uid)
    assert pod is not None
    assert pod.sandbox_id == new.id
    kubelet.remove_pod(old)
    kubelet.remove_pod(new)


@pytest.mark.parametrize("end", [Containerd.stop, Containerd.kill])
def test_restart_of_containerd(node: Containerd, kubelet: Kubelet, end: Callable[[Containerd], None]) -> None:
    pod = kubelet.pod("shop", "web-2")
    container = kubelet.container(pod, "front")
    client = Client(node.socket)
    assert names(client.inventory(), container.id) == ("shop", "web-2", "front")
    end(node)
    try:
        with pytest.raises(CriUnavailable):
            client.inventory()
    finally:
        node.start()
    assert names(client.inventory(), container.id) == ("shop", "web-2", "front")
    kubelet.remove_pod(pod)


def test_containerd_that_hangs(node: Containerd) -> None:
    """The kernel takes the connection for it; nothing ever comes."""
    os.kill(node.pid, signal.SIGSTOP)
    try:
        assert "gave no answer in 0.3 s" in unavailable(node.socket, SHORT)
    finally:
        os.kill(node.pid, signal.SIGCONT)
    Client(node.socket).inventory()


# Whatever else may be there


def test_missing(path: Path) -> None:
    assert unavailable(path) == f"There is no socket {path}"
    assert "There is no socket" in unavailable(path / "below")


def test_nobody_listens(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert unavailable(path) == f"Nobody listens at {path}"


def test_path_too_long(tmp_path: Path) -> None:
    assert "Cannot connect" in unavailable(tmp_path / ("x" * 120))


def test_permission() -> None:
    need.root()
    with TemporaryDirectory() as directory:  # pytest's own are closed to other users
        Path(directory).chmod(0o755)
        path = Path(directory, "s.sock")
        with listener(path, nothing):
            path.chmod(0o600)
            os.seteuid(65534)
            try:
                assert unavailable(path) == f"The socket {path} may not be used: Permission denied"
            finally:
                os.seteuid(0)


def nothing(_: socket.socket) -> None:
    """A server that says nothing."""


@contextmanager
def listener(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """A listener that hands each connection to ``serve`` and then leaves it open."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        kept = []

        def accept() -> None:
            with suppress(OSError):  # the listener was shut down: the test is over
                while True:
                    connection, _ = listening.accept()
                    kept.append(connection)
                    with suppress(OSError):
                        serve(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in kept:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()


def test_listener_that_never_accepts(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(0)
        assert "gave no answer in 0.3 s" in unavailable(path, SHORT)  # the one place in its queue
        assert "gave no answer in 0.3 s" in unavailable(path, SHORT)


def test_listener_that_never_answers(path: Path) -> None:
    with listener(path, nothing):
        assert "gave no answer in 0.3 s" in unavailable(path, SHORT)


def test_answer_by_drops(path: Path) -> None:
    """The deadline is for the whole question: something that comes now and then does not move it."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")  # HTTP/2: SETTINGS, empty
        for _ in range(200):
            time.sleep(SHORT / 10)
            connection.sendall(b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x01")  # WINDOW_UPDATE
        connection.shutdown(socket.SHUT_RDWR)

    with listener(path, drip):
        assert "gave no answer in 0.3 s" in unavailable(path, SHORT)


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 mail\r\n", bytes(512), bytes(range(256))])
def test_no_grpc(path: Path, said: bytes) -> None:
    with listener(path, lambda connection: connection.sendall(said)):
        assert "does not speak gRPC: it begins with" in unavailable(path)


def test_settings_of_the_wrong_length(path: Path) -> None:
    with listener(path, lambda connection: connection.sendall(b"\x00\x00\x05\x04\x00\x00\x00\x00\x00" + bytes(5))):
        assert "does not speak gRPC" in unavailable(path)


def test_http2_without_grpc(path: Path) -> None:
    """A web server: it answers the question with an empty page."""

    def page(connection: socket.socket) -> None:
        connection.recv(65536)  # the client's beginning
        connection.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        connection.recv(65536)  # its question; then HEADERS, end of stream: ":status: 200" of HPACK's static table
        connection.sendall(b"\x00\x00\x01\x01\x05\x00\x00\x00\x01\x88")

    with listener(path, page):
        assert "does not speak gRPC: HTTP status 200 without a gRPC status" in unavailable(path)


def test_closed_at_once(path: Path) -> None:
    with listener(path, lambda connection: connection.shutdown(socket.SHUT_RDWR)):
        assert "broke the connection off" in unavailable(path)


# gRPC servers that are no containerd, or one in trouble


def fixed(data: bytes) -> Answer:
    return lambda *_: data


def test_no_descriptor_stays_open(path: Path, tmp_path: Path) -> None:
    """And none is left to the garbage collector, which would be a warning, and so an error."""
    with grpc_server(tmp_path / "g.sock", {"ListContainers": fixed(b""), "ListPodSandbox": fixed(b"")}):
        Client(tmp_path / "g.sock").inventory()  # by now the server has opened all that it will
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            unavailable(path)
            Client(tmp_path / "g.sock").inventory()
        with listener(path, lambda connection: connection.close()):
            for _ in range(20):
                unavailable(path)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before


def test_without_the_api(path: Path) -> None:
    with grpc_server(path, {}):
        assert unavailable(path) == f"{path} does not offer the CRI API v1"


def test_refusal_has_the_runtime_s_words(path: Path) -> None:
    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNKNOWN, "server is not initialized yet: größer")

    with grpc_server(path, {"ListContainers": refuse}):
        assert unavailable(path).endswith("refuses ListContainers: server is not initialized yet: größer")


def test_deadline_that_the_server_keeps(path: Path) -> None:
    held = threading.Event()

    def hold(_: bytes, context: grpc.ServicerContext) -> bytes:
        held.wait()
        return b""

    with grpc_server(path, {"ListContainers": hold}):
        message = unavailable(path, SHORT)
        held.set()
    assert "gave no answer in 0.3 s" in message


def test_no_cri_message(path: Path) -> None:
    with grpc_server(path, {"ListContainers": fixed(b"\xff\xff\xff")}):
        assert "gave an answer that is no CRI message" in unavailable(path)


def test_unknown_fields_are_skipped(path: Path) -> None:
    newer = b"\xc0\x3e\x01" + b"\xca\x3e\x05later"  # field 1000, a number; field 1001, five bytes
    pod = api.PodSandbox(id="p", metadata=api.PodSandboxMetadata(name="web", namespace="shop", uid="u"))
    container = api.Container(id="c", pod_sandbox_id="p", metadata=api.ContainerMetadata(name="front"))

    def listed(message: api.PodSandbox | api.Container) -> bytes:
        data = message.SerializeToString() + newer
        return b"\x0a" + bytes([len(data)]) + data + newer  # field 1 of either answer

    with grpc_server(path, {"ListContainers": fixed(listed(container)), "ListPodSandbox": fixed(listed(pod))}):
        assert names(Client(path).inventory(), "c") == ("shop", "web", "front")


def test_container_without_its_pod_has_no_names(path: Path) -> None:
    containers = api.ListContainersResponse(containers=[api.Container(id="c", pod_sandbox_id="p")])
    with grpc_server(path, {"ListContainers": fixed(containers.SerializeToString()), "ListPodSandbox": fixed(b"")}):
        assert Client(path).inventory().named("c") is None


def pods(number: int, annotation: int) -> Answer:
    listed = [api.PodSandbox(id=f"p{i}", annotations={"other": "x" * annotation}) for i in range(number)]
    return fixed(api.ListPodSandboxResponse(items=listed).SerializeToString())


def test_many_pods(path: Path) -> None:
    """More than HTTP/2's windows hold, for a stream and for the connection."""
    with grpc_server(path, {"ListContainers": fixed(b""), "ListPodSandbox": pods(5000, 1000)}):
        assert len(Client(path, 60).inventory().pods) == 5000


def test_more_than_the_limit(path: Path) -> None:
    with grpc_server(path, {"ListContainers": fixed(b""), "ListPodSandbox": pods(1000, 20000)}):
        assert unavailable(path, 60).endswith("an answer of more than 16 MB")


def test_of_several_sandboxes_the_newest_whichever_was_learnt_of_first() -> None:
    def one(number: int) -> Inventory:
        return Inventory({}, {f"s{number}": PodInfo(f"s{number}", "u", "ns", "web", {}, {}, number)})

    for first, then in ((1, 2), (2, 1)):
        found = one(first).with_more(one(then)).pod_of_uid("u")
        assert found
        assert found.sandbox_id == "s2"


# Naming, which asks


def test_a_few_missing_names_are_asked_for_one_by_one_and_many_as_a_list(path: Path) -> None:
    pods = {
        uid: api.PodSandbox(id=f"s-{uid}", metadata=api.PodSandboxMetadata(name=f"n-{uid}", uid=uid)) for uid in "abcd"
    }
    asked: list[str] = []

    def answer(request: bytes, _: grpc.ServicerContext) -> bytes:
        uid = api.ListPodSandboxRequest.FromString(request).filter.label_selector.get("io.kubernetes.pod.uid", "")
        asked.append(uid)
        return api.ListPodSandboxResponse(items=[pods[uid]] if uid else pods.values()).SerializeToString()

    arrived = threading.Event()
    naming = Naming([path], 3600, arrived.set)
    with grpc_server(path, {"ListContainers": fixed(b""), "ListPodSandbox": answer}):
        naming.start()
        try:
            remains.wait("the first answer", lambda: not naming.problem)
            assert asked == [""]
            pods["e"] = api.PodSandbox(id="s-e", metadata=api.PodSandboxMetadata(name="n-e", uid="e"))
            before = naming.answer
            assert naming.pod("e") is None
            naming.miss()
            remains.wait("one name", lambda: naming.pod("e") is not None)
            assert "e" in asked
            assert naming.answer != before
            assert naming.pod("a") is not None, "what was listed before is known still"

            more = [f"f{number}" for number in range(10 * FEW)]
            pods.update(
                {uid: api.PodSandbox(id=uid, metadata=api.PodSandboxMetadata(name=uid, uid=uid)) for uid in more}
            )
            asked.clear()
            assert [naming.pod(uid) for uid in more] == [None] * len(more)
            naming.miss()
            remains.wait("many names", lambda: all(naming.pod(uid) for uid in more))
            assert "" in asked
        finally:
            naming.stop()


def test_a_pod_that_a_runtime_does_not_find_by_its_label_is_found_in_the_list(path: Path) -> None:
    pod = api.PodSandbox(id="s", metadata=api.PodSandboxMetadata(name="n", uid="u"))
    listing: list[api.PodSandbox] = []

    def answer(request: bytes, _: grpc.ServicerContext) -> bytes:
        whole = not api.ListPodSandboxRequest.FromString(request).HasField("filter")
        return api.ListPodSandboxResponse(items=listing if whole else []).SerializeToString()

    naming = Naming([path], 3600, threading.Event().set)
    with grpc_server(path, {"ListContainers": fixed(b""), "ListPodSandbox": answer}):
        naming.start()
        try:
            remains.wait("the first answer", lambda: not naming.problem)
            listing.append(pod)
            assert naming.pod("u") is None
            naming.miss()
            remains.wait("the name", lambda: naming.pod("u") is not None)
        finally:
            naming.stop()


def test_a_runtime_that_starts_after_the_agent_is_found(tmp_path: Path) -> None:
    """As after a boot, where the agent is a unit that starts before the kubelet's: none of the usual sockets is there yet."""
    here = tmp_path / "crio.sock"
    pod = api.PodSandbox(id="s", metadata=api.PodSandboxMetadata(name="n", uid="u"))
    listed = api.ListPodSandboxResponse(items=[pod]).SerializeToString()
    naming = Naming([tmp_path / "containerd.sock", here], 0.05, threading.Event().set)
    naming.start()
    try:
        assert not naming.problem, "nobody is to be asked yet, which is right where no runtime comes"
        assert naming.pod("u") is None
        remains.wait("the sentence", lambda: f"{here}" in naming.problem)
        with grpc_server(here, {"ListContainers": fixed(b""), "ListPodSandbox": fixed(listed)}):
            remains.wait("the name", lambda: naming.pod("u") is not None)
            remains.wait("the end of the sentence", lambda: not naming.problem)
    finally:
        naming.stop()
