"""A gRPC server on a Unix socket, by grpcio, that answers what a test wants: for what no healthy runtime does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.node import cri  # noqa: F401  # before grpc: it sets how gRPC takes fork()

import grpc  # isort: skip

Answer = Callable[[bytes, grpc.ServicerContext], bytes]
"""The serialised request and its context → the serialised answer."""


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, answers: dict[str, Answer]) -> None:
        self._answers = answers

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        answer = self._answers.get(details.method)
        if answer is None:
            return None
        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def grpc_server(socket: Path, answers: dict[str, Answer]) -> Iterator[None]:
    """Serve ``answers``: method ("ListContainers") → the serialised message. Others are UNIMPLEMENTED, as gRPC has it."""
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.max_send_message_length", -1)])
    methods = {f"/runtime.v1.RuntimeService/{method}": answer for method, answer in answers.items()}
    server.add_generic_rpc_handlers((_Handler(methods),))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()
