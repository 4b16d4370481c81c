"""The page of /metrics is prometheus_client's own, to the byte, although it is written some samples at a time."""

from __future__ import annotations

import zlib

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from agent.metrics import Collector
from agent.node.page import page
from tests import nodes

OPEN_METRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3"


def made(containers: int) -> CollectorRegistry:
    def fail(error: Exception) -> None:
        raise error

    registry = CollectorRegistry()
    registry.register(Collector(nodes.sources(*nodes.node(containers)), fail))
    return registry


@pytest.mark.parametrize("accept", ["", OPEN_METRICS])
@pytest.mark.parametrize("containers", [0, 1201])
def test_the_same_bytes(accept: str, containers: int) -> None:
    registry = made(containers)
    encode, content_type = choose_encoder(accept)
    plain = page(registry, accept, "")
    assert (plain.content_type, plain.encoding) == (content_type, "")
    assert b"".join(plain.chunks) == encode(registry)
    packed = page(registry, accept, "gzip")
    assert packed.encoding == "gzip"
    assert zlib.decompress(b"".join(packed.chunks), 16 + zlib.MAX_WBITS) == encode(registry)
