"""Where the benchmark runs: a network, a cgroup for each way to run, and the programs on them."""

from __future__ import annotations

import dataclasses
import os
import random
import secrets
from pathlib import Path

from agent.cgroups import tree
from agent.kernel.pins import Pins
from agent.place import Place
from agent.policy.find import load as load_policy
from agent.policy.model import Action, Policy, Prefix, Rule
from tests.addresses import PUBLIC
from tests.world import LINK, Side, World

HERE = Path(__file__).resolve().parent

UNREAD = "93.184.216.35"
"""Where datagrams go: out by a link whose other end is down. The device drops them after every hook has run, so that no
receiver is measured. The policy's default allows it, like PUBLIC and the 65,535 addresses around it."""

SCATTER = "93.184.0.0"
_DROPPING = "drop0"
_EPHEMERAL = "32768-60999"  # net.ipv4.ip_local_port_range: where client.c's server listens

PREFIXES = (10, 1_000, 100_000)


def own_place() -> Place:
    """Pins and cgroups of this run alone."""
    name = f"weir-bench-{os.getpid()}-{secrets.token_hex(4)}"
    root = tree.mount()
    return Place(Pins(Path("/sys/fs/bpf") / name), root, root / name)


def prepare(world: World) -> None:
    """Add to the test network what the client needs: a device that drops, and a port that reaches client.c's server."""
    world.run(["ip", "link", "add", _DROPPING, "type", "veth", "peer", "name", "down0"])
    world.run(["ip", "link", "set", _DROPPING, "arp", "off", "up"])
    world.run(["ip", "route", "add", f"{SCATTER}/16", "dev", _DROPPING])
    world.run(["ip", "route", "add", f"{PUBLIC}/32", "dev", LINK])
    world.run(["nft", "insert", "rule", "inet", "weir", "deliver", "tcp", "dport", _EPHEMERAL, "accept"], Side.PEER)
    # Or 28,000 closed connections would wait for a minute each, and the next connect for a free port.
    world.sysctl(Side.CLIENT, "net.ipv4.tcp_max_tw_buckets", "0")


def policy_with(prefixes: int) -> Policy:
    """The App Engine policy with so many denied prefixes more: half of them around the client's destinations, where a
    look-up has to go deepest, half anywhere; a quarter IPv6.
    """
    policy = load_policy("appengine", resolvers=())
    chosen: set[Prefix] = set()
    rng = random.Random(prefixes)
    spared = [Prefix.parse(f"{SCATTER}/16")]
    while len(chosen) < prefixes:
        if rng.random() < 0.25:
            length = rng.randint(32, 64)
            prefix = Prefix((0x2000 << 112 | rng.getrandbits(112)) >> (128 - length) << (128 - length), length)
        else:
            length = rng.randint(112, 128)
            address = (
                rng.getrandbits(32)
                if rng.random() < 0.5
                else 0x5DB80000 ^ 1 << rng.randint(16, 25) ^ rng.getrandbits(16)
            )
            prefix = Prefix((0xFFFF << 32 | address) >> (128 - length) << (128 - length), length)
        if not any(prefix.contains(other.address) or other.contains(prefix.address) for other in spared):
            chosen.add(prefix)
    rule = Rule("bench", Action.DENY, tuple(sorted(chosen)), (), (), policy.egress[0].protocols, 0)
    return dataclasses.replace(policy, egress=(*policy.egress, rule))
