"""The facts of `weir probe` that are read from text, and what follows from a list of facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.errors import WeirError
from agent.kernel.probe import OPTIONAL, Fact, can_work, capabilities, cgroups, holds, lsm_listed
from agent.verbs.probe import as_text

CGROUP2 = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
CGROUP1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"

NET_ADMIN, SYS_ADMIN, PERFMON, BPF = 1 << 12, 1 << 21, 1 << 38, 1 << 39


@pytest.mark.parametrize(
    ("effective", "missing"),
    [
        (NET_ADMIN | PERFMON | BPF, ()),
        (NET_ADMIN | SYS_ADMIN, ()),
        (BPF | NET_ADMIN, ("CAP_PERFMON",)),
        (SYS_ADMIN, ("CAP_NET_ADMIN",)),
        (0, ("CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF")),
    ],
)
def test_capabilities(effective: int, missing: tuple[str, ...]) -> None:
    fact = capabilities(f"Name:\tpython3\nCapPrm:\t0000000000000000\nCapEff:\t{effective:016x}\n")
    assert fact.holds is not bool(missing)
    if missing:
        assert fact.reason == f"{' and '.join(missing)} missing; run as root"


def test_cgroups() -> None:
    assert cgroups(CGROUP2) == Fact("cgroup2", True, "mounted at /sys/fs/cgroup/unified")
    assert "hybrid" in cgroups(CGROUP1 + CGROUP2).reason
    missing = cgroups(CGROUP1)
    assert missing.holds is False
    assert "mount -t cgroup2" in missing.reason


def test_lsm_listed(tmp_path: Path) -> None:
    path = tmp_path / "lsm"
    assert lsm_listed(path).holds is None
    path.write_text("capability,landlock,bpf\n")
    assert lsm_listed(path).holds is True
    path.write_text("capability,landlock,bpfilter\n")
    assert lsm_listed(path).holds is False


def test_an_error_is_a_reason() -> None:
    def fail() -> None:
        raise WeirError("it is missing", "Install it.")

    assert holds("thing", fail, "there") == Fact("thing", False, "it is missing; Install it.")
    assert holds("thing", lambda: None, "there") == Fact("thing", True, "there")


@pytest.mark.parametrize("value", [False, None])
def test_what_weir_needs(value: bool | None) -> None:
    """An optional fact may fail or be unknown; any other may not."""
    fine = [Fact("libbpf", True, ""), Fact("program egress", True, "")]
    assert can_work(fine)
    assert can_work([*fine, *(Fact(name, value, "") for name in OPTIONAL)])
    assert not can_work([*fine, Fact("bpffs", value, "")])


def test_text() -> None:
    found = [
        Fact("bpffs", False, "not mounted"),
        Fact("BPF LSM", False, "refused"),
        Fact("ring buffer", None, "not tried"),
    ]
    assert as_text(found, works=False).splitlines() == [
        "bpffs        NO   not mounted",
        "BPF LSM      NO   refused",
        "ring buffer  ?    not tried",
        "weir cannot work here; first put right: bpffs",
    ]
    assert as_text([Fact("libbpf", True, "loads")], works=True).endswith("weir can work here")
