"""The peers of a World: one process that answers TCP and UDP on every address and every port.

nftables hands each connection and datagram to the listeners here by TPROXY, with addresses and ports untouched, so the
answers come from the address the client spoke to. What a port does:

    9           sink: reads and counts, answers nothing (the discard service, RFC 863)
    80, 8080    an HTTP/1.0 responder (TCP)
    any other   TCP: sends BANNER, then echoes; UDP: echoes

Control is by standard input and output: the process first writes {"tcp": PORT, "udp": PORT} (where TPROXY shall lead),
then answers each line "received" with a JSON list of Received records. It ends when its standard input ends, so it
cannot outlive the program that started it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

BANNER = b"!"
SINK_PORT = 9
HTTP_PORTS = (80, 8080)
HTTP_ANSWER = b"HTTP/1.0 200 OK\r\nServer: weir-test\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\n"
HTTP_BODY = b"ok\n"

# Numbers that the socket module does not have: asm-generic/socket.h, linux/in.h and linux/in6.h.
SO_RCVBUFFORCE = 33
IP_TRANSPARENT = 19
IP_RECVORIGDSTADDR = 20
IPV6_RECVORIGDSTADDR = 74
IPV6_TRANSPARENT = 75

BACKLOG = 4096
READ_SIZE = 1 << 20  # bytes; large reads, so that the sink does not slow down a throughput test


@dataclass(frozen=True)
class Received:
    """What arrived from one client address for one destination: payload bytes, and connections or datagrams."""

    protocol: str
    source: str
    address: str
    port: int
    count: int
    bytes: int


class Tally:
    """Sums of arrivals by (protocol, source, address, port)."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[str, str, str, int], list[int]] = defaultdict(lambda: [0, 0])

    def entry(self, protocol: str, source: str, address: str, port: int) -> list[int]:
        """The mutable [count, bytes] of one key, shared by all its connections."""
        return self._sums[protocol, source, address, port]

    def records(self) -> list[Received]:
        return [Received(*key, count=count, bytes=size) for key, (count, size) in self._sums.items()]


def unscoped(address: str) -> str:
    """The address without an IPv6 zone."""
    return address.partition("%")[0]


class Connection(asyncio.BufferedProtocol):
    """One accepted TCP connection."""

    # One buffer for all: the loop is one thread, and buffer_updated is done with it before the next read.
    _buffer = memoryview(bytearray(READ_SIZE))

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        address, self._port = transport.get_extra_info("sockname")[:2]
        source = transport.get_extra_info("peername")[0]
        self._sums = self._tally.entry("tcp", unscoped(source), unscoped(address), self._port)
        self._sums[0] += 1
        self._request = b""
        if self._port not in (SINK_PORT, *HTTP_PORTS):
            transport.write(BANNER)

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._sums[1] += nbytes
        if self._port in HTTP_PORTS:
            self._answer(bytes(self._buffer[:nbytes]))
        elif self._port != SINK_PORT:
            self._transport.write(bytes(self._buffer[:nbytes]))

    def _answer(self, data: bytes) -> None:
        self._request += data
        if b"\r\n\r\n" in self._request:
            head = self._request.startswith(b"HEAD ")
            self._transport.write(HTTP_ANSWER if head else HTTP_ANSWER + HTTP_BODY)
            self._transport.close()

    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()


def transparent(family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
    """A non-blocking socket that TPROXY may hand foreign addresses to, and that may be bound to one (CAP_NET_ADMIN)."""
    made = socket.socket(family, kind)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        made.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    return made


def original_destination(family: socket.AddressFamily, messages: list[tuple[int, int, bytes]]) -> tuple[str, int]:
    """The address and port that the client sent to: the sockaddr in the IP(V6)_ORIGDSTADDR control message."""
    start = 8 if family == socket.AF_INET6 else 4
    size = 16 if family == socket.AF_INET6 else 4
    sockaddr = messages[0][2]
    return socket.inet_ntop(family, sockaddr[start : start + size]), int.from_bytes(sockaddr[2:4], "big")


def echo_datagrams(listener: socket.socket, tally: Tally) -> None:
    """Read every waiting datagram; answer from a socket bound to the very address and port it was sent to."""
    family = listener.family
    while True:
        try:
            data, messages, _flags, client = listener.recvmsg(65536, 256)
        except BlockingIOError:
            return
        address, port = original_destination(family, messages)
        sums = tally.entry("udp", unscoped(client[0]), address, port)
        sums[0] += 1
        sums[1] += len(data)
        if port == SINK_PORT:
            continue
        try:
            with transparent(family, socket.SOCK_DGRAM) as answer:
                answer.bind((address, port, 0, client[3]) if family == socket.AF_INET6 else (address, port))
                answer.sendto(data, client)
        except OSError:
            continue  # a multicast or broadcast destination cannot be the source of an answer


def control(tally: Tally, stop: asyncio.Event) -> None:
    """Answer one command line; standard input's end stops the process."""
    line = sys.stdin.readline()
    if not line:
        stop.set()
    elif line.strip() == "received":
        print(json.dumps([asdict(record) for record in tally.records()]), flush=True)


async def serve() -> None:
    loop = asyncio.get_running_loop()
    tally = Tally()
    stop = asyncio.Event()
    ports: dict[str, Any] = {"tcp": 0, "udp": 0}
    for family, anywhere, level, option in (
        (socket.AF_INET, "0.0.0.0", socket.IPPROTO_IP, IP_RECVORIGDSTADDR),
        (socket.AF_INET6, "::", socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR),
    ):
        tcp = transparent(family, socket.SOCK_STREAM)
        tcp.bind((anywhere, ports["tcp"]))
        ports["tcp"] = tcp.getsockname()[1]
        await loop.create_server(lambda: Connection(tally), sock=tcp, backlog=BACKLOG)
        udp = transparent(family, socket.SOCK_DGRAM)
        udp.setsockopt(level, option, 1)
        udp.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)  # the machine's limit may be 200 kB: 300 datagrams
        udp.bind((anywhere, ports["udp"]))
        ports["udp"] = udp.getsockname()[1]
        loop.add_reader(udp, echo_datagrams, udp, tally)
    loop.add_reader(sys.stdin, control, tally, stop)
    print(json.dumps(ports), flush=True)
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve())
