"""Numbers of the kernel's tables → the words that people and machines read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.kernel.abi import Flag, Reason
from agent.kernel.seam import Refused, Version
from agent.policy.model import Unenforced


def rule_name(refused: Refused, versions: Mapping[int, Version]) -> str:
    """The rule that decided: its name, `default`, or the part of `sockets` that the reason stands for."""
    version = versions.get(refused.policy)
    if refused.reason is not Reason.RULE:
        return f"sockets/{refused.reason.name.lower().replace('_', '-')}"
    if refused.rule is None:
        return "default"
    if version is None or refused.rule >= len(version.rules):
        return f"unknown:{refused.rule}"
    return version.rules[refused.rule].name


def rule_line(refused: Refused, versions: Mapping[int, Version]) -> int | None:
    """The line of the policy file on which that rule begins; None where no rule decided."""
    version = versions.get(refused.policy)
    if refused.reason is not Reason.RULE or refused.rule is None or version is None:
        return None
    return version.rules[refused.rule].line if refused.rule < len(version.rules) else None


def described(refused: Refused, versions: Mapping[int, Version]) -> dict[str, Any]:
    """What was refused and by what, for machines."""
    version = versions.get(refused.policy)
    return {
        "policy": version.name if version else None,
        "hook": refused.hook.name.lower(),
        "reason": refused.reason.name.lower(),
        "rule": rule_name(refused, versions),
        "line": rule_line(refused, versions),
    }


def refusals(counted: Mapping[Refused, int], versions: Mapping[int, Version]) -> list[dict[str, Any]]:
    """Refusal counters for machines, the largest first."""
    return [
        described(refused, versions) | {"audited": refused.audited, "count": count}
        for refused, count in sorted(counted.items(), key=lambda item: -item[1])
    ]


def refusal_text(row: Mapping[str, Any]) -> str:
    """One row of ``refusals`` for people."""
    word = "audited" if row["audited"] else "refused"
    at = f", line {row['line']}" if row["line"] else ""
    return f"  {word}  {row['count']:,} × rule {row['rule']}{at} ({row['hook']}: {row['reason']})"


def mode(flags: Flag) -> str:
    """`enforce` or `audit`."""
    return "audit" if flags & Flag.AUDIT else "enforce"


def not_in_force(flags: Flag) -> list[str]:
    """Parts of the policy with these flags that no layer enforces yet, in plain sentences."""
    wanted = {
        Unenforced.NAMES: bool(flags & Flag.WANTS_NAMES),
        Unenforced.OPTIONS: bool(flags & Flag.WANTS_OPTIONS),
        Unenforced.IDLE: bool(flags & Flag.WANTS_IDLE),
        Unenforced.LSM: not (flags & Flag.LISTEN and flags & Flag.TRANSFER),
    }
    return [part.value for part, holds in wanted.items() if holds]


def cgroup_name(path: Path | None, root: Path, number: int, remembered: str = "") -> str:
    """A cgroup as people know it: its path below the mount, or its number when it is gone and nobody remembers it."""
    return f"/{path.relative_to(root)}" if path else remembered or f"(gone: id {number})"


WHO = ("namespace", "pod", "container")
"""The keys that name a container, largest part first; they are cAdvisor's."""


def who(data: Mapping[str, Any]) -> str:
    """A container as people know it, namespace/pod/container; empty when there are no names for it."""
    return "/".join(data[key] for key in WHO if data.get(key))


def label(text: str | None) -> dict[str, str]:
    """What an agent remembered of a cgroup in the kernel: cgroup, namespace, pod, container, id, runtime; {} for nothing."""
    try:
        known = json.loads(text or "{}")
    except ValueError:
        return {}
    return {key: str(value) for key, value in known.items() if value}
