"""Unary gRPC calls over a Unix socket: one HTTP/2 connection, one deadline, no thread.

Not grpcio: asking for 1,000 pods by it added more than 30 MB to an agent that may have 48 in all, by this 12; its threads
and its handlers of fork() get in the way of the commands that the agent starts; and of gRPC, one request with one answer
is all that is needed. The protocol: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md. h2 does HTTP/2.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import final
from urllib.parse import unquote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError

from agent.errors import WeirError

_LARGEST = 16 << 20  # bytes of one answer; the kubelet's own limit (maxMsgSize of its CRI client)
_PREFIX = struct.Struct(">?I")  # before each message: compressed or not, length

# HTTP/2: a frame begins with its length (3 bytes) and type; the first one that a server sends is SETTINGS (RFC 9113, 3.4).
_FRAME_HEADER = 9
_SETTINGS = 4

# Numbers of google.rpc.Code.
_DEADLINE_EXCEEDED = 4
_UNIMPLEMENTED = 12

_WITHOUT = "Until it answers, rules are in force and containers have no names; `--cri none` does without for good"


class CriUnavailable(WeirError):
    """The container runtime cannot be asked now. Asking again later may work."""


@final
class Connection:
    """A connection to the gRPC server at ``path``; everything that it does ends ``timeout`` seconds after it was made.

    Raises CriUnavailable, here and in every call.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self._path = path
        self._end = time.monotonic() + timeout
        self._timeout = timeout
        self._http = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
        except ProtocolError as e:
            self._socket.close()
            raise self._no_grpc(str(e)) from e
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def call(self, method: str, request: bytes) -> bytearray:
        """The answer to a call of ``method`` ("/package.Service/Method"), both as serialised messages."""
        http = self._http
        stream = http.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("grpc-timeout", f"{max(1, int(self._left() * 1000))}m"),
        ]
        answer = _Answer(method)
        try:
            http.send_headers(stream, headers)
            http.send_data(stream, _PREFIX.pack(False, len(request)) + request, end_stream=True)
            self._send()
            while not answer.ended:
                for event in http.receive_data(self._receive()):
                    if isinstance(event, DataReceived):
                        http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    answer.take(event)
                self._send()
        except ProtocolError as e:
            raise self._no_grpc(str(e) or type(e).__name__) from e
        except _BrokenOffError as e:
            raise self._gone() from e
        return self._message(answer)

    def _connect(self) -> None:
        self._socket.settimeout(self._left())
        try:
            self._socket.connect(str(self._path))
        except (TimeoutError, BlockingIOError) as e:  # the latter: its queue of connections is full
            raise self._hangs() from e
        except OSError as e:
            raise self._refused(e) from e
        self._http.initiate_connection()
        self._send()
        # h2 would wait for the megabytes that text announces when it is read as a frame.
        head = b""
        while len(head) < _FRAME_HEADER:
            head += self._receive()
        if head[0] or head[3] != _SETTINGS:
            raise self._no_grpc(f"it begins with {head[:16]!r}")
        self._http.receive_data(head)

    def _send(self) -> None:
        self._socket.settimeout(self._left())
        try:
            self._socket.sendall(self._http.data_to_send())
        except TimeoutError as e:
            raise self._hangs() from e
        except OSError as e:
            raise self._gone() from e

    def _receive(self) -> bytes:
        self._socket.settimeout(self._left())
        try:
            data = self._socket.recv(65536)
        except TimeoutError as e:
            raise self._hangs() from e
        except OSError as e:
            raise self._gone() from e
        if not data:
            raise self._gone()
        return data

    def _left(self) -> float:
        """Seconds to the deadline. Raises CriUnavailable when it has passed."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self._hangs()
        return left

    def _message(self, answer: _Answer) -> bytearray:
        if answer.status == 0:
            if len(answer.data) < _PREFIX.size:
                raise self._no_grpc("an answer without a message")
            compressed, length = _PREFIX.unpack_from(answer.data)
            if compressed or length != len(answer.data) - _PREFIX.size:
                raise self._no_grpc("a message of the wrong length")
            del answer.data[: _PREFIX.size]  # in place: an answer can be of megabytes
            return answer.data
        if answer.status is None:
            raise self._no_grpc(f"HTTP status {answer.http_status} without a gRPC status")
        if answer.status == _DEADLINE_EXCEEDED:
            raise self._hangs()
        if answer.status == _UNIMPLEMENTED:
            raise CriUnavailable(
                f"{self._path} does not offer the CRI API v1",
                "containerd has it since 1.6, unless `cri` is among disabled_plugins in /etc/containerd/config.toml, "
                "and CRI-O since 1.23",
            )
        raise CriUnavailable(
            f"The container runtime at {self._path} refuses {answer.method}: {answer.reason}",
            "See its log: journalctl --unit containerd --unit crio",
        )

    def _hangs(self) -> CriUnavailable:
        return CriUnavailable(
            f"The container runtime at {self._path} gave no answer in {self._timeout:g} s",
            f"See its log: journalctl --unit containerd --unit crio. {_WITHOUT}",
        )

    def _gone(self) -> CriUnavailable:
        message = f"The container runtime at {self._path} broke the connection off"
        return CriUnavailable(message, f"It does so when it is restarted. {_WITHOUT}")

    def _no_grpc(self, what: str) -> CriUnavailable:
        message = f"What listens at {self._path} does not speak gRPC: {what}"
        return CriUnavailable(
            message, "--cri is the socket of containerd or CRI-O, say /run/containerd/containerd.sock"
        )

    def _refused(self, error: OSError) -> CriUnavailable:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            hint = "Start the container runtime, or name its socket with --cri; in a pod, mount the socket's directory"
            return CriUnavailable(f"There is no socket {self._path}", hint)
        if error.errno in (errno.EACCES, errno.EPERM):
            hint = "The agent must run as root, and a security module such as AppArmor or SELinux must let it connect"
            return CriUnavailable(f"The socket {self._path} may not be used: {error.strerror}", hint)
        if error.errno == errno.ECONNREFUSED:
            return CriUnavailable(f"Nobody listens at {self._path}", f"Is the container runtime running? {_WITHOUT}")
        reason = error.strerror or str(error)
        return CriUnavailable(f"Cannot connect to {self._path}: {reason}", "Name the runtime's socket with --cri")


class _BrokenOffError(Exception):
    """The server has ended the stream or the connection before the answer was whole."""


class _Answer:
    """What has come of one call. ``status`` is gRPC's, None as long as there is none."""

    def __init__(self, method: str) -> None:
        self.method = method.rpartition("/")[2]
        self.data = bytearray()
        self.http_status = "?"
        self.status: int | None = None
        self.reason = ""
        self.ended = False

    def take(self, event: Event) -> None:
        """Take in what h2 made of the bytes; nothing counts after the end. Raises ProtocolError and _BrokenOffError."""
        if self.ended:
            return
        if isinstance(event, (ResponseReceived, TrailersReceived)):
            self._take_headers({str(name): str(value) for name, value in event.headers})
        elif isinstance(event, DataReceived):
            self.data += event.data
            if len(self.data) > _LARGEST:
                raise ProtocolError(f"an answer of more than {_LARGEST >> 20} MB")
        elif isinstance(event, StreamEnded):
            self.ended = True
        elif isinstance(event, (StreamReset, ConnectionTerminated)):
            raise _BrokenOffError

    def _take_headers(self, headers: dict[str, str]) -> None:
        self.http_status = headers.get(":status", self.http_status)
        if "grpc-status" in headers:
            try:
                self.status = int(headers["grpc-status"])
            except ValueError as e:
                raise ProtocolError("a status that is no number") from e
            self.reason = unquote(headers.get("grpc-message", "")) or f"status {self.status}"
