"""Reads a seccomp profile that weir's is merged onto: Docker's and Podman's own format, and the plain one of the OCI specification.

The first two (moby/profiles and containers/common, in Debian /usr/share/containers/seccomp.json) say of an entry for which
architectures, kernels and capabilities it is. Those questions are answered here, once:

- Architecture: that of the machine.
- Kernel: 5.10, the oldest that weir runs on. An entry that asks for a newer one may apply or not.
- Capabilities: the caller names those of the container. One that is not named it does not have: that is how Docker and Podman read
  "excludes", and without it not even socket() would be left of Podman's profile.

An entry that allows stays out unless it applies for certain; one that refuses stays in as long as it may apply.
"""

import errno as errnos
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from agent.errors import WeirError
from agent.seccomp.oci import ALLOW, ERRNO, Answer, Machine

TRACE = "SCMP_ACT_TRACE"
SEVERITY: Mapping[str, int] = {
    ALLOW: 0,
    "SCMP_ACT_LOG": 1,
    TRACE: 2,
    ERRNO: 3,
    "SCMP_ACT_TRAP": 4,
    "SCMP_ACT_KILL": 5,
    "SCMP_ACT_KILL_THREAD": 5,
    "SCMP_ACT_KILL_PROCESS": 6,
}
"""The kernel's order when filters disagree: the highest wins (seccomp(2))."""

_LETS_THROUGH = 1  # the highest severity with which the call is made in any case
_OLDEST_KERNEL = (5, 10)
_KERNEL = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")
_PROFILE_KEYS = frozenset(
    {"defaultAction", "defaultErrnoRet", "defaultErrno", "architectures", "archMap", "flags", "syscalls"}
)
_ENTRY_KEYS = frozenset(
    {"names", "name", "action", "errnoRet", "errno", "args", "comment", "includes", "excludes", "priority"}
)
_WHEN_KEYS = frozenset({"caps", "arches", "minKernel"})
_ARGUMENT_KEYS = frozenset({"index", "value", "valueTwo", "op"})
_MAX = 2**64 - 1  # a register


class Op(str, Enum):
    """How a comparison compares: unsigned, all 64 bits (seccomp_rule_add(3))."""

    NE = "SCMP_CMP_NE"
    LT = "SCMP_CMP_LT"
    LE = "SCMP_CMP_LE"
    EQ = "SCMP_CMP_EQ"
    GE = "SCMP_CMP_GE"
    GT = "SCMP_CMP_GT"
    MASKED_EQ = "SCMP_CMP_MASKED_EQ"


class Condition(NamedTuple):
    """A condition of a base's entry: ``value`` is the mask and ``value_two`` the datum of MASKED_EQ."""

    argument: int
    op: Op
    value: int
    value_two: int


@dataclass(frozen=True)
class Entry:
    """An entry that applies. ``certain`` is False when it refuses and only may apply."""

    calls: tuple[str, ...]
    answer: Answer
    conditions: tuple[Condition, ...]
    certain: bool


@dataclass(frozen=True)
class Base:
    """What a base profile means on one machine, for one set of capabilities. ``flags`` is None when it says nothing of them."""

    default: Answer
    architectures: tuple[str, ...]
    flags: tuple[str, ...] | None
    entries: tuple[Entry, ...]


def load(file: Path, this: Machine, capabilities: Collection[str] = ()) -> Base:
    """Return what the profile in a file means. Raises WeirError when it cannot be read, and what read() raises."""
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise WeirError(
            f"the base profile {file} cannot be read: {error.strerror}", "Check its path and mode."
        ) from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise WeirError(f"the base profile {file} is not JSON: {error}", "Give a seccomp profile in JSON.") from error
    try:
        return read(document, this, capabilities)
    except WeirError as error:
        raise WeirError(f"{file}: {error.message}", error.hint) from error


def read(document: Any, this: Machine, capabilities: Collection[str] = ()) -> Base:
    """Return what a parsed profile means. Raises WeirError for what weir does not understand: it must not become wider."""
    top = _object(document, "the profile", _PROFILE_KEYS)
    flags = _list(top, "flags", "the profile") if top.get("flags") is not None else None
    listed = [_entry(entry, f"entry {number}", this, capabilities) for number, entry in _numbered(top, "syscalls")]
    return Base(
        default=_answer(top, "the profile", "defaultAction", "defaultErrno"),
        architectures=_architectures(top, this),
        flags=None if flags is None else tuple(map(str, flags)),
        entries=tuple(entry for entry in listed if entry is not None),
    )


