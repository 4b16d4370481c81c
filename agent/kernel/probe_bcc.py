"""A process of its own for the facts that need BCC: its version, and whether this kernel takes LSM programs.

Prints one JSON object: {"version": TEXT} or {"error": TEXT, "hint": TEXT}, and "lsm": null or what refused it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from agent.errors import WeirError
from agent.kernel import source
from agent.kernel.loader import binding, captured_stderr

LSM = """
struct socket;
LSM_PROBE(socket_listen, struct socket *sock, int backlog)
{
	return 0;
}
"""
"""The smallest program of the kind: it allows what it is asked about. BCC attaches it when it is loaded."""


def main() -> int:
    """Ask, and print."""
    try:
        answer = {"version": binding().__version__, "lsm": refusal_of_lsm()}
    except WeirError as e:
        answer = {"error": e.message, "hint": e.hint}
    json.dump(answer, sys.stdout)
    return 0


def refusal_of_lsm() -> str | None:
    """What BCC says when the LSM program is refused, None when it was loaded and attached for a moment."""
    BPF: Any = binding().BPF
    try:
        with source.header_tree(source.directory()) as tree, captured_stderr() as log:
            os.environ["BCC_KERNEL_SOURCE"] = str(tree)
            try:
                BPF(text=LSM, cflags=["-Wno-macro-redefined"]).cleanup()
            except Exception as e:  # noqa: BLE001 - BCC raises no narrower type
                said = log.tail().split("\n")[-1].strip()  # the errno is in the log; BCC's own sentence guesses
                return said or str(e)
    except WeirError as e:
        return e.message
    return None


if __name__ == "__main__":
    sys.exit(main())
