"""Why a test cannot run here: every skip goes through this file, and says what is missing."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def skip(reason: str) -> NoReturn:
    """Skip the running test and say what is missing; with WEIR_NO_SKIP=1 fail it instead.

    Raises pytest's skip or failure exception, never returns.
    """
    if os.environ.get("WEIR_NO_SKIP") == "1":
        pytest.fail(f"WEIR_NO_SKIP=1 forbids this skip: {reason}", pytrace=False)
    pytest.skip(reason)


def root() -> None:
    """Skip unless the test runs as root."""
    if os.geteuid() != 0:
        skip("needs root")


def command(name: str) -> str:
    """Path of the command; skip when the machine does not have it."""
    path = shutil.which(name)
    if path is None:
        skip(f"needs the command {name}")
    return path
