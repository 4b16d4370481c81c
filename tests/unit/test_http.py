"""The agent's server over real sockets on the loopback device."""

from __future__ import annotations

import gzip
import http.client
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_text
from prometheus_client.registry import Collector as Collects

from agent.errors import WeirError
from agent.metrics import Collector, registry
from agent.node import http as weir_http
from agent.node import listener
from agent.node.http import STALLED, Server
from agent.node.listener import parse
from agent.node.state import Published
from agent.node.tls import Tls, tls_of
from tests import need, nodes
from tests.certificates import Pair, authority, signed

LOCAL = "127.0.0.1:0"
ENOUGH = 30.0
"""Seconds after which something that was to happen is taken not to happen."""


def fail(error: Exception) -> None:
    raise error


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is stopped, and a limit that is reached, are seen without delay."""
    monkeypatch.setattr(weir_http, "POLL", 0.02)


def of_a_node(containers: int = 3) -> CollectorRegistry:
    return registry(Collector(nodes.sources(*nodes.node(containers)), fail))


@contextmanager
def serving(
    listen: str = LOCAL,
    *,
    tls: Tls | None = None,
    published: Published | None = None,
    age: Callable[[], float] = lambda: 0.0,
    metrics: CollectorRegistry | None = None,
) -> Iterator[int]:
    """A server; gives its port."""
    server = Server(listen, metrics or of_a_node(), published or Published(), age, tls)
    server.start()
    try:
        yield server.port
    finally:
        server.stop()


def ask(
    port: int,
    path: str,
    method: str = "GET",
    *,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
    body: bytes | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """(Status, headers in lower case, body)."""
    made: http.client.HTTPConnection = (
        http.client.HTTPSConnection(host, port, timeout=ENOUGH, context=tls)
        if tls
        else http.client.HTTPConnection(host, port, timeout=ENOUGH)
    )
    try:
        made.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = made.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        made.close()


def until(what: Callable[[], object]) -> None:
    """Wait until it holds."""
    end = time.monotonic() + ENOUGH
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def test_metrics_as_text() -> None:
    with serving() as port:
        status, headers, body = ask(port, "/metrics?x=1")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "content-encoding" not in headers
    assert headers["connection"] == "close"
    names = {sample.name for family in plain_text(body.decode()) for sample in family.samples}
    assert {"weir_egress_bytes_total", "weir_ready", "process_resident_memory_bytes"} <= names


def test_metrics_as_openmetrics() -> None:
    with serving() as port:
        _, headers, body = ask(port, "/metrics", Accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.count(b"# EOF\n") == 1
    families = {family.name: family for family in open_metrics(body.decode())}  # type: ignore[no-untyped-call]
    assert families["weir_egress_bytes"].type == "counter"
    assert families["weir_build"].type == "info"


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text;version=1.0.0"])
def test_metrics_packed(accept: str) -> None:
    """Both ways say the same; process_… may differ between two scrapes."""
    with serving() as port:
        _, packed_headers, packed = ask(port, "/metrics", Accept=accept, Accept_Encoding="gzip")
        _, headers, plain = ask(port, "/metrics", Accept=accept)
    assert packed_headers["content-encoding"] == "gzip"
    assert int(packed_headers["content-length"]) == len(packed) < len(plain) == int(headers["content-length"])
    assert ours(gzip.decompress(packed)) == ours(plain)


def ours(page: bytes) -> list[bytes]:
    return [line for line in page.splitlines() if b"process_" not in line]


@pytest.mark.parametrize("openmetrics", [False, True])
def test_the_page_is_what_prometheus_client_writes(openmetrics: bool) -> None:
    """It is written family by family: nothing may get lost between them."""
    from prometheus_client.exposition import choose_encoder

    accept = "application/openmetrics-text;version=1.0.0" if openmetrics else ""
    metrics = of_a_node()
    with serving(metrics=metrics) as port:
        page = ask(port, "/metrics", Accept=accept)[2]
    assert ours(page) == ours(choose_encoder(accept)[0](metrics))


def test_promtool_finds_nothing_to_say(tmp_path: Path) -> None:
    promtool = need.command("promtool")
    with serving() as port:
        page = ask(port, "/metrics")[2]
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_health_is_the_main_loops() -> None:
    ages = [0.0]
    published = Published()
    published.state = replace(published.state, not_ready=())
    with serving(age=lambda: ages[0], published=published) as port:
        assert ask(port, "/readyz")[0] == 200
        assert ask(port, "/healthz")[::2] == (200, b"ok\n")
        ages[0] = STALLED + 1
        status, _, body = ask(port, "/healthz")
        assert (status, body) == (503, b"The agent's main loop has not turned for 61 seconds.\n")
        assert ask(port, "/readyz")[0] == 503


def test_readiness_gives_its_reasons() -> None:
    published = Published()
    with serving(published=published) as port:
        assert ask(port, "/readyz")[0] == 503, "before the first look"
        published.state = replace(published.state, not_ready=("One.", "Two\nlines, ünd \udcff."))
        status, _, body = ask(port, "/readyz")
        assert (status, body.decode()) == (503, "One.\nTwo lines, ünd \\udcff.\n")
        published.state = replace(published.state, not_ready=())
        assert ask(port, "/readyz")[::2] == (200, b"ok\n")
        assert ask(port, "/healthz")[0] == 200


def test_index_and_what_is_not_there() -> None:
    with serving() as port:
        status, headers, body = ask(port, "/")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert b'href="/metrics"' in body
        assert ask(port, "/metric")[0] == 404
        assert ask(port, "//metrics/..")[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods(method: str) -> None:
    with serving() as port:
        status, headers, _ = ask(port, "/metrics", method, body=b"x" * 1000)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/", "/nothing"])
def test_head_is_get_without_the_body(path: str) -> None:
    with serving() as port:
        got, head = ask(port, path), ask(port, path, "HEAD")
        assert raw(port, f"HEAD {path} HTTP/1.1\r\n\r\n".encode()).endswith(b"\r\n\r\n")
    assert (head[0], head[2]) == (got[0], b"")
    assert head[1].keys() == got[1].keys()


def raw(port: int, data: bytes) -> bytes:
    """What comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=ENOUGH) as client:
        client.sendall(data)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_what_is_no_request() -> None:
    with serving() as port:
        assert b"400 Bad request" in raw(port, b"<script>\r\n\r\n")
        assert b"text/plain" in raw(port, b"GET /a b HTTP/1.1\r\n\r\n")
        assert raw(port, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n").startswith(b"HTTP/1.1 431")
        assert raw(port, b"GET /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert raw(port, b"BREW / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 501")
        assert ask(port, "/healthz")[0] == 200


class Failing(Collects):
    """A bug in the collector."""

    def collect(self) -> Iterator[Metric]:
        yield Metric("weir_first", "A family that is written before it fails.", "gauge")
        raise KeyError("a bug")


def test_a_bug_fails_the_scrape_and_nothing_else() -> None:
    made = CollectorRegistry()
    made.register(Failing())
    with serving(metrics=made) as port:
        status, _, body = ask(port, "/metrics")
        assert (status, body) == (500, b"weir could not write the page; its log says why\n")
        assert ask(port, "/healthz")[0] == 200


class Hanging(Collects):
    """A table that is not read to its end."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def collect(self) -> Iterator[Metric]:
        self.begun.set()
        assert self.go.wait(ENOUGH)
        yield Metric("weir_first", "A family.", "gauge")


def test_a_scrape_that_hangs_holds_up_no_other_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weir_http, "BUSY", 0.05)
    made, hanging = CollectorRegistry(), Hanging()
    made.register(hanging)
    with serving(metrics=made) as port:
        first: list[int] = []
        thread = threading.Thread(target=lambda: first.append(ask(port, "/metrics")[0]))
        thread.start()
        assert hanging.begun.wait(ENOUGH)
        assert ask(port, "/healthz")[0] == 200
        assert ask(port, "/metrics")[::2] == (503, b"another scrape has not ended\n")
        hanging.go.set()
        thread.join()
        assert first == [200]


def opened(stack: ExitStack, port: int) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=ENOUGH))


def is_closed(client: socket.socket) -> bool:
    """True when the server has ended it."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is too slow: what ends a connection is something else."""
    monkeypatch.setattr(listener, "REQUEST", 10 * ENOUGH)


@pytest.mark.usefixtures("patient")
def test_clients_that_say_nothing_keep_nobody_out() -> None:
    """Twice as many as there is room for, before any of them has had its time."""
    before = set(threading.enumerate())
    with ExitStack() as stack:
        port = stack.enter_context(serving())
        silent = [opened(stack, port) for _ in range(2 * listener.LIMIT)]
        assert ask(port, "/metrics")[0] == 200
        assert len(set(threading.enumerate()) - before) <= listener.LIMIT + 1
        assert all(is_closed(client) for client in silent[: listener.LIMIT])


def test_more_clients_than_there_is_room_for_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being answered is not broken off for the sake of a new one."""
    monkeypatch.setattr(listener, "LIMIT", 1)
    monkeypatch.setattr(listener, "ROOM", 0.05)
    made, hanging = CollectorRegistry(), Hanging()
    made.register(hanging)
    with serving(metrics=made) as port, ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, port, "/metrics")
        try:
            assert hanging.begun.wait(ENOUGH)
            assert raw_or_nothing(port, b"GET /healthz HTTP/1.1\r\n\r\n") == b""
        finally:
            hanging.go.set()
        assert asked.result()[0] == 200


def test_a_client_that_drips_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time; the request does not."""
    monkeypatch.setattr(listener, "REQUEST", 0.3)
    with ExitStack() as stack:
        port = stack.enter_context(serving())
        client = opened(stack, port)
        stopped = threading.Event()

        def drip() -> None:
            while not stopped.wait(0.05):
                try:
                    client.sendall(b"G")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert is_closed(client)
        finally:
            stopped.set()
            thread.join()


@pytest.mark.usefixtures("patient")
def test_a_client_that_does_not_read_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(listener, "ANSWER", 0.5)
    with ExitStack() as stack:
        port = stack.enter_context(serving(metrics=of_a_node(5000)))
        client = socket.socket()
        stack.enter_context(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        until(lambda: len(set(threading.enumerate()) - before) == 2)
        until(lambda: len(set(threading.enumerate()) - before) == 1)
        assert ask(port, "/healthz")[0] == 200
    assert not caplog.records, "it is nothing that the agent's operator has to know"


@pytest.mark.usefixtures("patient")
def test_stop_ends_everything() -> None:
    before = set(threading.enumerate())
    server = Server(LOCAL, of_a_node(), Published(), lambda: 0.0)
    server.start()
    with ExitStack() as stack:
        clients = [opened(stack, server.port) for _ in range(3)]
        until(lambda: len(set(threading.enumerate()) - before) == 4)
        server.stop()
        assert all(is_closed(client) for client in clients)
    until(lambda: set(threading.enumerate()) <= before)
    with pytest.raises(ConnectionRefusedError):
        ask(server.port, "/healthz")


def test_a_server_that_never_started_stops() -> None:
    Server(LOCAL, of_a_node(), Published(), lambda: 0.0).stop()


def test_ipv6_and_ipv4_by_one_address() -> None:
    with serving("[::]:0") as port:
        assert ask(port, "/healthz", host="::1")[0] == 200
        assert ask(port, "/healthz", host="127.0.0.1")[0] == 200


@pytest.mark.parametrize(
    "listen", ["9469", "127.0.0.1", "::1:9469", ":9469", "127.0.0.1:", "127.0.0.1:99999", "a/b:1", "u@h:1", "[::1", ""]
)
def test_addresses_that_are_none(listen: str) -> None:
    with pytest.raises(WeirError, match="is not an address and a port"):
        parse(listen)


def test_addresses() -> None:
    assert parse("[::]:9469") == ("::", 9469)
    assert parse("localhost:80") == ("localhost", 80)


def test_a_port_in_use() -> None:
    with serving() as port, pytest.raises(WeirError, match=f"127.0.0.1:{port} is in use") as caught:
        Server(f"127.0.0.1:{port}", of_a_node(), Published(), lambda: 0.0)
    assert "--listen" in caught.value.hint


def test_an_address_of_another_host() -> None:
    with pytest.raises(WeirError, match=r"cannot listen on 192\.0\.2\.1:0: Cannot assign"):
        Server("192.0.2.1:0", of_a_node(), Published(), lambda: 0.0)


def test_a_port_that_was_just_in_use_is_free_at_once() -> None:
    with serving() as port:
        raw(port, b"GET /healthz HTTP/1.1\r\n\r\n")  # until the server closes: its side waits then
    with serving(f"127.0.0.1:{port}") as again:
        assert ask(again, "/healthz")[0] == 200


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def own(tmp_path: Path, ca: Pair) -> Pair:
    return signed(tmp_path, "server", ca)


def trusting(ca: Pair, client: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca.cert))
    if client:
        context.load_cert_chain(client.cert, client.key)
    return context


def serial(port: int, ca: Pair) -> str:
    """The number of the certificate that the server shows."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=ENOUGH) as client,
        trusting(ca).wrap_socket(client, server_hostname="127.0.0.1") as tls,
    ):
        shown = tls.getpeercert()
    assert shown
    return str(shown["serialNumber"])


def test_tls(ca: Pair, own: Pair) -> None:
    with serving(tls=Tls(own.cert, own.key)) as port:
        assert ask(port, "/metrics", tls=trusting(ca))[0] == 200
        assert b"weir_ready" not in raw_or_nothing(port, b"GET /metrics HTTP/1.1\r\n\r\n")


def raw_or_nothing(port: int, data: bytes) -> bytes:
    try:
        return raw(port, data)
    except ConnectionResetError:
        return b""


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_nothing_older_than_tls_1_2(ca: Pair, own: Pair) -> None:
    """The client would take 1.1 (at OpenSSL's lowest level of security, at which its hashes are allowed)."""
    with serving(tls=Tls(own.cert, own.key)) as port:
        for version, good in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
            context = trusting(ca)
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = ssl.TLSVersion.TLSv1_1
            context.maximum_version = version
            if good:
                assert ask(port, "/healthz", tls=context)[0] == 200
            else:
                with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
                    ask(port, "/healthz", tls=context)


def test_client_certificates(tmp_path: Path, ca: Pair, own: Pair) -> None:
    client = signed(tmp_path, "client", ca)
    stranger = signed(tmp_path, "stranger", authority(tmp_path, "another"))
    with serving(tls=Tls(own.cert, own.key, ca.cert)) as port:
        assert ask(port, "/metrics", tls=trusting(ca, client))[0] == 200
        for other in (None, stranger):
            with pytest.raises((ssl.SSLError, ConnectionResetError, BrokenPipeError)):
                ask(port, "/metrics", tls=trusting(ca, other))
        assert ask(port, "/healthz", tls=trusting(ca, client))[0] == 200


def test_a_silent_client_does_not_hold_up_the_handshakes_of_others(ca: Pair, own: Pair) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(serving(tls=Tls(own.cert, own.key)))
        opened(stack, port)
        assert ask(port, "/healthz", tls=trusting(ca))[0] == 200


def renewed(directory: Path, ca: Pair) -> Pair:
    directory.mkdir()
    return signed(directory, "server", ca)


def test_new_certificates_are_taken_without_a_restart(tmp_path: Path, ca: Pair) -> None:
    """As the kubelet renews a secret: a symbolic link to the new directory takes the place of the old one's."""
    for name in ("one", "two"):
        renewed(tmp_path / name, ca)
    link = tmp_path / "..data"
    link.symlink_to("one")
    with serving(tls=Tls(link / "server.pem", link / "server.key")) as port:
        first = serial(port, ca)
        assert serial(port, ca) == first
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").rename(link)
        assert serial(port, ca) != first


def test_files_that_are_no_good_change_nothing(tmp_path: Path, ca: Pair, own: Pair) -> None:
    other = renewed(tmp_path / "other", ca)
    with serving(tls=Tls(own.cert, own.key)) as port:
        first = serial(port, ca)
        shutil.copy(other.key, own.key)  # half a renewal: the key of another certificate
        assert serial(port, ca) == first
        own.key.unlink()
        assert serial(port, ca) == first
        shutil.copy(other.key, own.key)
        shutil.copy(other.cert, own.cert)
        assert serial(port, ca) != first


def test_new_authorities_are_taken_too(tmp_path: Path, ca: Pair, own: Pair) -> None:
    accepted = tmp_path / "accepted.pem"
    shutil.copy(ca.cert, accepted)
    client = signed(tmp_path, "client", ca)
    with serving(tls=Tls(own.cert, own.key, accepted)) as port:
        assert ask(port, "/healthz", tls=trusting(ca, client))[0] == 200
        shutil.copy(authority(tmp_path, "another").cert, accepted)
        with pytest.raises((ssl.SSLError, ConnectionResetError, BrokenPipeError)):
            ask(port, "/healthz", tls=trusting(ca, client))


def wrong_files(directory: Path, ca: Pair) -> dict[str, tuple[Tls, str]]:
    good, other = signed(directory, "good", ca), signed(directory, "other", ca)
    text = directory / "text.pem"
    text.write_text("hello\n")
    locked = directory / "locked.key"
    command = ["openssl", "pkey", "-in", str(good.key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    return {
        "missing": (Tls(directory / "no.pem", good.key), r"no\.pem cannot be read: No such file"),
        "directory": (Tls(good.cert, directory), "cannot be read: Is a directory"),
        "not a pair": (Tls(good.cert, other.key), "no certificate and key that belong together: key values mismatch"),
        "no PEM": (Tls(text, good.key), "no certificate and key that belong together"),
        "locked": (Tls(good.cert, locked), "no certificate and key that belong together"),
        "authority": (Tls(good.cert, good.key, text), r"text\.pem has no certificate of an authority"),
    }


@pytest.mark.parametrize("case", ["missing", "directory", "not a pair", "no PEM", "locked", "authority"])
def test_wrong_files_at_the_start(case: str, tmp_path: Path, ca: Pair) -> None:
    tls, message = wrong_files(tmp_path, ca)[case]
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeirError, match=message) as caught:
        Server(LOCAL, of_a_node(), Published(), lambda: 0.0, tls)
    assert caught.value.hint
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_the_three_options() -> None:
    a, b, c = Path("a"), Path("b"), Path("c")
    assert tls_of(None, None, None) is None
    assert tls_of(a, b, c) == Tls(a, b, c)
    for options in ((a, None, None), (None, b, None), (None, None, c), (a, None, c)):
        with pytest.raises(WeirError, match="needs both"):
            tls_of(*options)
