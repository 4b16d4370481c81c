"""A small internet in two network namespaces: a client, and one peer that is every other address there is.

    with World() as world:
        with world.client():                    # this thread is now in the client's namespace
            socket.create_connection(("93.184.216.34", 443))
        world.received()                        # what reached the servers (tests/servers.py), by destination

The peer answers on *any* address outside 127.0.0.0/8, ::1 and the client's own, and on any port. Nothing can leave the
machine: the veth pair between the two namespaces is their only link. The two ends share one MAC address and use no ARP
or neighbour discovery, so the counters of the link count nothing but what the client sent.

Only CLONE_NEWNET is entered, never `ip netns exec`: that remounts /sys and hides cgroup2 and bpffs.
Needs root, ip (iproute2), nft (nftables), nsenter (util-linux) and, with offloads off, ethtool.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TextIO, final

from agent.errors import WeirError
from tests.servers import Received

# RFC 2544's benchmarking range and a ULA: no shipped policy names them one by one.
CLIENT = "198.18.0.2"
CLIENT6 = "fd5e:ed::2"
CLIENT_LINK_LOCAL6 = "fe80::2"

LINK = "eth0"  # the veth's name at both ends
_MAC = "02:00:00:00:00:01"
_ETHERNET_HEADER = 14  # bytes
_NAMESPACES = Path("/run/netns")
_NAME = re.compile(r"weir-[cp]-(?P<owner>\d+)-[0-9a-f]{4}")
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_ROOT = Path(__file__).resolve().parent.parent

# With one MAC at both ends and no ARP every frame is accepted by the other end, whatever address it carries.
_CLIENT_SETUP = f"""\
link set lo up
link set {LINK} address {_MAC} arp off addrgenmode none up
address add {CLIENT}/32 dev {LINK}
address add {CLIENT6}/128 dev {LINK} nodad
address add {CLIENT_LINK_LOCAL6}/64 dev {LINK} nodad
route add default dev {LINK} src {CLIENT}
route add ::/0 dev {LINK} src {CLIENT6}
"""

# One route of type local makes every address the peer's own. It is in table main, because in table local, which the
# kernel asks first, it would also catch the way back to the client.
_PEER_SETUP = f"""\
link set lo up
link set {LINK} address {_MAC} arp off addrgenmode none up
address add fe80::1/128 dev {LINK} nodad
route add {CLIENT}/32 dev {LINK}
route add {CLIENT6}/128 dev {LINK}
route add {CLIENT_LINK_LOCAL6}/128 dev {LINK}
route add local default dev lo table main
route add local ::/0 dev lo table main
route add local fe80::/10 dev {LINK} table main
"""

_NFT_SETUP = """\
table inet weir {{
    chain count {{ type filter hook prerouting priority raw; }}
    chain deliver {{
        type filter hook prerouting priority mangle
        meta l4proto tcp tproxy to :{tcp}
        meta l4proto udp tproxy to :{udp}
    }}
}}
"""


class Side(str, Enum):
    CLIENT = "c"
    PEER = "p"


@dataclass(frozen=True)
class Count:
    """Packets and their bytes from the IP header on; no link-layer header."""

    packets: int
    bytes: int

    def __sub__(self, earlier: Count) -> Count:
        return Count(self.packets - earlier.packets, self.bytes - earlier.bytes)


def _run(command: Sequence[str], text: str | None = None) -> str:
    """Run a set-up command with `text` as its input; its output. Raises WeirError with what the command said."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise WeirError(f"the test network needs the command {command[0]}", "install it") from error
    if done.returncode:
        message = f"{' '.join(command)}: {done.stderr.strip()}"
        raise WeirError(message, "the test network needs root and the kernel's veth, nf_tables and nft_tproxy")
    return done.stdout


