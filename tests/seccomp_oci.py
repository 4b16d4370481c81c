"""Reads a seccomp profile as a runtime does, for one call: what it answers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Verdict = tuple[str, int | None]
"""The action, and the errno of SCMP_ACT_ERRNO."""

ALLOWED: Verdict = ("SCMP_ACT_ALLOW", None)
_COMPARE: Mapping[str, Callable[[int, int], bool]] = {
    "SCMP_CMP_NE": operator.ne,
    "SCMP_CMP_LT": operator.lt,
    "SCMP_CMP_LE": operator.le,
    "SCMP_CMP_EQ": operator.eq,
    "SCMP_CMP_GE": operator.ge,
    "SCMP_CMP_GT": operator.gt,
}


def verdict(action: str, errno: int | None) -> Verdict:
    """An errno that is not given is EPERM (runc, seccomp_linux.go)."""
    return (action, (1 if errno is None else errno) if action == "SCMP_ACT_ERRNO" else None)


def verdicts(profile: Mapping[str, Any], call: str, arguments: Sequence[int]) -> set[Verdict]:
    """Return the verdict of every rule that matches the call; the default's where none does.

    More than one element means that it depends on how libseccomp builds the filter.
    """
    default = verdict(profile["defaultAction"], profile.get("defaultErrnoRet"))
    found = set()
    for entry in profile["syscalls"]:
        if call not in entry["names"]:
            continue
        holds = [_holds(argument, arguments) for argument in entry.get("args") or ()]
        several = len({argument["index"] for argument in entry.get("args") or ()}) < len(holds)
        if (any if several else all)(holds):
            found.add(verdict(entry["action"], entry.get("errnoRet")))
    return found or {default}


def _holds(argument: Mapping[str, Any], arguments: Sequence[int]) -> bool:
    value = arguments[argument["index"]]
    if argument["op"] == "SCMP_CMP_MASKED_EQ":
        return bool(value & argument["value"] == argument["valueTwo"])
    return _COMPARE[argument["op"]](value, argument["value"])
