"""Policies for tests, in few words: ``policy(deny("10.0.0.0/8"), bind=Bind.DENY)``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agent.policy.model import (
    BOTH_PROTOCOLS,
    Action,
    Bind,
    Family,
    Mode,
    Options,
    Policy,
    PortRange,
    Prefix,
    Protocol,
    Rule,
    Sockets,
)

APPENGINE = Sockets(
    families=frozenset({Family.INET, Family.INET6, Family.UNIX}),
    protocols=BOTH_PROTOCOLS,
    listen=Action.DENY,
    bind=Bind.DENY,
    transfer=Action.DENY,
    idle_timeout=None,
    options=Options(mock=(), others=Action.ALLOW),
)
"""Outbound only, nothing bound, no socket from elsewhere; what `policy` starts from."""

OPEN: dict[str, Any] = {"listen": Action.ALLOW, "bind": Bind.ALLOW}
"""Keywords for `policy`: a server's."""


def rule(action: Action, to: tuple[str, ...], ports: tuple[int, ...], protocol: Protocol | None) -> Rule:
    """A rule; without ``to`` for any destination, without ports for every one."""
    return Rule(
        name=f"{action.value}-{'-'.join([*to, *map(str, ports)])}"[:63],
        action=action,
        prefixes=tuple(Prefix.parse(text) for text in to) or None,
        names=(),
        ports=tuple(PortRange(port, port) for port in ports),
        protocols=frozenset({protocol}) if protocol else BOTH_PROTOCOLS,
        line=1,
    )


def deny(*to: str, ports: tuple[int, ...] = (), protocol: Protocol | None = None) -> Rule:
    """Refuse these destinations."""
    return rule(Action.DENY, to, ports, protocol)


def allow(*to: str, ports: tuple[int, ...] = (), protocol: Protocol | None = None) -> Rule:
    """Let through to these destinations."""
    return rule(Action.ALLOW, to, ports, protocol)


def policy(*egress: Rule, default: Action = Action.ALLOW, mode: Mode = Mode.ENFORCE, **sockets: Any) -> Policy:
    """A policy; the other keywords change APPENGINE."""
    return Policy("test", mode, replace(APPENGINE, **sockets), egress, default, "test.yaml", "0" * 64, "")
