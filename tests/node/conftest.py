"""One containerd, and one kubelet, for the tests of this tier that share them; what tests have measured, at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.node import probe as client
from tests.node.containerd import Containerd, containerd
from tests.node.images import compiled
from tests.node.kubelet import Kubelet
from tests.node.probe import Peer, peer

_MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Tell what was measured, at the end of all tests; no test depends on it."""
    lines = request.config.stash.setdefault(_MEASURED, [])
    return lambda text: lines.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print it."""
    lines = terminalreporter.config.stash.get(_MEASURED, [])
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", name="node")
def _node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    with containerd(tmp_path_factory.mktemp("containerd")) as c:
        yield c


@pytest.fixture(scope="session")
def kubelet(node: Containerd) -> Iterator[Kubelet]:
    with Kubelet(node) as made:
        yield made


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client of tests/node/probe.py, for whatever is no image."""
    return compiled(client.SOURCE, tmp_path_factory.mktemp("probe") / "probe")


@pytest.fixture(scope="session")
def image(node: Containerd, probe: Path) -> str:
    """The image with the client."""
    return node.image(client.IMAGE, {"/bin/probe": probe})


@pytest.fixture(scope="module")
def door() -> Iterator[Peer]:
    """The port that policies allow."""
    with peer() as made:
        yield made


@pytest.fixture(scope="module")
def wall() -> Iterator[Peer]:
    """A port that no policy allows."""
    with peer() as made:
        yield made
