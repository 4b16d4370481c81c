"""An agent that starts while a policy's file is wrong: what an earlier one put under that policy stays under it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from errno import EACCES
from pathlib import Path

import pytest

from agent.cgroups import tree
from tests import need
from tests.node.agent import AgentSite, agent_site
from tests.node.probe import run_in

STRICT = """\
apiVersion: weir.dev/v1
kind: SocketPolicy
metadata: {name: strict}
spec:
  selector: {cgroups: ["*/strict-*"]}
  sockets: {families: [inet, inet6, unix], protocols: [tcp, udp]}
  default: deny
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[AgentSite]:
    need.root()
    with agent_site(tmp_path, f"/weir-test-{os.getpid()}-{secrets.token_hex(3)}") as made:
        made.options = {"--default": "audit"}
        yield made


def test_it_is_not_set_free(site: AgentSite, probe: Path) -> None:
    path = tree.mount() / site.parent.strip("/") / "strict-1"
    path.mkdir()
    label = f"{site.parent}/strict-1"
    file = site.write("strict", STRICT)
    site.write("other", STRICT.replace("strict", "other"))

    def refused() -> bool:
        return run_in(path, probe, "udp", "9").returncode == EACCES

    with site.running() as agent:
        agent.until(lambda: agent.samples("weir_container_policy", cgroup=label, policy="strict"))
        assert refused()
        agent.end()
    file.write_text(STRICT.replace("default: deny", "default: perhaps"))
    with site.running() as agent:
        assert refused()
        assert agent.samples("weir_container_policy", cgroup=label, policy="strict")
        assert agent.samples("weir_policy_mismatch", cgroup=label)
        assert agent.samples("weir_policy_file_invalid", file="strict.yaml")
        file.unlink()
        agent.until(lambda: agent.samples("weir_container_policy", cgroup=label, policy="audit"))
        assert not refused(), "a file that is removed takes its policy with it"
