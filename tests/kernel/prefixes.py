"""Beginnings of commands: weir with something taken away from it."""

from __future__ import annotations

import shlex
import stat

from tests import need
from tests.kernel.site import ROOT


def without(what: str, *arguments: str) -> list[str]:
    """The beginning of a command that runs in a mount namespace where a shell command has been run first."""
    return [need.command("unshare"), "--mount", "sh", "-ec", f'{what}\nexec "$@"', "sh", *arguments]


def as_nobody() -> list[str]:
    """The beginning of a command that runs as user nobody, who can read this checkout wherever it is (/root is closed)."""
    setpriv = [need.command("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups"]
    closed = next((path for path in reversed(ROOT.parents) if not path.stat().st_mode & stat.S_IXOTH), None)
    if closed is None:
        return setpriv
    root, over = shlex.quote(str(ROOT)), shlex.quote(str(closed))
    opened = (
        f"mount --bind {root} /mnt\nmount -t tmpfs -o mode=755 tmpfs {over}\nmkdir -p {root}\nmount --bind /mnt {root}"
    )
    return without(f"{opened}\ncd {root}", *setpriv)
