"""Starts a program through agent.processes.spawn, for tests that look at it from outside.

    python -m tests.kernel.seccomp_start '{"bind": "ephemeral"}' PROGRAM ARGUMENT…

The first argument is a JSON object: keys of the policy's sockets section, which change the App Engine policy's, and
  user, inherit_fds   as in agent.seccomp.child.Start
  audit               true: no rules at all
  mark                a number added to every rule's errno, to tell the filter's answers from the kernel's own
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

from agent.errors import WeirError
from agent.policy.model import Action, Bind, Family, Protocol, Sockets
from agent.processes import find_user, spawn
from agent.seccomp.child import Start, StartError
from agent.seccomp.rules import rules
from tests.seccomp_expected import APPENGINE


def sockets(changes: dict[str, Any]) -> Sockets:
    """Return the App Engine policy's sockets section with some keys changed."""
    return replace(
        APPENGINE,
        families=frozenset(map(Family, changes.get("families", APPENGINE.families))),
        protocols=frozenset(map(Protocol, changes.get("protocols", APPENGINE.protocols))),
        listen=Action(changes.get("listen", APPENGINE.listen)),
        bind=Bind(changes.get("bind", APPENGINE.bind)),
    )


def main() -> int:
    """Return the program's exit status as a shell would: 128 and the signal when one ended it."""
    options = json.loads(sys.argv[1])
    mark = options.get("mark", 0)
    denied = () if options.get("audit") else rules(sockets(options))
    start = Start(
        argv=tuple(sys.argv[2:]),
        user=find_user(options["user"]) if "user" in options else None,
        inherit_fds=options.get("inherit_fds", False),
        rules=tuple(replace(rule, errno=rule.errno + mark) for rule in denied),
    )
    status = os.waitstatus_to_exitcode(os.waitpid(spawn(start, lambda: None), 0)[1])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WeirError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status if isinstance(error, StartError) else 1)
