"""A policy's seccomp profile in the form of the OCI runtime specification (config-linux.md, "Seccomp"): pure.

Equal in meaning to the filter that filter.py builds. Container runtimes hand a profile's comparisons to libseccomp as they are
(runc's libcontainer/seccomp/seccomp_linux.go), so for SCMP_CMP_MASKED_EQ ``value`` is the mask and ``valueTwo`` what must be left.
They put two comparisons of one argument in an entry asunder, as if each were an entry; so an entry here compares an argument once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from agent.errors import WeirError
from agent.seccomp.rules import Comparison, Deny

ALLOW = "SCMP_ACT_ALLOW"
ERRNO = "SCMP_ACT_ERRNO"


class Machine(NamedTuple):
    """A kind of machine: its own architecture, those of which it can run programs too, and Go's name for it."""

    native: str
    foreign: tuple[str, ...]
    go: str


MACHINES: Mapping[str, Machine] = {
    "x86_64": Machine("SCMP_ARCH_X86_64", ("SCMP_ARCH_X86", "SCMP_ARCH_X32"), "amd64"),
    "aarch64": Machine("SCMP_ARCH_AARCH64", ("SCMP_ARCH_ARM",), "arm64"),
}
"""By platform.machine(). No others: filter.py says why."""


class Answer(NamedTuple):
    """What a filter does with a call. ``errno`` is None where the action takes none."""

    action: str
    errno: int | None = None


def machine(name: str) -> Machine:
    """Return the machine of that platform.machine(). Raises WeirError for one that weir has no filter for."""
    if name not in MACHINES:
        raise WeirError(
            f"There is no seccomp profile for {name}: it is only known to be complete on x86_64 and arm64.",
            "Name the machine that the containers run on: --arch x86_64 or --arch aarch64.",
        )
    return MACHINES[name]


def profile(rules: Sequence[Deny], this: Machine) -> dict[str, Any]:
    """Return the profile that refuses what the rules do and allows everything else; without rules it refuses nothing.

    Calls of an architecture that is not listed end the calling thread with SIGSYS (libseccomp's default for them, which a profile
    cannot change), where filter.py ends the process.
    """
    return {
        "defaultAction": ALLOW,
        "architectures": [this.native] if rules else [this.native, *this.foreign],
        "syscalls": entries((rule.call, Answer(ERRNO, rule.errno), rule.comparisons) for rule in rules),
    }


def entries(answers: Iterable[tuple[str, Answer, tuple[Comparison, ...]]]) -> list[dict[str, Any]]:
    """Return a profile's ``syscalls``: one entry for all calls with one answer, then one for each with comparisons."""
    whole: dict[Answer, list[str]] = {}
    partly = []
    for call, answer, comparisons in answers:
        if comparisons:
            arguments = [(c.argument, c.mask, c.value, "SCMP_CMP_MASKED_EQ") for c in comparisons]
            partly.append(entry_of([call], answer, arguments))
        else:
            whole.setdefault(answer, []).append(call)
    return [*(entry_of(calls, answer) for answer, calls in whole.items()), *partly]


def entry_of(
    calls: Sequence[str], answer: Answer, arguments: Iterable[tuple[int, int, int, str]] = ()
) -> dict[str, Any]:
    """Return one element of ``syscalls``; ``arguments`` are index, value, valueTwo and op."""
    entry: dict[str, Any] = {"names": [*calls], "action": answer.action}
    if answer.errno is not None:
        entry["errnoRet"] = answer.errno
    args = [dict(zip(("index", "value", "valueTwo", "op"), argument, strict=True)) for argument in arguments]
    return {**entry, "args": args} if args else entry
