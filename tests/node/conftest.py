"""One containerd, and one kubelet, for the tests of this tier that share them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.node.containerd import Containerd, containerd
from tests.node.kubelet import Kubelet


@pytest.fixture(scope="session", name="node")
def _node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    with containerd(tmp_path_factory.mktemp("containerd")) as c:
        yield c


@pytest.fixture(scope="session")
def kubelet(node: Containerd) -> Iterator[Kubelet]:
    with Kubelet(node) as made:
        yield made
