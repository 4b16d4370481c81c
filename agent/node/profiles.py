"""The policies' seccomp profiles as files below the kubelet's seccomp directory, where a pod names one as localhostProfile.

Each is replaced as a whole, so that a container which starts meanwhile reads the old one or the new one. Which files are weir's is
written down first, in a file beside them: being killed between any two steps leaves nothing that weir would not find again.
"""

import json
import os
import platform
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.errors import WeirError
from agent.policy.model import Mode, Policy
from agent.seccomp import base, oci
from agent.seccomp.merge import merge
from agent.seccomp.rules import rules

FOLDER = "weir"
"""Below the kubelet's directory: a pod names its profile weir/POLICY.json."""
_LIST = ".written-by-weir"
_NEW = ".new"


def profile_of(
    policy: Policy, base_file: Path | None = None, capabilities: Collection[str] = (), machine: str = ""
) -> dict[str, Any]:
    """Return the policy's profile for containers that have these capabilities, merged onto a base when there is one.

    ``machine`` is a platform.machine(), by default this one's. A policy in audit mode refuses nothing, as in `weir run`. Raises
    WeirError for a base that cannot be read or merged, and on a machine that weir has no filter for.
    """
    this = oci.machine(machine or platform.machine())
    denied = () if policy.mode is Mode.AUDIT else rules(policy.sockets)
    if base_file is None:
        return oci.profile(denied, this)
    return merge(denied, base.load(base_file, this, capabilities), this)


def write(directory: Path, profiles: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Make directory/weir hold these profiles, by policy name, as NAME.json; return the names of those that were written.

    A file with the right content is left alone. Files of earlier calls whose policies are gone are removed, others never.
    Raises WeirError when something cannot be written (a full disk, no such directory); each profile is then the old or the new one.
    """
    try:
        return _write(directory, profiles)
    except OSError as error:
        raise WeirError(
            f"The seccomp profiles in {directory / FOLDER} cannot be kept up to date: {error.strerror}.",
            f"Make room in {directory}, or mount the kubelet's seccomp directory there, writable. Old profiles stay as they are.",
        ) from error


def _write(directory: Path, profiles: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    folder = directory / FOLDER
    if not folder.is_dir():
        folder.mkdir()
        folder.chmod(0o755)  # whatever the umask
    listing = folder / _LIST
    before = set(listing.read_text().split()) if listing.exists() else set()
    _replace(listing, "".join(f"{name}\n" for name in sorted(before | profiles.keys())))
    written = tuple(
        name for name, profile in profiles.items() if _replace(folder / f"{name}.json", json.dumps(profile) + "\n")
    )
    for name in before - profiles.keys():
        (folder / f"{name}.json").unlink(missing_ok=True)
    _replace(listing, "".join(f"{name}\n" for name in sorted(profiles)))
    return written


def _replace(file: Path, text: str) -> bool:
    """Give a file this content in one step, readable by everybody; return whether it was otherwise before."""
    with suppress(FileNotFoundError):
        if file.read_bytes() == text.encode() and file.stat().st_mode & 0o777 == 0o644:
            return False
    new = file.with_name(f".{file.name}{_NEW}")
    try:
        new.write_text(text)
        new.chmod(0o644)
        os.replace(new, file)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    return True
