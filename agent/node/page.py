"""A registry → the bytes of /metrics, some samples at a time.

With thousands of containers the page as one text, its lines and its samples would be several times the agent's memory.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.registry import Collector

_END = b"# EOF\n"
"""Ends a page of OpenMetrics; the other format has no end."""

_BLOCK = 500
"""Samples that are in memory as text at one time: some 200 kB."""

_LEVEL = 1
"""Of zlib: names repeat so much that higher levels take longer and save little."""


@dataclass(frozen=True)
class Page:
    """``encoding`` is the Content-Encoding, empty for none."""

    content_type: str
    encoding: str
    chunks: tuple[bytes, ...]


class _One(Collector):
    """A registry of one family, for prometheus_client's encoders."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def page(registry: CollectorRegistry, accept: str, accept_encoding: str) -> Page:
    """The page in the format that the request's headers ask for, packed when they allow it."""
    encode, content_type = choose_encoder(accept)
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS) if gzip_accepted(accept_encoding) else None
    pack = packer.compress if packer else bytes
    chunks = []
    end = b""
    for metric in registry.collect():
        head = encode(_One(_part(metric, 0, 0)))
        end = _END if head.endswith(_END) else b""
        head = head.removesuffix(end)
        chunks.append(pack(head))
        for start in range(0, len(metric.samples), _BLOCK):
            text = encode(_One(_part(metric, start, start + _BLOCK)))
            chunks.append(pack(text.removesuffix(end).removeprefix(head)))
    chunks.append(pack(end))
    if packer:
        chunks.append(packer.flush())
    return Page(content_type, "gzip" if packer else "", tuple(chunk for chunk in chunks if chunk))


def _part(metric: Metric, start: int, end: int) -> Metric:
    """The family with some of its samples."""
    part = copy.copy(metric)
    part.samples = metric.samples[start:end]
    return part
