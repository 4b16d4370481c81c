"""Ports of loopback for servers that a test starts: nobody else is given one between its choice and the server's listen()."""

from __future__ import annotations

import socket
from contextlib import ExitStack


def reserve(kept: ExitStack) -> int:
    """A port that is kept from others until the stack is closed.

    Bound and not listened to: a server that sets SO_REUSEADDR, as they all do, can still have it, and until it listens
    nobody answers.
    """
    holder = kept.enter_context(socket.socket())
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return int(holder.getsockname()[1])
