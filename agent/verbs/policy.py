"""weir policy: check, show, explain, schema, refresh-set. None of them needs root or a kernel."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from agent.errors import WeirError
from agent.policy import find, refresh, sets
from agent.policy.compile import compile_policy
from agent.policy.document import schema
from agent.policy.explain import as_json, as_text, explain
from agent.policy.model import Flow, Policy, Protocol, Rule, Selector, parse_address

MAX_LISTED = 20  # changed prefixes that refresh-set prints; more are counted


def example(command: str) -> str:
    """Return the last lines of a --help: one command to copy."""
    return f"\b\nExample:\n  {command}"


F = TypeVar("F", bound=Callable[..., object])


def as_json_option(command: F) -> F:
    """Give a command the option --json."""
    return click.option("--json", "machine", is_flag=True, help="Print JSON.")(command)


@click.group("policy", epilog=example("weir policy explain --policy appengine tcp 10.0.0.1 443"))
def policy() -> None:
    """Check, show and explain policies, without root and without touching the kernel.

    POLICY is the path of a file (with a / or a dot in it) or the name of a shipped policy, such as appengine.
    """


@policy.command("check", epilog=example("weir policy check ./mine.yaml appengine"))
@click.argument("policies", nargs=-1, required=True, metavar="POLICY...")
def check_command(policies: tuple[str, ...]) -> None:
    """Say whether each POLICY can be used; print every problem as file:line:column."""
    check(policies)


@policy.command("show", epilog=example("weir policy show appengine"))
@click.argument("name", metavar="POLICY")
@as_json_option
def show_command(name: str, machine: bool) -> None:
    """Print what POLICY means, defaults filled in and sets expanded."""
    loaded = find.load(name)
    click.echo(json.dumps(policy_json(loaded), indent=2) if machine else policy_text(loaded))


@policy.command(
    "explain", epilog=example("weir policy explain --policy appengine tcp 142.250.0.1 465 --name smtp.gmail.com")
)
@click.option("--policy", "-p", "name", required=True, metavar="POLICY", help="A file, or a shipped policy's name.")
@click.option("--name", "names", multiple=True, metavar="DNS", help="A name that the program resolved to ADDRESS.")
@click.argument("protocol", type=click.Choice([protocol.value for protocol in Protocol]))
@click.argument("address")
@click.argument("port", type=click.IntRange(0, 65535))
@as_json_option
def explain_command(
    *, name: str, names: tuple[str, ...], protocol: str, address: str, port: int, machine: bool
) -> None:
    """Say which rule decides about PROTOCOL ADDRESS PORT, and why no earlier one does."""
    try:
        number = parse_address(address)
    except ValueError as error:
        raise WeirError(str(error), "Names are not looked up: give the address, and the name with --name.") from error
    flow = Flow(Protocol(protocol), number, port, frozenset(name.lower().rstrip(".") for name in names))
    explanation = explain(find.load(name), flow)
    click.echo(json.dumps(as_json(explanation), indent=2) if machine else as_text(explanation))


@policy.command("schema", epilog=example("weir policy schema > weir-policy.schema.json"))
def schema_command() -> None:
    """Print the JSON Schema of the policy format, for editors."""
    click.echo(json.dumps(schema(), indent=2))


@policy.command("refresh-set", epilog=example("weir policy refresh-set google goog.json cloud.json"))
@click.argument("name", type=click.Choice(["google"]))
@click.argument("goog", type=click.Path(path_type=Path))
@click.argument("cloud", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Write here instead of over the set in use.")
def refresh_set_command(name: str, goog: Path, cloud: Path, output: Path | None) -> None:
    """Recompute the set google from goog.json and cloud.json, and print what changed.

    Both files are published at www.gstatic.com/ipranges. Policies that are in force keep the old set until they are
    loaded again.
    """
    refresh_set(name, goog, cloud, output or sets.POLICIES / "sets" / f"{name}.txt")


def check(policies: tuple[str, ...]) -> None:
    """Print a line for each policy that can be used. Raises WeirError for the others, after looking at all of them."""
    failures: list[WeirError] = []
    for name in policies:
        try:
            loaded = find.load(name)
            entries = len(compile_policy(loaded).entries)
        except WeirError as error:
            failures.append(error)
            continue
        click.echo(f"{loaded.source}: {loaded.name}: {len(loaded.egress)} rules, {entries} table entries: ok")
        for part in loaded.unenforced():
            click.echo(f"  note: {part.value}")
    if failures:
        hints = dict.fromkeys(error.hint for error in failures)
        raise WeirError("\n".join(error.message for error in failures), " ".join(hints))


def refresh_set(name: str, goog: Path, cloud: Path, output: Path) -> None:
    """Write the recomputed set to ``output`` and print what changed against the set in use. Raises WeirError."""
    old = sets.read(name) if name in sets.names() else ()
    fresh = refresh.refresh(goog, cloud, old)
    refresh.write(output, fresh.text)
    for sign, changed in (("+", fresh.added), ("-", fresh.removed)):
        for prefix in changed[:MAX_LISTED]:
            click.echo(f"{sign} {prefix}")
        if len(changed) > MAX_LISTED:
            click.echo(f"{sign} … {len(changed) - MAX_LISTED} more")
    more, fewer = refresh.ipv4_addresses(fresh.added), refresh.ipv4_addresses(fresh.removed)
    change = f"{more:,} IPv4 addresses came, {fewer:,} went" if fresh.added or fresh.removed else "no address changed"
    click.echo(f"{output}: {len(fresh.prefixes)} prefixes, {change}")


def policy_json(loaded: Policy) -> dict[str, object]:
    """Return what `weir policy show --json` prints."""
    sockets = loaded.sockets
    tables = compile_policy(loaded)
    return {
        "name": loaded.name,
        "file": loaded.source,
        "sha256": loaded.sha256,
        "mode": loaded.mode.value,
        "selector": selector_json(loaded.selector) if loaded.selector else None,
        "sockets": {
            "families": sorted(family.value for family in sockets.families),
            "protocols": sorted(protocol.value for protocol in sockets.protocols),
            "listen": sockets.listen.value,
            "bind": sockets.bind.value,
            "transfer": sockets.transfer.value,
            "idleTimeoutSeconds": sockets.idle_timeout,
            "options": {"mock": list(sockets.options.mock), "others": sockets.options.others.value},
        },
        "egress": [rule_json(rule) for rule in loaded.egress],
        "default": loaded.default.value,
        "tables": {"entries": len(tables.entries), "clauses": len(tables.clauses)},
        "notInForce": [part.value for part in loaded.unenforced()],
    }


def selector_json(selector: Selector) -> dict[str, object]:
    """Return a selector as JSON; what is left out of the file is [] or {}."""
    return {
        "namespaces": list(selector.namespaces),
        "podLabels": dict(selector.pod_labels),
        "containers": list(selector.containers),
        "cgroups": list(selector.cgroups),
    }


def selector_text(selector: Selector | None) -> str:
    """Return in words which containers of a node a policy is for."""
    if selector is None:
        return "no container by itself: by annotation, by --policy, or as the default"
    labels = [f"{key}={glob}" for key, glob in selector.pod_labels]
    parts = {
        "namespace": " or ".join(selector.namespaces),
        "pod label": " and ".join(labels),
        "container": " or ".join(selector.containers),
        "cgroup": " or ".join(selector.cgroups),
    }
    return "; ".join(f"{what} {globs}" for what, globs in parts.items() if globs)


def rule_json(rule: Rule) -> dict[str, object]:
    """Return one rule as JSON; `prefixes` is null for any destination, `ports` is [] for every port."""
    return {
        "name": rule.name,
        "line": rule.line,
        "action": rule.action.value,
        "prefixes": None if rule.prefixes is None else [str(prefix) for prefix in rule.prefixes],
        "names": list(rule.names),
        "ports": [str(ports) for ports in rule.ports],
        "protocols": sorted(protocol.value for protocol in rule.protocols),
    }


def policy_text(loaded: Policy) -> str:
    """Return what `weir policy show` prints."""
    sockets = loaded.sockets
    idle = "never" if sockets.idle_timeout is None else f"after {sockets.idle_timeout} s"
    families = ", ".join(sorted(family.value for family in sockets.families))
    protocols = ", ".join(sorted(protocol.value for protocol in sockets.protocols))
    listen, bind, transfer = sockets.listen.value, sockets.bind.value, sockets.transfer.value
    lines = [
        f"policy   {loaded.name} ({loaded.source}, sha256 {loaded.sha256[:12]})",
        f"mode     {loaded.mode.value}",
        f"selects  {selector_text(loaded.selector)}",
        f"sockets  {families}; {protocols}",
        f"         listen {listen}, bind {bind}, transfer {transfer}, reclaimed {idle}",
        f"options  {', '.join(sockets.options.mock) or 'none'} pretended, others {sockets.options.others.value}",
        "egress   the first rule that matches decides",
    ]
    rows = [("line", "rule", "action", "protocol", "ports", "to"), *(rule_row(rule) for rule in loaded.egress)]
    rows.append(("", "default", loaded.default.value, "any", "any", "any"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines += ["  " + "  ".join([*map(str.ljust, row, widths), row[5]]) for row in rows]
    lines += [f"note: {part.value}" for part in loaded.unenforced()]
    return "\n".join(lines)


def rule_row(rule: Rule) -> tuple[str, str, str, str, str, str]:
    """Return the cells of one rule, addresses counted when there are many."""
    protocols = next(iter(rule.protocols)).value if len(rule.protocols) == 1 else "any"
    ports = ",".join(str(ports) for ports in rule.ports) or "any"
    prefixes = [str(prefix) for prefix in rule.prefixes or ()]
    addresses = prefixes if len(prefixes) <= 4 else [f"{len(prefixes)} prefixes"]
    to = "any" if rule.prefixes is None else ", ".join([*rule.names, *addresses]) or "no address on this host"
    return (str(rule.line), rule.name, rule.action.value, protocols, ports, to)