@contextmanager
def _inside(name: str) -> Iterator[None]:
    """Put this thread into a named network namespace, and back at the end. Sockets made meanwhile stay there."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12

    def enter(namespace: TextIO) -> None:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {namespace.name}: {os.strerror(ctypes.get_errno())}")

    with open("/proc/thread-self/ns/net") as home, open(_NAMESPACES / name) as there:
        enter(there)
        try:
            yield
        finally:
            enter(home)


def remove_leftovers() -> None:
    """Delete the namespaces of Worlds whose process is gone."""
    for path in _NAMESPACES.glob("weir-*"):
        match = _NAME.fullmatch(path.name)
        if match and not Path("/proc", match["owner"]).exists():
            _run(["ip", "netns", "delete", path.name])


@final
class World:
    """The two namespaces, the link and the servers, from `with` to its end.

    `offloads=False` turns segmentation offloads of the link off: then every packet is counted as it would be on a wire.
    Raises WeirError when a command or a kernel feature that it needs is missing; nothing is left behind then.
    """

    def __init__(self, offloads: bool = True) -> None:
        self._offloads = offloads
        owner = f"{os.getpid()}-{secrets.token_hex(2)}"
        self._names = {side: f"weir-{side.value}-{owner}" for side in Side}

    def __enter__(self) -> World:
        remove_leftovers()
        with ExitStack() as stack:
            for name in self._names.values():
                _run(["ip", "netns", "add", name])
                stack.callback(_run, ["ip", "netns", "delete", name])
            self._connect()
            self._servers = self._start_servers()
            stack.callback(self._stop_servers)
            self._let_quiet()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _connect(self) -> None:
        client, peer = self.name(Side.CLIENT), self.name(Side.PEER)
        _run(["ip", "-n", client, "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", peer])
        for side in Side:
            # Before the link goes up: no router solicitation, and the multicast reports at once, not over two seconds.
            self.sysctl(side, f"net.ipv6.conf.{LINK}.accept_ra", "0")
            self.sysctl(side, f"net.ipv6.conf.{LINK}.mldv2_unsolicited_report_interval", "1")
        _run(["ip", "-n", client, "-batch", "-"], _CLIENT_SETUP)
        _run(["ip", "-n", peer, "-batch", "-"], _PEER_SETUP)
        if not self._offloads:
            # Not checksumming as well: before 6.11 UDP_SEGMENT fails with EIO on a device that has none.
            features = ("tso", "gso", "gro", "tx-udp-segmentation")
            for side in Side:
                self.run([*("ethtool", "-K", LINK), *(word for feature in features for word in (feature, "off"))], side)

    def _start_servers(self) -> subprocess.Popen[str]:
        servers = self.popen(
            [sys.executable, "-m", "tests.servers"], Side.PEER, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        ports = servers.stdout.readline() if servers.stdout else ""
        if not ports:
            servers.wait()
            raise WeirError("the test network's servers did not start", "their own message is above")
        self.run(["nft", "-f", "-"], Side.PEER, _NFT_SETUP.format(**json.loads(ports)))
        return servers

    def _stop_servers(self) -> None:
        self._servers.kill()  # the end of its input is not enough: a forked child of this process may hold the pipe
        self._servers.communicate()

    def _let_quiet(self) -> None:
        """Wait until the link's own multicast reports are over, so that they disturb no count."""
        before = None
        while before != (before := self.counters()):
            time.sleep(0.05)

    def name(self, side: Side) -> str:
        """The namespace's name, as in /run/netns."""
        return self._names[side]

    @contextmanager
    def client(self) -> Iterator[None]:
        """Put the calling thread into the client's network namespace; child processes and new sockets follow."""
        with _inside(self.name(Side.CLIENT)):
            yield

    @contextmanager
    def peer(self) -> Iterator[None]:
        """Put the calling thread into the peer's network namespace."""
        with _inside(self.name(Side.PEER)):
            yield

    def command(self, command: Sequence[str], side: Side = Side.CLIENT) -> list[str]:
        """The same command, to be run in that namespace; it keeps pid, cgroup and /sys."""
        return ["nsenter", f"--net={_NAMESPACES / self.name(side)}", *command]

    def popen(self, command: Sequence[str], side: Side = Side.CLIENT, **options: Any) -> subprocess.Popen[str]:
        """Start a command in that namespace; options as for subprocess.Popen."""
        return subprocess.Popen(self.command(command, side), text=True, **options)

    def run(self, command: Sequence[str], side: Side = Side.CLIENT, text: str | None = None) -> str:
        """Run a command in that namespace with `text` as its input; its output. Raises WeirError when it fails."""
        return _run(self.command(command, side), text)

    def sysctl(self, side: Side, key: str, value: str) -> None:
        """Set a net.* sysctl of that namespace. Raises OSError when the kernel refuses the key or the value."""
        with _inside(self.name(side)):
            Path("/proc/sys", key.replace(".", "/")).write_text(value)

    def counters(self) -> Count:
        """What the peer's end of the link has received, as its device counts it."""
        link = json.loads(_run(["ip", "-n", self.name(Side.PEER), "-json", "-stats", "link", "show", LINK]))[0]
        received = link["stats64"]["rx"]
        return Count(received["packets"], received["bytes"] - _ETHERNET_HEADER * received["packets"])

    def add_counter(self, name: str, match: str) -> None:
        """Count, from now on, what arrives at the peer and matches an nft expression, say "ip daddr 10.0.0.0/8"."""
        text = f"add counter inet weir {name}\nadd rule inet weir count {match} counter name {name}\n"
        self.run(["nft", "-f", "-"], Side.PEER, text)

    def counter(self, name: str) -> Count:
        """What a counter of add_counter has counted."""
        answer = json.loads(self.run(["nft", "-json", "list", "counter", "inet", "weir", name], Side.PEER))
        found = next(entry["counter"] for entry in answer["nftables"] if "counter" in entry)
        return Count(found["packets"], found["bytes"])

    def received(self) -> list[Received]:
        """What the servers have read so far, one record for each protocol, source, destination address and port."""
        assert self._servers.stdin and self._servers.stdout
        self._servers.stdin.write("received\n")
        self._servers.stdin.flush()
        return [Received(**record) for record in json.loads(self._servers.stdout.readline())]
