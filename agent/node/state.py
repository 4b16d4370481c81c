"""What the agent knows of its node, as frozen facts: made by the main loop, read by metrics, status and health.

A new ``NodeState`` replaces the old one as a whole, so that a reader in another thread never sees half a change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LAYERS = ("hooks", "packets", "seccomp", "lsm")
"""The layers of the design, in the order in which people read them."""


@dataclass(frozen=True)
class Row:
    """One container, or a managed parent itself (``container`` and ``id`` are then empty).

    ``cgroup_ids`` are the enrolled cgroups that count for it: its own and those nested in it. ``problem`` is a sentence
    when the policy in force is not the one asked for. ``gone`` is the time.monotonic() at which it was found gone.
    """

    cgroup: str
    cgroup_ids: tuple[int, ...]
    namespace: str = ""
    pod: str = ""
    container: str = ""
    id: str = ""
    runtime: str = ""
    policy: str = ""
    problem: str = ""
    layers: Mapping[str, bool] = field(default_factory=dict)
    processes: int = 0
    filtered: int = 0
    gone: float | None = None


@dataclass(frozen=True)
class PolicyState:
    """A policy in force. ``file`` is where it came from, ``sha256`` the hex digest of the file's bytes."""

    name: str
    file: str
    sha256: str
    mode: str


@dataclass(frozen=True)
class Reloads:
    """How reading the policy directory went. ``failures`` are the sentences of what is wrong now, by file.

    ``last_success`` is seconds since the epoch, 0 before the first.
    """

    successes_total: int = 0
    failures_total: int = 0
    last_success: float = 0.0
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeState:
    """``not_ready`` holds the reasons, in sentences; none means ready. ``cri`` is a sentence while the CRI fails."""

    rows: tuple[Row, ...] = ()
    policies: tuple[PolicyState, ...] = ()
    reloads: Reloads = Reloads()
    roots: tuple[str, ...] = ()
    default: str = ""
    cri: str = ""
    not_ready: tuple[str, ...] = ("The agent has not finished its first look at the node.",)


class Published:
    """Holds the newest NodeState; reading and replacing an attribute is one step in Python."""

    def __init__(self) -> None:
        self.state = NodeState()
