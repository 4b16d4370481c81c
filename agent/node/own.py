"""The agent's own container: it must listen for scrapes wherever it runs, also below a managed parent."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from agent.cgroups import tree
from agent.controller import compiled
from agent.node.choose import Choice, Why
from agent.node.compiling import Loaded
from agent.node.members import Member
from agent.node.state import PolicyState
from agent.policy.model import Action, Bind, Family, Mode, Options, Policy, Protocol, Sockets

NAME = "(weir agent)"
"""Shown as the policy of the agent's container. No policy file can have this name, so that none is taken for it."""

_POLICY = Policy(
    name=NAME,
    mode=Mode.ENFORCE,
    sockets=Sockets(
        families=frozenset(Family),
        protocols=frozenset(Protocol),
        listen=Action.ALLOW,
        bind=Bind.ALLOW,
        transfer=Action.ALLOW,
        idle_timeout=None,
        options=Options(mock=(), others=Action.ALLOW),
    ),
    egress=(),
    default=Action.ALLOW,
    source="(built in)",
    sha256="",
    text="",
)

POLICY = Loaded(compiled(_POLICY), None, PolicyState(NAME, _POLICY.source, "", _POLICY.mode.value))
"""Allows everything. Nobody can ask for it: it is for the cgroup that this process is in."""

CHOICE = Choice(NAME, Why.DEFAULT)


def cgroup(root: Path, members: Iterable[Member]) -> int | None:
    """The member that this process runs in, None when it runs below no managed parent.

    By its pid: /proc/self/cgroup is relative to a cgroup namespace, which a container has of its own. Also further inside:
    crun puts a container's processes into a cgroup in its scope, and that is CRI-O's default.
    """
    me = os.getpid()
    containers = (member for member in members if not member.is_parent)
    return next((member.cgroup for member in containers if me in tree.processes(root / member.path)), None)
