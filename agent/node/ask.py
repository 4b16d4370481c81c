"""The agent's Unix socket, client side: what `weir status`, `weir events` and `weir top` ask."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.errors import WeirError
from agent.kernel.pins import Pins

TIMEOUT = 30.0
"""Seconds that the agent may take for its answer."""

_STUCK = "See whether it is stuck: its log, `top`. Rules stay in force without it, and weir load shows that they do."


def door(pins: Pins, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the agent of these pins listens: WEIR_SOCKET, else /run/NAME/agent.sock; NAME is that of the pins' directory.

    So that one who names other pins by WEIR_PINS is not told of the agent of the usual ones.
    """
    return Path(environment.get("WEIR_SOCKET", Path("/run", pins.root.name, "agent.sock")))


def status(path: Path) -> dict[str, Any] | None:
    """The state of the node as the agent tells it (agent.status.gather); None when no agent listens.

    Raises WeirError when it refuses or does not answer.
    """
    for data in _ask(path, {"want": "status"}) or ():
        return data
    return None


def events(path: Path, follow: bool) -> Iterator[dict[str, Any]] | None:
    """The last events, or with ``follow`` those that come, as agent.events.as_data has them; None when no agent listens.

    {"lost": n} stands where this reader was too slow. Raises WeirError when the agent refuses, or ends.
    """
    told = _ask(path, {"want": "events", "follow": follow})
    return told if told is None or follow else iter(list(told))  # at once: a pager would keep the agent waiting


def _ask(path: Path, request: Mapping[str, Any]) -> Iterator[dict[str, Any]] | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(TIMEOUT)
    try:
        connection.connect(os.fspath(path))
        with suppress(BrokenPipeError):  # it hung up on us at once; what it said is still to be read
            connection.sendall(json.dumps(request).encode() + b"\n")
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as e:
        connection.close()
        if isinstance(e, PermissionError):
            raise WeirError(f"the agent's socket {path} is for root", "Run as root.") from e
        raise WeirError(f"cannot ask the agent at {path}: {e.strerror or e}", _STUCK) from e
    return _answers(path, request, connection)


def _answers(path: Path, request: Mapping[str, Any], connection: socket.socket) -> Iterator[dict[str, Any]]:
    """The lines of the answer."""
    follows = bool(request.get("follow"))
    with connection, connection.makefile("rb") as lines:
        if follows:
            connection.settimeout(None)
        try:
            for line in lines:
                data: dict[str, Any] = json.loads(line)
                if "error" in data:
                    raise WeirError(data["error"], data.get("hint", ""))
                yield data
        except OSError as e:
            raise WeirError(f"the agent at {path} does not answer: {e.strerror or e}", _STUCK) from e
        except ValueError as e:
            raise WeirError(f"the agent at {path} hung up in the middle of its answer", _STUCK) from e
    if follows or request["want"] == "status":
        raise WeirError(f"the agent at {path} has ended", "Its service manager starts it again; then ask again.")
