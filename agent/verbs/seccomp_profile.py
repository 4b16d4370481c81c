"""weir seccomp-profile: a policy as a seccomp profile for containers. No root and no kernel needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from agent.errors import WeirError
from agent.node.profiles import profile_of
from agent.policy import find
from agent.seccomp.oci import MACHINES

_CAPABILITY = re.compile(r"CAP_[A-Z][A-Z0-9_]+")  # capabilities(7)


@click.command(
    "seccomp-profile",
    epilog="""\b
Example:
  weir seccomp-profile --policy appengine --base /usr/share/containers/seccomp.json --cap CAP_SYS_CHROOT > appengine.json""",
)
@click.option("--policy", "-p", "name", required=True, metavar="POLICY", help="A file, or a shipped policy's name.")
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A profile to merge onto, of Docker's, Podman's or the OCI's format: what it refuses stays refused.",
)
@click.option(
    "--cap",
    "capabilities",
    multiple=True,
    metavar="CAP_X",
    help="A capability that the container has, for what a base says of it; repeatable. One that is not named it must not have.",
)
@click.option(
    "--arch", type=click.Choice([*MACHINES]), help="The machine that the containers run on.  [default: this one's]"
)
def seccomp_profile(*, name: str, base: Path | None, capabilities: tuple[str, ...], arch: str | None) -> int:
    """Print what POLICY refuses by seccomp, as an OCI profile in JSON.

    A pod names it as localhostProfile, Podman and Docker by --security-opt seccomp=FILE. It takes the place of the runtime's own
    profile, which refuses much that is no matter of sockets: without --base all of that is allowed.
    """
    for capability in capabilities:
        if not _CAPABILITY.fullmatch(capability):
            raise WeirError(
                f"{capability!r} is no capability", "Write it as capabilities(7) does: --cap CAP_SYS_CHROOT."
            )
    if capabilities and base is None:
        raise WeirError("--cap says nothing without --base", "Add --base FILE, or leave --cap out.")
    click.echo(json.dumps(profile_of(find.load(name), base, capabilities, arch or ""), indent=1))
    return 0
