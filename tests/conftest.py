"""After the tests: how each tier (folder of tests/) went, in the order in which they ran."""

from __future__ import annotations

import signal
from collections import Counter

import hypothesis
import pytest

# A busy machine is no failure: no test asserts how long something takes.
hypothesis.settings.register_profile("weir", deadline=None)
hypothesis.settings.load_profile("weir")

# A shell ignores SIGINT for what it starts in the background, and so would every command that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

_WORDS = ("passed", "failed", "error", "skipped")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line for each tier, above pytest's own closing line."""
    tiers: dict[str, Counter[str]] = {}
    for word in _WORDS:
        for report in terminalreporter.getreports(word):
            tier = report.nodeid.split("/")[1] if report.nodeid.count("/") > 1 else "tests"
            tiers.setdefault(tier, Counter())[word] += 1
    if len(tiers) < 2:
        return
    terminalreporter.section("tiers")
    for tier, counts in sorted(tiers.items()):
        terminalreporter.write_line(
            f"{tier:<8}" + "".join(f"{counts[word]:>7} {word}" for word in _WORDS if counts[word])
        )
