"""Does the attempts, without weir and under it, and says what was seen: by the program, by weir, by the peer's device."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agent.errors import WeirError
from agent.events import as_data
from agent.kernel.pinned import PinnedKernel
from tests.demo.attempts import LOCAL_PORT, Attempt
from tests.demo.place import Weir, summary
from tests.servers import transparent
from tests.world import CLIENT, Count, World

CLIENT_PROGRAM = (sys.executable, "-m", "tests.demo.client")
POLICY = "appengine"

_ROOT = Path(__file__).resolve().parents[2]
_STRANGER = ("198.51.100.9", 4444)

_LAYERS = {
    "sock_create": "socket hook",
    "connect": "connect hook",
    "sendmsg": "sendmsg hook",
    "bind": "bind hook",
    "egress": "packet out",
    "ingress": "packet in",
}


@dataclass(frozen=True)
class Seen:
    """``saw`` is a word or an errno's name, ``size`` the bytes that the program received."""

    saw: str
    size: int


@dataclass(frozen=True)
class Refusal:
    """Which layer refused, and the rule with its line as weir reported it; seccomp reports no rule."""

    layer: str
    rule: str


@dataclass(frozen=True)
class Ran:
    """One `weir run`: what its program printed, weir's summary, and what the peer's device counted.

    For each attempt: what the program saw, and the events (as of `weir events --json`) that came meanwhile.
    """

    output: str
    summary: dict[str, Any]
    device: Count
    seen: list[Seen] = field(default_factory=list)
    events: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def counted(self) -> Count:
        """What weir counted as sent over the link."""
        sent = [numbers for kind, numbers in self.summary["egress"].items() if kind != "loopback"]
        return Count(sum(one["packets"] for one in sent), sum(one["bytes"] for one in sent))

    @property
    def reported(self) -> bool:
        """True when every refusal that was counted was also reported as an event."""
        counted: int = sum(row["count"] for row in self.summary["refused"])
        return sum(map(len, self.events)) == counted


def without_weir(attempts: Sequence[Attempt]) -> list[Seen]:
    """Do the attempts as if weir did not exist."""
    with World(offloads=False) as world, loopback_server(world):
        pipe = subprocess.PIPE
        client = subprocess.Popen(world.command(CLIENT_PROGRAM), cwd=_ROOT, stdin=pipe, stdout=pipe, text=True)
        try:
            return [attempt_one(client, attempt, world) for attempt in attempts]
        finally:
            client.kill()
            client.communicate()


def under_weir(weir: Weir, attempts: Sequence[Attempt]) -> Ran:
    """Do the attempts under `weir run`, and read the events after each."""
    with World(offloads=False) as world, loopback_server(world), ExitStack() as stack:
        kernel = PinnedKernel(weir.place.pins)
        stack.callback(kernel.close)
        events(kernel, weir)  # those of earlier runs
        before = world.counters()
        client = weir.start(world.command([]), POLICY, *CLIENT_PROGRAM)
        stack.callback(client.communicate)  # the end of its input ends it, also when a row has failed
        seen, reported = [], []
        for attempt in attempts:
            seen.append(attempt_one(client, attempt, world))
            reported.append(events(kernel, weir))
        _, stderr = client.communicate()
        return Ran("", summary(stderr), world.counters() - before, seen, reported)


def program(weir: Weir, *command: str) -> Ran:
    """Run another program to its end under `weir run`."""
    with World(offloads=False) as world:
        before = world.counters()
        running = weir.start(world.command([]), POLICY, *command)
        output, stderr = running.communicate()
        return Ran(output, summary(stderr), world.counters() - before)


def events(kernel: PinnedKernel, weir: Weir) -> list[dict[str, Any]]:
    """The events that are waiting, as `weir events --json` prints them."""
    found = []
    while batch := kernel.events(0):
        paths, versions = weir.place.living(), kernel.versions()
        found += [as_data(event, paths, versions, weir.place.root) for event in batch]
    return found


def attempt_one(client: subprocess.Popen[str], attempt: Attempt, world: World) -> Seen:
    """Have the client do one attempt. Raises WeirError with what it wrote when it has ended."""
    assert client.stdin and client.stdout
    client.stdin.write(json.dumps({**asdict(attempt), "kind": attempt.kind.value}) + "\n")
    client.stdin.flush()
    while line := client.stdout.readline():
        answer = json.loads(line)
        if "port" not in answer:
            return Seen(answer["saw"], answer["bytes"])
        send_as_stranger(world, answer["port"])
    _, stderr = client.communicate()
    raise WeirError(f"the demo's client ended at: {attempt.text}", stderr or "Its own message is above.")


def send_as_stranger(world: World, port: int) -> None:
    """A datagram to the client from an address that it has never spoken to."""
    with world.peer(), transparent(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(_STRANGER)
        sender.sendto(b"unasked", (CLIENT, port))


@contextmanager
def loopback_server(world: World) -> Iterator[None]:
    """Something to reach on the client's own loopback addresses: it accepts and closes."""
    with world.client():
        server = socket.create_server(("::", LOCAL_PORT), family=socket.AF_INET6, dualstack_ipv6=True)

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def refusal(bare: Seen, seen: Seen, events: Sequence[dict[str, Any]]) -> Refusal:
    """Which layer refused an attempt, by the events that came during it.

    seccomp reports nothing. A call is put down to it when no hook refused it and the same call went otherwise without
    weir.
    """
    if events:
        line = f", line {events[0]['line']}" if events[0]["line"] else ""
        return Refusal(_LAYERS[events[0]["hook"]], events[0]["rule"] + line)
    refused = seen.saw.startswith("E") and seen.saw != bare.saw
    return Refusal("seccomp", "") if refused else Refusal("", "")
