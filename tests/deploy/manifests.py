"""The objects that `kubectl apply -k` would send, put together from the files as kustomize does it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.copies import DEPLOY

KUBERNETES = DEPLOY / "kubernetes"
Object = dict[str, Any]


def read(path: Path) -> Object:
    """The one object in a YAML file."""
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict), path
    return found


def build(directory: Path) -> list[Object]:
    """What a kustomization of ours yields: its resources, and ConfigMaps made of files."""
    kustomization = read(directory / "kustomization.yaml")
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "configMapGenerator", "generatorOptions"}
    objects = [read(directory / name) for name in kustomization["resources"]]
    options = kustomization.get("generatorOptions", {})
    for generator in kustomization.get("configMapGenerator", ()):
        assert options["disableNameSuffixHash"]
        files = [directory / name for name in generator["files"]]
        meta = {"name": generator["name"], "namespace": generator["namespace"], "labels": options["labels"]}
        data = {file.name: file.read_text() for file in files}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
    return objects


def listed(directory: Path) -> Iterator[Path]:
    """The files that a kustomization names."""
    kustomization = read(directory / "kustomization.yaml")
    yield directory / "kustomization.yaml"
    for name in kustomization.get("resources", ()):
        yield directory / name
    for patch in kustomization.get("patches", ()):
        yield directory / patch["path"]
    for generator in kustomization.get("configMapGenerator", ()):
        yield from (directory / name for name in generator["files"])


def only(objects: list[Object], kind: str) -> Object:
    """The one object of a kind."""
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def daemonset() -> Object:
    """The agent's."""
    return only(build(KUBERNETES), "DaemonSet")


def agent_container() -> Object:
    """The agent's container in it."""
    (container,) = daemonset()["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container
