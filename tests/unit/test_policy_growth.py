"""Reading and compiling a policy that is four times as large is four times the work, not sixteen times."""

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import pytest

from agent.errors import WeirError
from agent.policy.compile import compile_policy
from agent.policy.model import Prefix
from agent.policy.parse import parse

HEAD = "apiVersion: weir.dev/v1\nkind: SocketPolicy\nmetadata: {name: test}\nspec:\n"


def rules(count: int, body: Callable[[int], str]) -> str:
    lines = [f"    - {{name: r{index}, action: deny, {body(index)}}}\n" for index in range(count)]
    return f"{HEAD}  egress:\n{''.join(lines)}"


def listed(items: Iterable[object]) -> str:
    return f"[{', '.join(map(str, items))}]"


def odd(count: int) -> str:
    return listed(range(1, 2 * count, 2))


def hosts(first: int, count: int) -> str:
    return listed(f"93.0.{index // 250}.{index % 250}" for index in range(first, first + count))


SHAPES: dict[str, Callable[[int], str]] = {
    "rules of a port each": lambda n: rules(n, lambda index: f"ports: [{index + 1}], to: [93.0.{index}.0/24]"),
    "rules with the same ports": lambda n: rules(n, lambda index: f"ports: {odd(40)}, to: [93.0.{index}.0/24]"),
    "rules with the same addresses": lambda n: rules(n, lambda index: f"to: {hosts(0, 39)[:-1]}, 95.0.0.{index}]"),
    "rules with a set each": lambda n: rules(n, lambda index: f"to: [{{set: google}}, 95.0.0.{index}]"),
    "rules with names": lambda n: rules(n, lambda index: f"to: [{{name: a.org}}, {{name: r{index}.org}}]"),
    "rules without a thing": lambda n: rules(n, lambda _: "port: 1"),
    "hidden rules": lambda n: rules(n, lambda _: "ports: [25]"),
    "ports of two rules": lambda n: rules(2, lambda index: f"ports: {listed(range(1 + index, 20 * n, 2))}"),
    "ports of one rule": lambda n: rules(1, lambda _: f"ports: {odd(10 * n)}"),
    "ports twice": lambda n: rules(1, lambda _: f"ports: {listed([*range(1, 5 * n), *range(1, 5 * n)])}"),
    "ranges in one another": lambda n: rules(1, lambda _: f"ports: {listed(f'{1 + p}-{60000 - p}' for p in range(n))}"),
    "addresses of one rule": lambda n: rules(1, lambda _: f"to: {hosts(0, 10 * n)}"),
    "addresses twice": lambda n: rules(1, lambda _: f"to: {hosts(0, 5 * n)[:-1]}, {hosts(0, 5 * n)[1:]}"),
    "no addresses": lambda n: rules(1, lambda _: f"to: {listed(['1.2.3'] * 10 * n)}"),
    "options": lambda n: (
        f"{HEAD}  sockets: {{options: {{mock: {listed(f'SO_{option}' for option in range(10 * n))}}}}}\n"
    ),
    "unknown keys": lambda n: HEAD + "".join(f"  key{index}: 1\n" for index in range(10 * n)),
    "a key many times": lambda n: HEAD + "  default: deny\n" * 10 * n,
}


def steps(work: Callable[[], object]) -> int:
    """Return how many instructions of Python the work takes: the same on every machine, busy or not."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def use(text: str) -> None:
    with suppress(WeirError):  # one that is refused shall not take longer
        compile_policy(parse(text, "p.yaml", (Prefix.parse("8.8.8.8"),)))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_work_grows_as_the_policy(shape: str) -> None:
    use(SHAPES[shape](1))  # fills caches
    small, large = (steps(partial(use, SHAPES[shape](size))) for size in (15, 60))
    assert large < 6 * small, f"{large / small:.1f} times the work"
