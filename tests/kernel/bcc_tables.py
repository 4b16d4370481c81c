"""Prints, as JSON, what BCC makes of each table's key and leaf: size, fields and offsets. A process of its own."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

from agent.kernel import abi, source
from agent.kernel.loader import compiler_flags


def described(made: Any) -> dict[str, Any]:
    """Size and fields of a ctypes type that BCC derived from the C text."""
    if issubclass(made, ctypes.Array):  # per-CPU: one item for each CPU
        made = made._type_
    fields = getattr(made, "_fields_", [])
    return {
        "size": ctypes.sizeof(made),
        "fields": {field[0]: [getattr(made, field[0]).offset, getattr(made, field[0]).size] for field in fields},
    }


def main() -> None:
    """Compile the programs and describe their tables."""
    from bcc import BPF

    folder = source.directory()
    with source.header_tree(folder) as tree:
        os.environ["BCC_KERNEL_SOURCE"] = str(tree)
        flags = compiler_flags(16, has_retval=False)
        module = BPF(text=source.text(folder), cflags=list(flags))
    names = [name for name in abi.MAPS if name not in ("events", "spare", "sockets", "addresses", "clauses")]
    tables = {name: module[name] for name in (*names, "one_addresses", "one_clauses")}
    answer = {name: {"key": described(table.Key), "leaf": described(table.Leaf)} for name, table in tables.items()}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
