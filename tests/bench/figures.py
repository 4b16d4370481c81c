"""Samples → the figures that the budgets are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench.clients import Samples

BARE, OUTSIDE, EMPTY = "without weir", "outside, weir loaded", "empty programs"


def weir(prefixes: int) -> str:
    """The arm's name."""
    return f"weir, {prefixes:,} prefixes"


@dataclass(frozen=True)
class Figure:
    """One workload in one arm; nanoseconds. ``added`` is the median over the turns of the difference to the bare arm in
    the same turn, ``error`` twice the standard error of that median.
    """

    median: float
    least: float
    most: float
    added: float
    error: float
    ratio: float
    to_floor: float


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]


def figure(samples: Samples, workload: str, arm: str) -> Figure:
    """``ratio`` is to the bare arm's median, ``to_floor`` what the arm adds over what the empty programs add."""
    values, bare = samples[workload, arm], samples[workload, BARE]
    added = [a - b for a, b in zip(values, bare, strict=True)]
    floor = median(a - b for a, b in zip(samples[workload, EMPTY], bare, strict=True))
    low, high = _quartiles(added)
    # The standard error of a median of n normal values is 1.253 sigma / sqrt(n); their quartiles lie 1.349 sigma apart.
    error = 2 * 1.253 * (high - low) / 1.349 / len(added) ** 0.5
    return Figure(
        median(values),
        min(values),
        max(values),
        median(added),
        error,
        median(values) / median(bare),
        median(added) / floor if floor else float("nan"),
    )
