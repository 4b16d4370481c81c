"""``weir version``."""

from __future__ import annotations

import json
import platform

import click

from agent import __version__
from agent.kernel.abi import ABI


@click.command(epilog="\b\nExample:\n  weir version --json")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def version(as_json: bool) -> int:
    """Print weir's version, the ABI number of its pins, and the kernel's release."""
    data = {"weir": __version__, "abi": ABI, "kernel": platform.release(), "python": platform.python_version()}
    print(json.dumps(data) if as_json else "weir {weir} (abi {abi}), Linux {kernel}, Python {python}".format(**data))
    return 0
