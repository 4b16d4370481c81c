"""Debian's kernels, downloaded and unpacked beside the machine's own packages, which stay as they are."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import WeirError

# The series that a suite carries. tests/vm/README.md says when each was tried.
SUITES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "bookworm-backports"}

_KEYRING = Path(
    "/usr/share/keyrings/debian-archive-keyring.gpg"
)  # Debian's package debian-archive-keyring, on Ubuntu too


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: its series ("6.1"), its release as uname -r gives it, and the bootable image."""

    series: str
    release: str
    image: Path


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    """Run a command; its output. Raises WeirError with what the command said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    except FileNotFoundError as error:
        raise WeirError(f"the command {command[0]} is missing", "install apt, dpkg and kmod") from error
    if done.returncode:
        raise WeirError(f"{' '.join(command)}: {done.stderr.strip()}", "is this machine's Debian mirror in reach?")
    return done.stdout


def mirror() -> str:
    """The Debian archive that this machine's own apt is set up with. Raises WeirError when it has none."""
    sites = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]).split()
    for site in sites:
        if site.rstrip("/").endswith("/debian"):
            return site
    raise WeirError("this machine's apt knows no Debian archive", "name one with --mirror")


def fetch(series: str, cache: Path, site: str) -> Kernel:
    """The newest kernel of a series, from `site` (the URI of a Debian archive), unpacked under `cache`.

    What is there already is not fetched again. Raises WeirError when the archive or the package cannot be had.
    """
    if not _KEYRING.exists():
        raise WeirError(f"{_KEYRING} is missing", "install the package debian-archive-keyring")
    suite = SUITES[series]
    apt = cache / "apt" / suite
    for directory in ("lists/partial", "cache/archives/partial"):
        (apt / directory).mkdir(parents=True, exist_ok=True)
    (apt / "sources.list").write_text(f"deb [arch=amd64 signed-by={_KEYRING}] {site} {suite} main\n")
    options = (
        f"Dir::Etc::SourceList={apt}/sources.list",
        "Dir::Etc::SourceParts=-",
        f"Dir::State::Lists={apt}/lists",
        f"Dir::Cache={apt}/cache",
        "APT::Sandbox::User=root",  # the cache directory is not readable to apt's own user
    )
    flags = [word for option in options for word in ("-o", option)]
    _run(["apt-get", *flags, "update"])
    # The package without a version depends on the newest one: "  Depends: linux-image-6.1.0-50-amd64".
    depends = _run(["apt-cache", *flags, "depends", "linux-image-amd64"]).split("Depends: ")
    if len(depends) < 2:
        raise WeirError(
            f"{suite} has no linux-image-amd64", "the archive has changed: see SUITES in tests/vm/kernels.py"
        )
    package = depends[1].split()[0]
    release = package.removeprefix("linux-image-")
    root = cache / release
    if not (root / "complete").exists():
        _run(["apt-get", *flags, "download", package], cwd=apt)
        for archive in apt.glob(f"{package}_*.deb"):
            _run(["dpkg", "-x", str(archive), str(root)])
            archive.unlink()
        _run(["depmod", "-b", str(root), release])
        (root / "complete").touch()
    return Kernel(series, release, root / "boot" / f"vmlinuz-{release}")
