"""deploy/kubernetes: what the API server would be sent is valid, whole, and says what the README promises."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from agent import __version__
from tests import need
from tests.deploy.copies import copies
from tests.deploy.manifests import KUBERNETES, Object, agent_container, build, daemonset, listed, only, read

DIRECTORIES = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""The oldest in which every field that we use exists (appArmorProfile), and the newest whose schemas are at hand."""


def validate(item: Object, version: str) -> None:
    kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(version: str) -> None:
    objects = build(KUBERNETES)
    for item in objects:
        validate(item, version)
    assert sorted(item["kind"] for item in objects) == ["ConfigMap", "DaemonSet", "Namespace", "ServiceAccount"]


def test_a_wrong_field_is_noticed() -> None:
    wrong = copy.deepcopy(daemonset())
    wrong["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostPid"):
        validate(wrong, VERSIONS[0])


def test_every_file_is_in_a_kustomization() -> None:
    named = [path for directory in DIRECTORIES for path in listed(directory)]
    assert sorted(named) == sorted(KUBERNETES.rglob("*.yaml"))


@pytest.mark.parametrize("name", ["", "monitoring"])
def test_kubectl_builds_the_same(name: str) -> None:
    directory = KUBERNETES / name
    command = [need.command("kubectl"), "kustomize", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(build(directory))


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    return {(item["kind"], item["metadata"]["name"]): item for item in objects}


def test_copies_are_as_their_originals() -> None:
    """When this fails: python -m tests.deploy.copies."""
    for path, text in copies().items():
        assert path.read_text() == text, path
    assert {path.name for path in (KUBERNETES / "policies").iterdir()} == {
        path.name for path in copies() if path.parent.name == "policies"
    }


def test_bpffs_component_fits_the_daemonset() -> None:
    patch, whole = read(KUBERNETES / "mount-bpffs/init.yaml"), daemonset()
    assert patch["metadata"] == {key: whole["metadata"][key] for key in ("name", "namespace")}
    spec = whole["spec"]["template"]["spec"]
    spec["initContainers"] = patch["spec"]["template"]["spec"]["initContainers"]
    for version in VERSIONS:
        validate(whole, version)
    volumes = {volume["name"] for volume in spec["volumes"]}
    (init,) = spec["initContainers"]
    assert {mount["name"] for mount in init["volumeMounts"]} <= volumes
    assert init["image"] == agent_container()["image"]


def test_bpffs_component_mounts_where_nobody_has(tmp_path: Path) -> None:
    """In the container /sys/fs/bpf is the mount of a volume: on such a node one of a plain directory."""
    need.root()
    (init,) = read(KUBERNETES / "mount-bpffs/init.yaml")["spec"]["template"]["spec"]["initContainers"]
    twice = f"""
        mount --bind {tmp_path} /sys/fs/bpf
        for _ in 1 2; do "$@"; stat -f -c %T /sys/fs/bpf; grep -c " /sys/fs/bpf " /proc/self/mountinfo; done
    """
    command = [need.command("unshare"), "--mount", "sh", "-euc", twice, "sh", *init["command"], *init["args"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()[:2], done.stdout.split()[2:]
    assert first[0] == "bpf_fs"
    assert second == first


def test_volumes_and_mounts_match() -> None:
    mounts = [mount["name"] for mount in agent_container()["volumeMounts"]]
    assert sorted(mounts) == sorted(volume["name"] for volume in daemonset()["spec"]["template"]["spec"]["volumes"])


def test_the_config_map_is_what_is_mounted() -> None:
    spec = daemonset()["spec"]["template"]["spec"]
    (volume,) = [volume for volume in spec["volumes"] if "configMap" in volume]
    assert volume["configMap"]["name"] == only(build(KUBERNETES), "ConfigMap")["metadata"]["name"]


def test_image_is_ours_and_of_this_version() -> None:
    """No registry: whoever installs it puts a registry of their own in front."""
    assert agent_container()["image"] == f"weir:{__version__}"


def test_pods_are_selected_and_scraped() -> None:
    pod = daemonset()["spec"]["template"]
    monitor = only(build(KUBERNETES / "monitoring"), "PodMonitor")
    labels = pod["metadata"]["labels"]
    for selector in (daemonset()["spec"]["selector"], monitor["spec"]["selector"]):
        assert selector["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (port,) = agent_container()["ports"]
    assert endpoint["port"] == port["name"]
    assert labels[monitor["spec"]["jobLabel"]] == "weir"
    assert endpoint["honorLabels"]
    assert f"--listen=$(HOST_IP):{port['containerPort']}" in agent_container()["args"]


def test_probes_ask_for_the_port_by_name() -> None:
    container = agent_container()
    paths = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in paths.values()} == {container["ports"][0]["name"]}
    assert [probe["path"] for probe in paths.values()] == ["/healthz", "/healthz", "/readyz"]


def test_least_privilege() -> None:
    context = agent_container()["securityContext"]
    assert not context["privileged"]
    assert not context["allowPrivilegeEscalation"]
    assert context["readOnlyRootFilesystem"]
    assert context["capabilities"]["drop"] == ["ALL"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    account = only(build(KUBERNETES), "ServiceAccount")
    assert not account["automountServiceAccountToken"]
    assert not daemonset()["spec"]["template"]["spec"]["automountServiceAccountToken"]


def test_host_paths_that_the_agent_only_reads_are_read_only() -> None:
    writes = {"/sys/fs/bpf", "/run/weir", "/seccomp/weir", "/tmp"}
    assert {m["mountPath"] for m in agent_container()["volumeMounts"] if not m.get("readOnly")} == writes


def test_no_manifest_has_anchors_or_documents_more_than_one() -> None:
    for path in KUBERNETES.rglob("*.yaml"):
        read(Path(path))
