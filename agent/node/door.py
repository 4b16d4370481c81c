"""The agent's Unix socket, server side: the state of the node, and events as they happen, for root on this host.

A client sends one line, {"want": "status"} or {"want": "events", "follow": true}, and gets JSON lines. What goes wrong
is a line {"error": sentence, "hint": what to do}. Events without "follow" are the last KEPT; with it, those that come
from then on. Each reader of events has a queue of its own: what finds no room is counted, and told to that reader alone
in a line {"lost": n} where the gap is. Nothing that a client does or leaves undone makes ``publish`` wait.

Two threads: one moves bytes, the other asks for the state, which may take a while.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.errors import WeirError
from agent.node.doorway import listen, locked, own_directory

MAX_CLIENTS = 32
KEPT = 1000
"""The last events, for those who ask what there was: some 400 kB."""

ROOM = 1000
"""Events that wait for one reader."""

MAX_REQUEST = 4096
"""Bytes of a request line."""

PATIENCE = 30.0
"""Seconds without progress after which a client that waits for no events is hung up on."""

_PEERCRED = struct.Struct("iII")  # struct ucred: pid, uid, gid (unix(7))


class _Client:
    """One connection. ``lines`` wait to be sent; ``pending`` is what is left of the line that is on its way."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.request = b""
        self.asked = False
        self.follows = False
        self.ends = False
        self.lines: deque[bytes] = deque()
        self.pending = b""
        self.lost = 0
        self.since = time.monotonic()

    def offer(self, line: bytes) -> None:
        """Queue a line, or count it as lost."""
        if len(self.lines) >= ROOM:
            self.lost += 1
            return
        self.tell_lost()
        self.lines.append(line)

    def tell_lost(self) -> None:
        """Queue what was lost, where the gap is."""
        if self.lost:
            self.lines.append(_line({"lost": self.lost}))
            self.lost = 0


