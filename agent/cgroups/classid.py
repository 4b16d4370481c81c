"""The one setting of cgroup v1 that takes sockets away from their cgroup v2 (kernels before 5.15).

There a write to net_cls.classid or net_prio.ifpriomap calls cgroup_sk_alloc_disable(): every socket made from then on
belongs to the root cgroup, and the programs of a container never see it. Linux 5.15 removed that function.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agent.errors import WeirError

FUNCTION = "cgroup_sk_alloc_disable"


def require_cgroup_of_sockets(kallsyms: Path = Path("/proc/kallsyms"), mountinfo: str | None = None) -> None:
    """Raise WeirError where new sockets are known not to belong to their cgroup. ``mountinfo``: the text, for tests."""
    used = next(used_settings(Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo), None)
    if used and any(line.split()[2] == FUNCTION for line in kallsyms.read_text().splitlines()):
        raise WeirError(
            f"{used} is set, and this kernel then gives every new socket to the root cgroup: no rule would see it",
            "Use Linux 5.15 or newer, or a host where nobody sets net_cls or net_prio (after a reboot).",
        )


def used_settings(mountinfo: str) -> Iterator[Path]:
    """The files of cgroup v1's net_cls and net_prio controllers that hold something other than zero."""
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(maxsplit=2)
        if kind != "cgroup" or not {"net_cls", "net_prio"} & set(options.split(",")):
            continue
        for file in Path(fields.split()[4]).rglob("net_*"):
            if file.name in ("net_cls.classid", "net_prio.ifpriomap") and _is_set(file):
                yield file


def _is_set(file: Path) -> bool:
    try:
        return any(line.split()[-1] != "0" for line in file.read_text().splitlines())
    except OSError:
        return False  # removed while we looked
