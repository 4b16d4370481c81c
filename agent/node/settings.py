"""What the agent is told by flags and environment, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from agent.cgroups.roots import Pattern
from agent.errors import WeirError
from agent.node.tls import Tls

CRI_SOCKETS = (Path("/run/containerd/containerd.sock"), Path("/run/crio/crio.sock"))
"""Where containerd and CRI-O listen by default (their documentation), in the order in which they are tried."""

_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Settings:
    """Durations are seconds. ``cri`` empty: no names from the CRI; ``listen`` None: no server; ``seccomp`` None: no files.

    ``seccomp_base`` is a profile that those of the policies are merged onto.
    """

    policies: Path
    default: str
    roots: tuple[Pattern, ...]
    cri: tuple[Path, ...]
    listen: str | None
    tls: Tls | None
    socket: Path
    seccomp: Path | None
    seccomp_base: Path | None
    retain: float
    reconcile: float
    events: bool
    unload_on_exit: bool
    max_containers: int | None


def duration(text: str, flag: str) -> float:
    """Seconds of a duration such as 30s, 10m or 2h. Raises WeirError for anything else."""
    match = re.fullmatch(r"(\d{1,9})(s|m|h)", text)
    if not match:
        raise WeirError(f"{flag} {text!r} is no duration", "Write a number with s, m or h, such as 30s or 10m.")
    return float(match[1]) * _UNITS[match[2]]


def cri_sockets(given: str | None) -> tuple[Path, ...]:
    """Where the CRI may listen: as given, nowhere for `none`, else the usual places."""
    if given == "none":
        return ()
    return (Path(given.removeprefix("unix://")),) if given else CRI_SOCKETS
