"""The command line: a group of verbs, each in agent/verbs, each imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

import click

VERBS = {
    "run": "run",
    "agent": "agent",
    "load": "load",
    "unload": "load",
    "attach": "attach",
    "detach": "attach",
    "status": "status",
    "events": "events",
    "top": "top",
    "policy": "policy",
    "seccomp-profile": "seccomp_profile",
    "probe": "probe",
    "version": "version",
}
"""Verb -> module of agent/verbs. `weir policy check` on a laptop must not need libbpf, nor `weir run` a second."""


class Verbs(click.Group):
    """Finds a verb's module by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of VERBS."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb, or None when there is none of that name."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(import_module(f"agent.verbs.{VERBS[cmd_name]}"), cmd_name.replace("-", "_"))
        return command


@click.group(
    cls=Verbs,
    epilog="""\b
Example:
  weir run --policy appengine -- ./job""",
)
def weir() -> None:
    """Decides which sockets a container may open and measures what it sends."""