def _entry(raw: Any, where: str, this: Machine, capabilities: Collection[str]) -> Entry | None:
    fields = _object(raw, where, _ENTRY_KEYS)
    names = _list(fields, "names", where) or [fields.get("name")]
    if not all(isinstance(name, str) and name for name in names):
        raise _bad(where, "has no names of system calls")
    answer = _answer(fields, where, "action", "errno")
    applies = _applies(fields, where, this, capabilities, allows=SEVERITY[answer.action] <= _LETS_THROUGH)
    if applies is None:
        return None
    conditions = tuple(_condition(raw, where) for raw in _list(fields, "args", where))
    return Entry(tuple(names), answer, conditions, certain=applies)


def _applies(
    fields: Mapping[str, Any], where: str, this: Machine, capabilities: Collection[str], *, allows: bool
) -> bool | None:
    """Return whether the entry applies for certain; None when it stays out."""
    includes = _object(fields.get("includes") or {}, f"{where}, includes", _WHEN_KEYS)
    excludes = _object(fields.get("excludes") or {}, f"{where}, excludes", _WHEN_KEYS)
    arches = _list(includes, "arches", where)
    if (arches and this.go not in arches) or this.go in _list(excludes, "arches", where):
        return None
    if any(capability in capabilities for capability in _list(excludes, "caps", where)):
        return None
    newer = _needs_newer(includes, where)
    if excludes.get("minKernel") and not _needs_newer(excludes, where):
        return None
    certain = not newer and not excludes.get("minKernel")
    certain = certain and all(capability in capabilities for capability in _list(includes, "caps", where))
    return None if allows and not certain else certain


def _needs_newer(when: Mapping[str, Any], where: str) -> bool:
    """Return whether the kernel asked for is newer than the oldest that weir runs on."""
    text = when.get("minKernel") or "0.0"
    found = _KERNEL.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise _bad(where, f"has the minKernel {text!r}, which is no version such as 4.8")
    return (int(found[1]), int(found[2])) > _OLDEST_KERNEL


def _condition(raw: Any, where: str) -> Condition:
    fields = _object(raw, f"{where}, args", _ARGUMENT_KEYS)
    values = [fields.get(key) or 0 for key in ("index", "value", "valueTwo")]
    if any(type(value) is not int or not 0 <= value <= _MAX for value in values) or values[0] > 5:
        raise _bad(where, "compares with something that is no number of 64 bits, or an argument that is none of 0 to 5")
    try:
        op = Op(fields.get("op"))
    except ValueError:
        raise _bad(where, f"has the comparison {fields.get('op')!r}, which weir does not know") from None
    if op is Op.MASKED_EQ and values[2] & ~values[1]:
        raise _bad(where, "compares bits that its own mask takes away")
    return Condition(values[0], op, values[1], values[2])


def _answer(fields: Mapping[str, Any], where: str, action_key: str, errno_key: str) -> Answer:
    action = fields.get(action_key)
    if not isinstance(action, str) or action not in SEVERITY:
        raise _bad(where, f"has the {action_key} {action!r}, which weir cannot merge")
    if action not in (ERRNO, TRACE):
        return Answer(action)
    number, name = fields.get(f"{errno_key}Ret"), fields.get(errno_key)
    if number is None and name:
        number = getattr(errnos, str(name), None) if str(name).startswith("E") else None
        if number is None:
            raise _bad(where, f"has the {errno_key} {name!r}, which weir does not know")
    number = errnos.EPERM if number is None else number  # runc's and crun's
    if type(number) is not int or not 0 <= number <= 4095:
        raise _bad(where, f"has the {errno_key}Ret {number!r}, which is no errno")
    return Answer(action, number)


def _architectures(top: Mapping[str, Any], this: Machine) -> tuple[str, ...]:
    """Return the machine's own and the others that the base lists; runtimes add the machine's own themselves."""
    listed = [str(name) for name in _list(top, "architectures", "the profile")]
    for _, row in _numbered(top, "archMap"):
        fields = _object(row, "archMap", frozenset({"architecture", "subArchitectures"}))
        if fields.get("architecture") == this.native:
            listed += [str(name) for name in _list(fields, "subArchitectures", "archMap")]
    return tuple(dict.fromkeys([this.native, *(name for name in listed if name in this.foreign)]))


def _object(raw: Any, where: str, known: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise _bad(where, "is no JSON object")
    unknown = [key for key in raw if key not in known]
    if unknown:
        raise _bad(where, f"has {unknown[0]!r}, which weir cannot merge")
    return raw


def _list(fields: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    value = fields.get(key)
    if value is not None and not isinstance(value, list):
        raise _bad(where, f"has {key} that are no list")
    return value or []


def _numbered(fields: Mapping[str, Any], key: str) -> Sequence[tuple[int, Any]]:
    return list(enumerate(_list(fields, key, "the profile"), 1))


def _bad(where: str, what: str) -> WeirError:
    return WeirError(
        f"the base profile cannot be used: {where} {what}",
        "Take that out of a copy of the base, or use another, such as /usr/share/containers/seccomp.json.",
    )
