"""A DNS server and a web server on loopback, for a network namespace that has nothing else: prints "ready" when both answer.

Every name is 127.0.0.7 and ::1; every request on port 80 is answered 200.
"""

from __future__ import annotations

import socket
import struct
import threading

ADDRESS = "127.0.0.7"
_A, _AAAA, _IN = 1, 28, 1  # RFC 1035, RFC 3596
_ANSWERS = {_A: socket.inet_pton(socket.AF_INET, ADDRESS), _AAAA: socket.inet_pton(socket.AF_INET6, "::1")}


def answer(query: bytes) -> bytes:
    """Return the reply to one DNS query with one question."""
    end = query.index(0, 12) + 5  # the name, its zero byte, type and class
    (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
    data = _ANSWERS.get(kind)
    record = b"\xc0\x0c" + struct.pack(">HHIH", kind, _IN, 60, len(data)) + data if data else b""
    header = query[:2] + struct.pack(">HHHHH", 0x8180, 1, 1 if data else 0, 0, 0)
    return header + query[12:end] + record


def serve_names(server: socket.socket) -> None:
    """Answer DNS queries for ever."""
    while True:
        query, client = server.recvfrom(4096)
        server.sendto(answer(query), client)


def serve_web(server: socket.socket) -> None:
    """Answer requests for ever, one at a time."""
    while True:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")


def main() -> None:
    """Serve until killed."""
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("127.0.0.1", 53))
    web = socket.create_server(("::", 80), family=socket.AF_INET6, dualstack_ipv6=True)
    threading.Thread(target=serve_names, args=(names,), daemon=True).start()
    print("ready", flush=True)
    serve_web(web)


if __name__ == "__main__":
    main()
