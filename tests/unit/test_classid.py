"""Kernels before 5.15 lose the cgroup of sockets once net_cls or net_prio is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.cgroups.classid import require_cgroup_of_sockets
from agent.errors import WeirError


@pytest.fixture
def old_kernel(tmp_path: Path) -> Path:
    symbols = tmp_path / "kallsyms"
    symbols.write_text("ffff T cgroup_sk_alloc\nffff T cgroup_sk_alloc_disable\n")
    return symbols


def mounted(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / "v1" / "a").mkdir(parents=True)
    (tmp_path / "v1" / "a" / name).write_text(text)
    return f"40 31 0:38 / {tmp_path}/v1 rw,relatime - cgroup cgroup rw,net_cls,net_prio\n"


@pytest.mark.parametrize(("name", "text"), [("net_cls.classid", "65537\n"), ("net_prio.ifpriomap", "lo 0\neth0 5\n")])
def test_a_setting_in_use_is_an_error(tmp_path: Path, old_kernel: Path, name: str, text: str) -> None:
    with pytest.raises(WeirError, match="root cgroup"):
        require_cgroup_of_sockets(old_kernel, mounted(tmp_path, name, text))


@pytest.mark.parametrize(("name", "text"), [("net_cls.classid", "0\n"), ("net_prio.ifpriomap", "lo 0\neth0 0\n")])
def test_a_setting_at_rest_is_none(tmp_path: Path, old_kernel: Path, name: str, text: str) -> None:
    require_cgroup_of_sockets(old_kernel, mounted(tmp_path, name, text))


def test_newer_kernels_have_no_such_function(tmp_path: Path) -> None:
    symbols = tmp_path / "kallsyms"
    symbols.write_text("ffff T cgroup_sk_alloc\n")
    require_cgroup_of_sockets(symbols, mounted(tmp_path, "net_cls.classid", "65537\n"))
