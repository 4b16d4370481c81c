"""The image of deploy/Dockerfile, built by buildah on a base by debootstrap; both stay in .cache for the next run.

Packages and modules come from where this machine takes its own: its /etc/apt and its pip's settings are mounted while a
command of the Dockerfile runs, and are in no layer.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests import need
from tests.node import remains

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache/image"
BASE = "localhost/weir-test-base"

MAX_LAYERS = 100
"""Layers that .cache may hold before what no image needs is removed: ten for each change of the program, 90 MB."""

_DPKG = """\
# As in Debian's own slim image; and no fsync for each file.
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/man/*
force-unsafe-io
"""

_CA = "/run/ca.crt"  # where pip's certificates are inside; not in /etc/ssl/certs, which a package of the build writes


def archive(image: str, tar: Path) -> Path:
    """Build the image ``image`` and write it in the format of `docker save`; returns ``tar``.

    Skips the running test without buildah, debootstrap or root. A first build takes minutes.
    """
    need.root()
    need.command("buildah")
    need.command("debootstrap")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        base = f"{BASE}:{hashlib.sha256(f'{_release()} {_DPKG}'.encode()).hexdigest()[:12]}"
        if not _buildah("images", "--quiet", "--filter", f"reference={base}"):
            _make_base(base)
        if len(_buildah("images", "--all", "--quiet").split()) > MAX_LAYERS:
            _buildah("rmi", "--prune", "--force")
        _buildah(
            *("bud", "--quiet", "--isolation", "chroot", "--layers", "--pull-never"),
            # Newer ones' own limits are higher than a root without CAP_SYS_RESOURCE may set.
            *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
            *("--build-arg", f"BASE={base}"),
            *(word for host, inside in _mounts() for word in ("--volume", f"{host}:{inside}:ro")),
            *("--file", ROOT / "deploy/Dockerfile", "--tag", image, ROOT),
        )
        _buildah("push", "--quiet", image, f"docker-archive:{tar}:{image}")
    return tar


def _release() -> tuple[str, str]:
    """The distribution's code name, and the mirror that apt has for it."""
    lines = _output("apt-get", "indextargets", "--format", "$(CODENAME) $(SITE)", "Identifier: Packages").splitlines()
    fields = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    name = fields["VERSION_CODENAME"].strip('"')
    return name, next(line.split()[1] for line in lines if line.split()[0] == name)


def _make_base(name: str) -> None:
    """Make the least of the distribution that this machine has into an image."""
    tree, tar = CACHE / "base", CACHE / "base.tar"
    remains.unmount_below(tree)  # debootstrap, when it was killed
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "etc/dpkg/dpkg.cfg.d").mkdir(parents=True)
    (tree / "etc/dpkg/dpkg.cfg.d/slim").write_text(_DPKG)
    codename, mirror = _release()
    _output("debootstrap", "--variant=minbase", codename, tree, mirror)
    left_out = ("./dev/*", "./var/cache/apt/archives/*.deb", "./var/lib/apt/lists/*")
    _output("tar", "-C", tree, *(f"--exclude={path}" for path in left_out), "-cf", tar, ".")
    shutil.rmtree(tree)
    container = _buildah("from", "scratch")
    try:
        _buildah("add", "--quiet", container, tar, "/")
        _buildah("commit", "--quiet", container, name)
    finally:
        _buildah("rm", container)
        tar.unlink()


def _mounts() -> Iterator[tuple[str, str]]:
    """(Here, inside) of what apt and pip of the build need of this machine."""
    yield "/etc/apt", "/etc/apt"
    settings, certificates = {}, ""
    for line in _output(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, value = line.partition("=")
        name, value = key.rpartition(".")[2], value.strip("'\"")
        if name == "cert":
            certificates, value = value, _CA
        elif value.startswith(("/", "file:")):
            continue  # a directory of this machine's adds to its index
        settings[name] = value
    config = CACHE / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    yield str(config), "/etc/pip.conf"
    if certificates:
        yield str(Path(certificates).resolve()), _CA


def _buildah(*arguments: str | Path) -> str:
    # Without skip_mount_home it would leave a mount in .cache, and `make clean` would fail.
    own = ("--root", CACHE / "storage", "--runroot", CACHE / "run")
    driver = ("--storage-driver", "overlay", "--storage-opt", "overlay.skip_mount_home=true")
    return _output("buildah", *own, *driver, *arguments).strip()


def _output(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command[:12]))}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout
