"""``weir run``: the command line of it, and the summary at its end."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from typing import Any

import click

from agent import names
from agent.controller import compiled
from agent.kernel.abi import Flag
from agent.place import Place
from agent.policy.find import load as load_policy
from agent.policy.model import Mode
from agent.processes import check_inherited, find_user
from agent.run import Summary
from agent.run import run as run_command
from agent.seccomp.child import Start
from agent.seccomp.rules import rules

EPILOG = """\b
Examples:
  weir run -- curl -sI http://example.com/
  weir run --policy ./mine.yaml --user nobody -- ./job --fast
  weir run --json --policy audit -- make fetch 2>summary.json"""


@click.command(epilog=EPILOG, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--policy", "-p", default="appengine", show_default=True, help="A policy file, or a shipped policy's name."
)
@click.option("--user", "-u", help="Run as this user: NAME, UID, NAME:GROUP or UID:GID.")
@click.option("--inherit-fds", is_flag=True, help="Keep inherited descriptors, network sockets included.")
@click.option("--json", "as_json", is_flag=True, help="Write the summary as one line of JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Write no summary.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(policy: str, user: str | None, inherit_fds: bool, as_json: bool, quiet: bool, command: tuple[str, ...]) -> int:
    """Run COMMAND under a policy, in a cgroup of its own.

    Its exit status is weir's; a command ended by signal N gives 128 + N. Standard input, output and error are the
    command's own. When it has ended, what it left running is killed and a summary goes to standard error: bytes sent by
    destination class, refusals by rule. weir's own exit status is 1 when the rules could not be put in force; then the
    command has not run.
    """
    chosen = load_policy(policy)
    ready = compiled(chosen)
    start = Start(
        argv=command,
        user=find_user(user) if user else None,
        inherit_fds=inherit_fds,
        rules=() if chosen.mode is Mode.AUDIT else rules(chosen.sockets),
    )
    if not inherit_fds:
        check_inherited()
    if not quiet and not as_json:
        for sentence in names.not_in_force(ready.version.flags):
            print(f"weir: {sentence}", file=sys.stderr)
    summary = run_command(Place.here(), ready, start)
    if not quiet:
        print(json.dumps(as_data(summary)) if as_json else as_text(summary), file=sys.stderr, flush=True)
    return summary.status if summary.status >= 0 else 128 - summary.status


def as_data(summary: Summary) -> dict[str, Any]:
    """The summary for machines."""
    versions = dict.fromkeys((refused.policy for refused in summary.refusals), summary.version)
    return {
        "policy": summary.version.name,
        "mode": names.mode(summary.version.flags),
        "status": summary.status,
        "seconds": round(summary.seconds, 3),
        "seccomp": not summary.version.flags & Flag.AUDIT,
        "egress": {
            kind: {"bytes": summary.counters.bytes[kind], "packets": summary.counters.packets[kind]}
            for kind in summary.counters.bytes
        },
        "refused": names.refusals(summary.refusals, versions),
        "killed": summary.killed,
        "bytes_may_follow": summary.unsettled,
        "not_in_force": names.not_in_force(summary.version.flags),
        "counters": {k: v for k, v in asdict(summary.counters).items() if isinstance(v, int)},
    }


def as_text(summary: Summary) -> str:
    """The summary for people."""
    data = as_data(summary)
    status = summary.status
    ended = f"exit {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
    lines = [f"weir: policy {data['policy']} ({data['mode']}), {summary.seconds:.1f} s, {ended}"]
    sent = (
        f"{kind} {numbers['bytes']:,} B in {numbers['packets']:,} packets" for kind, numbers in data["egress"].items()
    )
    lines.append(f"  sent     {'; '.join(sent)}")
    lines += [names.refusal_text(row) for row in data["refused"]]
    if not data["refused"]:
        lines.append("  refused  nothing in the kernel's hooks")
    if data["seccomp"]:
        lines.append("  seccomp  in force; what it refuses is seen by the program only")
    if summary.killed:
        lines.append(f"  killed   {summary.killed} processes that the command left running")
    if summary.unsettled:
        lines.append("  warning  closed sockets were still sending: their last bytes are not in this sum")
    return "\n".join(lines)
