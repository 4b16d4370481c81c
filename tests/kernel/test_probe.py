"""`weir probe` on this kernel, and on this kernel with parts taken away; it must agree with what weir then does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.kernel.abi import PROGRAMS
from tests.kernel.prefixes import as_nobody, without
from tests.kernel.site import Site, site


@pytest.fixture(name="here")
def _here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as made:
        yield made


def probe(here: Site, prefix: Sequence[str] = (), **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and fact -> (holds, reason)."""
    done = here.weir("probe", "--json", prefix=prefix, env={**here.environment, **environment})
    answer = json.loads(done.stdout)
    assert answer["works"] is (done.returncode == 0), done.stderr
    return done.returncode, {fact["name"]: (fact["holds"], fact["reason"]) for fact in answer["facts"]}


def test_this_kernel(here: Site) -> None:
    """Each program loads and links; what it says of bpf_set_retval is what a load finds; nothing is left."""
    status, facts = probe(here)
    assert status == 0
    assert [name for name in facts if name.startswith("program ")] == [f"program {name}" for name in PROGRAMS]
    assert all(facts[f"program {name}"] == (True, "loads and links") for name in PROGRAMS)
    assert not list(here.place.pins.root.parent.glob(f"{here.place.pins.root.name}-probe-*"))
    here.ok("load")
    errno = here.status()["errno"]
    assert facts["bpf_set_retval"] == (errno == "EACCES", f"a refused call answers {errno}")


def test_beside_rules_in_force(here: Site) -> None:
    here.ok("load")
    with here.cgroup() as cgroup:
        here.ok("attach", cgroup, "-p", "audit")
        before = here.status()
        assert probe(here)[0] == 0
        assert here.status() | {"monotonic": 0} == before | {"monotonic": 0}


@pytest.mark.parametrize(
    ("what", "name", "words"),
    [
        ("umount -l /sys/fs/bpf", "bpffs", "mount -t bpf"),
        ("umount -l CGROUP2", "cgroup2", "mount -t cgroup2"),
        ("mount -t tmpfs none /usr/include", "UAPI headers", "linux-libc-dev"),
    ],
)
def test_something_is_missing(here: Site, what: str, name: str, words: str) -> None:
    """That fact fails with its remedy, what depends on it is unknown, what does not is still told."""
    status, facts = probe(here, without(what.replace("CGROUP2", str(here.place.root))))
    assert status == 1
    assert facts[name][0] is False
    assert words in facts[name][1]
    assert facts["program egress"] == (None, f"not tried without: {name}")
    assert facts["libbpf"][0] is True


def test_no_privilege(here: Site) -> None:
    status, facts = probe(here, as_nobody())
    assert status == 1
    assert facts["privilege"] == (False, "CAP_NET_ADMIN and CAP_PERFMON and CAP_BPF missing; run as root")
    assert facts["program egress"][0] is None
    assert facts["seccomp"][0] is True  # needs none


def test_another_library_called_bcc(here: Site, tmp_path: Path) -> None:
    (tmp_path / "bcc.py").write_text("")
    status, facts = probe(here, PYTHONPATH=str(tmp_path))
    assert status == 1
    assert facts["BCC"][0] is False
    assert "python3-bpfcc" in facts["BCC"][1]
    assert facts["BPF LSM"][0] is None


def test_bcc_and_lsm(here: Site) -> None:
    """LSM programs are refused on some hosts whatever the kernel: then the reason is the kernel's own word."""
    _, facts = probe(here)
    assert facts["BCC"][1].startswith("version 0.")
    holds, reason = facts["BPF LSM"]
    assert (holds, bool(reason)) in ((True, True), (False, True))
    if not holds:
        assert reason.startswith("a program of this kind is refused: ")
        assert len(reason) > len("a program of this kind is refused: ")
