"""Keeps freed memory from staying in the process: glibc gives it back late, and keeps some for each thread.

An answer of the CRI, a look at a large node or a scrape needs some megabytes for a moment. They would stay: with 1,000
containers a tenth of the agent's memory. Python's own small objects are elsewhere (its arenas of 1 MB), and do not count here.
"""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # malloc.h


def share() -> None:
    """Let all threads allocate from one arena. Only for those that start later, so: at the start."""
    _libc().mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Give back what is free, after something that needed much; takes a millisecond."""
    _libc().malloc_trim(0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
