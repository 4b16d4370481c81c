"""Connections of the agent's server: a thread for each, a limit to their number, and an end to each of them.

Anyone who reaches the port can open connections and send or read slowly. Neither may cost the agent more than LIMIT
threads, nor keep Prometheus from being answered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from agent.errors import WeirError
from agent.node.log import log
from agent.node.tls import Contexts, Tls

LIMIT = 32
"""Connections at one time. One more ends the one that has waited longest without a whole request."""

ROOM = 1.0
"""Seconds for that one's thread to end; if none does, since all are being answered, the new one is closed."""

REQUEST = 10.0
"""Seconds for the TLS handshake and the whole request."""

ANSWER = 60.0
"""Seconds for the whole connection; Prometheus gives up after 10, if it is not told otherwise."""

POLL = 0.5
"""Seconds between two looks at those limits; stop() waits for one."""


@dataclass(eq=False)
class Connection:
    """``answering`` from when the request is whole."""

    sock: socket.socket
    since: float = field(default_factory=time.monotonic)
    answering: bool = False

    def is_over(self, now: float) -> bool:
        """Whether it has had its time."""
        return now - self.since > (ANSWER if self.answering else REQUEST)

    def cut(self) -> None:
        """Make whatever waits for this socket, in its own thread, fail at once."""
        with contextlib.suppress(OSError):
            # Not SSLSocket's method: that one makes the socket a plain one first, and its thread could write in clear.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


class Listener(socketserver.TCPServer):
    """Calls ``answer`` with each connection, in a thread. Raises WeirError when it cannot listen or use the TLS files."""

    allow_reuse_address = True  # connections of the agent before this one may still be in TIME_WAIT
    request_queue_size = 64

    def __init__(self, listen: str, tls: Tls | None, answer: Callable[[Connection, Any, Listener], object]) -> None:
        host, port = parse(listen)
        self._contexts = Contexts(tls) if tls else None
        self._answer = answer
        self._open: dict[Connection, None] = {}  # oldest first
        self._changed = threading.Condition()
        try:
            self.address_family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            super().__init__((str(address[0]), port), socketserver.BaseRequestHandler)
        except OSError as e:
            raise _cannot(listen, e) from e

    def server_bind(self) -> None:
        """[::] serves IPv4 too, whatever net.ipv6.bindv6only says."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; without a pause, an accept that fails for want of descriptors would be tried again at once."""
        try:
            return super().get_request()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.warning("connection not accepted", error=e.strerror)
                time.sleep(POLL)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, if there is room."""
        connection = Connection(request)
        with self._changed:
            if len(self._open) >= LIMIT:
                waiting = next((other for other in self._open if not other.answering), None)
                if waiting:
                    waiting.cut()
                self._changed.wait_for(lambda: len(self._open) < LIMIT, ROOM)
            room = len(self._open) < LIMIT
            if room:
                self._open[connection] = None
        if not room:
            log.warning("too many connections, one was closed", limit=LIMIT)
            request.close()
            return
        request.settimeout(REQUEST)
        thread = threading.Thread(target=self._serve, args=(connection, client_address), daemon=True)
        try:
            thread.start()
        except RuntimeError as e:  # the limit of processes is reached
            log.warning("connection not answered", error=e)
            self._done(connection)

    def service_actions(self) -> None:
        """End the connections that have had their time."""
        now = time.monotonic()
        with self._changed:
            for connection in self._open:
                if connection.is_over(now):
                    connection.cut()

    def _serve(self, connection: Connection, address: Any) -> None:
        try:
            if self._contexts:
                tls = self._contexts.newest().wrap_socket(
                    connection.sock, server_side=True, do_handshake_on_connect=False
                )
                connection.sock = tls
                tls.do_handshake()
            self._answer(connection, address, self)
        except ssl.SSLError as e:
            log.warning("TLS connection refused", peer=address[0], error=e.reason or e)
        except OSError as e:
            log.debug("connection broken off", peer=address[0], error=e)
        except Exception as e:  # noqa: BLE001 - a thread's last resort: the next connection is answered all the same
            log.bug("a bug in weir's server", peer=address[0], error=e)
        finally:
            self._done(connection)

    def _done(self, connection: Connection) -> None:
        with self._changed:  # closed only where nobody cuts it: its number may be another file's a moment later
            self._open.pop(connection, None)
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection.sock, socket.SHUT_WR)
            connection.sock.close()
            self._changed.notify_all()

    def close_all(self) -> None:
        """Stop listening, and end every connection."""
        self.server_close()
        with self._changed:
            for connection in self._open:
                connection.cut()


def parse(listen: str) -> tuple[str, int]:
    """(Host, port) of 127.0.0.1:9469, [::]:9469 or localhost:9469. Raises WeirError."""
    try:
        parts = urlsplit(f"//{listen}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.netloc != listen or "@" in listen:
        raise WeirError(f"{listen} is not an address and a port", "Write 127.0.0.1:9469, 0.0.0.0:9469 or [::]:9469.")
    return host, port


def _cannot(listen: str, error: OSError) -> WeirError:
    if error.errno == errno.EADDRINUSE:
        return WeirError(
            f"{listen} is in use by another program", "Is another agent running? Choose another port with --listen."
        )
    if error.errno == errno.EACCES:
        return WeirError(
            f"ports below 1024 need CAP_NET_BIND_SERVICE; {listen} is refused", "Choose another port with --listen."
        )
    reason = os.strerror(error.errno) if error.errno and not isinstance(error, socket.gaierror) else error.strerror
    return WeirError(f"weir cannot listen on {listen}: {reason}", "--listen takes an address of this host.")
