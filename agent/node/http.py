"""/metrics, /healthz and /readyz over HTTP or HTTPS."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import CollectorRegistry

from agent import __version__
from agent.node import memory
from agent.node.listener import POLL, Connection, Listener
from agent.node.log import log
from agent.node.page import Page, page
from agent.node.state import Published
from agent.node.tls import Tls

STALLED = 60.0
"""Seconds without a turn of the main loop after which the agent is not alive. A full look at a large node takes a few."""

BUSY = 20.0
"""Seconds that a scrape waits for the one before it."""

_TEXT = "text/plain; charset=utf-8"
_INDEX = """<!DOCTYPE html>
<html lang="en"><title>weir</title><h1>weir</h1>
<ul>
<li><a href="/metrics">/metrics</a>: what Prometheus reads
<li><a href="/healthz">/healthz</a>: whether the agent runs
<li><a href="/readyz">/readyz</a>: whether every layer that the policies need is in force, and if not, why
</ul></html>
"""


class Answers:
    """What each path answers."""

    def __init__(self, registry: CollectorRegistry, published: Published, age: Callable[[], float]) -> None:
        self._registry = registry
        self._published = published
        self._age = age
        self._scrape = threading.Lock()

    def metrics(self, accept: str, accept_encoding: str) -> tuple[HTTPStatus, Page]:
        """The page. One scrape at a time: two would take twice the memory, and no less time."""
        if not self._scrape.acquire(timeout=BUSY):
            return _plain(HTTPStatus.SERVICE_UNAVAILABLE, "another scrape has not ended\n")
        try:
            return HTTPStatus.OK, page(self._registry, accept, accept_encoding)
        except Exception as e:  # noqa: BLE001 - the scrape fails, and Prometheus shows `up` as 0; the agent goes on
            log.bug("a bug in weir's metrics", error=e)
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR, "weir could not write the page; its log says why\n")
        finally:
            memory.trim()
            self._scrape.release()

    def healthz(self) -> tuple[HTTPStatus, Page]:
        """200 while the main loop turns."""
        stalled = self._stalled()
        return _plain(HTTPStatus.SERVICE_UNAVAILABLE, stalled) if stalled else _plain(HTTPStatus.OK, "ok\n")

    def readyz(self) -> tuple[HTTPStatus, Page]:
        """200 when the node is wholly under control, else the reasons, one a line."""
        lines = [" ".join(reason.split()) for reason in self._published.state.not_ready]
        reasons = self._stalled() + "".join(f"{line}\n" for line in lines)
        return _plain(HTTPStatus.SERVICE_UNAVAILABLE, reasons) if reasons else _plain(HTTPStatus.OK, "ok\n")

    def _stalled(self) -> str:
        age = self._age()
        return f"The agent's main loop has not turned for {age:.0f} seconds.\n" if age > STALLED else ""


def _plain(status: HTTPStatus, text: str) -> tuple[HTTPStatus, Page]:
    return status, Page(_TEXT, "", (text.encode("utf-8", "backslashreplace"),))


class _Handler(BaseHTTPRequestHandler):
    """One request; the connection ends with the answer, so that nobody keeps a thread."""

    protocol_version = "HTTP/1.1"
    server_version = f"weir/{__version__}"
    sys_version = ""
    error_content_type = _TEXT
    error_message_format = "%(code)d %(message)s\n"

    def __init__(self, answers: Answers, connection: Connection, address: Any, server: Listener) -> None:
        self._state = connection
        self._answers = answers
        super().__init__(connection.sock, address, server)

    def do_GET(self) -> None:
        """Answer by path."""
        path = self.path.partition("?")[0]
        self._state.answering = True
        if path == "/metrics":
            accept = ",".join(self.headers.get_all("Accept", []))
            self._send(*self._answers.metrics(accept, self.headers.get("Accept-Encoding", "")))
        elif path == "/healthz":
            self._send(*self._answers.healthz())
        elif path == "/readyz":
            self._send(*self._answers.readyz())
        elif path == "/":
            self._send(HTTPStatus.OK, Page("text/html; charset=utf-8", "", (_INDEX.encode(),)))
        else:
            self._send(*_plain(HTTPStatus.NOT_FOUND, "There is /metrics, /healthz and /readyz.\n"))

    def do_HEAD(self) -> None:
        """As GET, without the page."""
        self.do_GET()

    def refuse(self) -> None:
        """Answer 405; what the request carries is not read."""
        self._state.answering = True
        self._send(*_plain(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD.\n"), {"Allow": "GET, HEAD"})

    def _send(self, status: HTTPStatus, answer: Page, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        sent = {
            "Content-Type": answer.content_type,
            "Content-Encoding": answer.encoding,
            "Content-Length": str(sum(map(len, answer.chunks))),
            "Connection": "close",
            "Vary": "Accept, Accept-Encoding",
            **(headers or {}),
        }
        for name, value in sent.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for chunk in answer.chunks:
                self.wfile.write(chunk)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the standard library
        """For --log-level debug alone."""
        log.debug("request", peer=self.client_address[0], line=format % args)


for _method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
    setattr(_Handler, f"do_{_method}", _Handler.refuse)


class Server:
    """Listens from its creation, answers from ``start`` on. ``age`` is the seconds since the main loop's last turn.

    ``listen`` is ADDRESS:PORT. Raises WeirError when it cannot listen or use the TLS files.
    """

    def __init__(
        self,
        listen: str,
        registry: CollectorRegistry,
        published: Published,
        age: Callable[[], float],
        tls: Tls | None = None,
    ) -> None:
        answers = Answers(registry, published, age)
        self._listener = Listener(listen, tls, partial(_Handler, answers))
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port, when `listen` asked for any by 0."""
        return int(self._listener.server_address[1])

    def start(self) -> None:
        """Answer, in a thread of its own."""
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(POLL,), name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening, and break off what is being answered."""
        if self._thread is not None:
            self._listener.shutdown()
            self._thread.join()
        self._listener.close_all()
