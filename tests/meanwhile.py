"""Work that goes on beside what a test does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Do something again and again, in a thread, for as long as the `with` lasts; its failure is the test's."""
    over, failures = threading.Event(), []

    def run() -> None:
        try:
            while not over.is_set():
                work()
        except BaseException as e:  # noqa: BLE001 - raised again where it is seen
            failures.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    for failure in failures:
        raise failure
