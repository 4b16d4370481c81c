"""An agent that runs below its own managed parent, as a DaemonSet's pod does, under a default that refuses to listen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.node import own
from tests.kernel.site import remove
from tests.node.agent import AgentSite, agent_site
from tests.node.probe import closed


@pytest.fixture
def site(tmp_path: Path) -> Iterator[AgentSite]:
    with agent_site(tmp_path, f"/weir-test-own-{tmp_path.name}") as made:
        made.options = {"--default": "closed"}
        made.write("closed", closed("closed", 7))
        yield made


def in_cgroup(path: Path) -> tuple[str, ...]:
    """A command line that joins a cgroup and then is another."""
    path.mkdir(parents=True, exist_ok=True)
    return ("sh", "-c", f'echo $$ > {path}/cgroup.procs && exec "$@"', "sh")


@pytest.mark.parametrize("inside", [".", "container"], ids=["runc", "crun"])
def test_it_can_listen(site: AgentSite, inside: str) -> None:
    """Also the second time, when its container is born under the parent's policy. ``inside``: crun makes a cgroup in the scope."""
    root = site.weir.place.root / site.parent.strip("/")
    for turn in ("first", "second"):
        agent = site.start(prefix=in_cgroup(root / turn / inside))
        try:
            agent.ready()
            assert agent.samples("weir_container_policy", cgroup=f"{site.parent}/{turn}", policy=own.NAME)
            assert agent.samples("weir_container_policy", cgroup=site.parent, policy="closed")
        finally:
            agent.end()
            remove(root / turn)
