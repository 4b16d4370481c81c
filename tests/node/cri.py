"""The tests' own way to the CRI socket: gRPC by grpcio, messages of tests/node/api.proto. Not the agent's client."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, TypeVar, cast, final

# Tests fork: gRPC's own handlers of fork() would have every child wait for its threads. No child uses a channel.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
from google.protobuf.message import Message

TIMEOUT = 300.0
"""Seconds for one call: on a busy machine a container's start takes some."""

# Milliseconds. By default a channel that found no listener looks again after a second, then less and less often.
_OPTIONS = [(f"grpc.{which}_reconnect_backoff_ms", 20) for which in ("initial", "min", "max")]

Answer = TypeVar("Answer", bound=Message)


class _Call(Protocol):
    def __call__(self, request: Message, timeout: float) -> Message: ...


@final
class Calls:
    """Calls of one runtime, through a channel of its own; close it, or use it by `with`."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def __call__(self, method: str, request: Message, answer: type[Answer], service: str = "RuntimeService") -> Answer:
        """Call a method, say "RunPodSandbox". Raises grpc.RpcError when the runtime refuses or does not answer."""
        call = cast(
            "_Call",
            self._channel.unary_unary(
                f"/runtime.v1.{service}/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=answer.FromString,
            ),
        )
        return cast("Answer", call(request, timeout=TIMEOUT))