class Door:
    """Serves on a socket at ``path``. ``status`` makes the answer to "status"; it is called in a thread of the Door's."""

    def __init__(self, path: Path, status: Callable[[], Mapping[str, Any]], patience: float = PATIENCE) -> None:
        self._path = path
        self._status = status
        self._patience = patience
        self._lock = threading.Lock()  # over _clients' queues and _kept; never held over a system call that can wait
        self._clients: dict[int, _Client] = {}
        self._kept: deque[bytes] = deque(maxlen=KEPT)
        self._asked: queue.SimpleQueue[_Client | None] = queue.SimpleQueue()
        self._end = False
        self._threads: list[threading.Thread] = []
        self._made = False

    def start(self) -> None:
        """Listen. Raises WeirError when another agent does, or the directory is not the agent's own."""
        try:
            self._made = own_directory(self._path)
            with locked(self._path.parent):
                self._listener = listen(self._path, MAX_CLIENTS)
        except OSError as e:
            raise WeirError(
                f"cannot listen at {self._path}: {e.strerror or e}",
                "Choose another place: --socket PATH (100 bytes at most).",
            ) from e
        self._inode = os.stat(self._path).st_ino
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._threads = [
            threading.Thread(target=self._serve, name="door", daemon=True),
            threading.Thread(target=self._answer, name="door-status", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Hang up on everybody and remove the socket."""
        if not self._threads:
            return
        self._end = True
        self._asked.put(None)
        self._ring()
        self._threads[0].join()
        self._threads[1].join(self._patience)  # it may be in the middle of an answer
        with suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                self._path.unlink()
            if self._made:
                self._path.parent.rmdir()
        self._threads = []

    def publish(self, event: Mapping[str, Any]) -> None:
        """Pass an event on to whoever follows; never waits for them."""
        line = _line(event)
        with self._lock:
            self._kept.append(line)
            following = [client for client in self._clients.values() if client.follows]
            for client in following:
                client.offer(line)
        if following:
            self._ring()

    def _ring(self) -> None:
        with suppress(OSError):  # it has been rung already, or nobody is in any more
            self._wake.send(b"\0")

    def _answer(self) -> None:
        while client := self._asked.get():
            try:
                line = _line(self._status())
            except WeirError as e:
                line = _error(e.message, e.hint)
            except Exception as e:  # noqa: BLE001 - the client is told; the agent goes on
                line = _error(f"the agent cannot say how it is: {e!r}", "This is a bug in weir; its log may say more.")
            with self._lock:
                client.lines.append(line)
                client.ends = True
            self._ring()

    def _serve(self) -> None:
        try:
            while not self._end:
                for key, events in self._selector.select(self._patience / 10):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._woken:
                        with suppress(BlockingIOError):
                            self._woken.recv(4096)
                    else:
                        self._turn(key.data, events)
                self._look_after()
        finally:
            for client in list(self._clients.values()):
                self._hang_up(client)
            for end in (self._listener, self._wake, self._woken):
                end.close()
            self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # gone again, or no descriptor is free: it stays in the backlog
        connection.setblocking(False)
        client = _Client(connection)
        _, uid, _ = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        if uid not in (0, os.geteuid()):
            refusal = _error(f"user {uid} may not ask the agent", "Run as root.")
        elif len(self._clients) >= MAX_CLIENTS:
            refusal = _error(
                f"{MAX_CLIENTS} others ask the agent already", "Stop some of them: weir events -f, weir top."
            )
        else:
            with self._lock:
                self._clients[connection.fileno()] = client
            self._selector.register(connection, selectors.EVENT_READ, client)
            return
        with connection, suppress(OSError):
            connection.send(refusal)

    def _turn(self, client: _Client, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._hear(client)
            if events & selectors.EVENT_WRITE:
                self._send(client)
        except BlockingIOError:
            pass
        except OSError:
            self._hang_up(client)

    def _hear(self, client: _Client) -> None:
        data = client.connection.recv(MAX_REQUEST)
        if not data:
            raise ConnectionResetError
        if client.asked:
            return  # one request for each connection: what comes after it is nobody's
        client.request += data
        line, end, _ = client.request.partition(b"\n")
        if end or len(client.request) >= MAX_REQUEST:
            client.asked = True
            self._ask(client, line)

    def _ask(self, client: _Client, line: bytes) -> None:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        match request:
            case {"want": "status"}:
                self._asked.put(client)
            case {"want": "events", "follow": True}:
                with self._lock:
                    client.follows = True
            case {"want": "events"}:
                with self._lock:
                    client.lines.extend(self._kept)
                    client.ends = True
            case _:
                with self._lock:
                    client.lines.append(_error("the agent does not know this request", "Use the weir of its version."))
                    client.ends = True

    def _send(self, client: _Client) -> None:
        while True:
            if not client.pending:
                with self._lock:
                    if not client.lines:
                        client.tell_lost()
                    client.pending = client.lines.popleft() if client.lines else b""
                if not client.pending:
                    return
            sent = client.connection.send(client.pending)
            client.pending = client.pending[sent:]
            client.since = time.monotonic()

    def _look_after(self) -> None:
        """Watch for room where something waits; hang up on those that are served, and on those that sleep."""
        now = time.monotonic()
        for client in list(self._clients.values()):
            waits = bool(client.pending or client.lines)
            sleeps = not client.follows and (waits or not client.asked) and now - client.since > self._patience
            if sleeps or (client.ends and not waits):
                self._hang_up(client)
            else:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if waits else 0)
                if self._selector.get_key(client.connection).events != wanted:
                    self._selector.modify(client.connection, wanted, client)

    def _hang_up(self, client: _Client) -> None:
        with self._lock:
            del self._clients[client.connection.fileno()]
        self._selector.unregister(client.connection)
        client.connection.close()


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


def _error(sentence: str, hint: str) -> bytes:
    return _line({"error": sentence, "hint": hint})
