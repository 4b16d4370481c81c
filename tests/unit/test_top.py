"""What `weir top` makes of two readings, and of keys. What it prints on a real kernel is in tests/kernel/test_top.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from agent.rates import Row, Sort, arranged, increase, rows
from agent.verbs.keyboard import END, ESCAPE
from agent.verbs.top import View, drawn, read_interval, table


def item(name: str, number: int, sent: tuple[int, int, int] = (0, 0, 0), **more: Any) -> dict[str, Any]:
    """A container as agent.status.gather has it."""
    return {
        "cgroup": name,
        "cgroup_id": number,
        "policy": "appengine",
        "mode": "enforce",
        "gone": False,
        "layers": {"hooks": True, "packets": True, "seccomp": "1/2", "lsm": False},
        "bytes": dict(zip(("public", "private", "loopback"), sent, strict=True)),
        "sockets": 3,
        "refused": [],
        **more,
    }


def refused(rule: str, count: int, **more: Any) -> dict[str, Any]:
    given = {"policy": "appengine", "hook": "connect", "reason": "rule", "rule": rule, "line": 1, "audited": False}
    return {**given, "count": count, **more}


def reading(seconds: float, *items: Mapping[str, Any]) -> dict[str, Any]:
    return {"loaded": True, "monotonic": seconds, "cgroups": items}


def test_rates_are_per_second() -> None:
    before = reading(10, item("/a", 1, (1000, 10, 5), refused=[refused("smtp", 3)]))
    after = reading(12, item("/a", 1, (5000, 10, 6), refused=[refused("smtp", 5), refused("private", 8)]))
    (row,) = rows(before, after)
    assert (row.public, row.private, row.loopback, row.refused) == (2000, 0, 0.5, 5)
    assert [(one.rule, one.per_second) for one in row.rules] == [("private", 4), ("smtp", 1)]
    assert (row.name, row.sockets, row.seccomp, row.hooks) == ("/a", 3, "1/2", True)


def test_one_that_comes_one_that_goes_and_one_that_begins_anew() -> None:
    before = reading(10, item("/gone", 1, (9, 9, 9)), item("/again", 2, (900, 0, 0), refused=[refused("smtp", 7)]))
    after = reading(11, item("/again", 2, (20, 0, 0), refused=[refused("smtp", 2)]), item("/new", 3, (50, 0, 0)))
    assert {row.name: (row.public, row.refused) for row in rows(before, after)} == {"/again": (20, 2), "/new": (50, 0)}


def test_nothing_loaded_before_or_after() -> None:
    unloaded = {"loaded": False, "cgroups": [], "maps": {}}
    assert rows(unloaded, unloaded) == []
    assert rows(reading(1, item("/a", 1, (5, 0, 0))), unloaded) == []
    assert [row.name for row in rows(unloaded, reading(1, item("/a", 1)))] == ["/a"]


COUNTERS = st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4)


@given(before=COUNTERS, after=COUNTERS, seconds=st.floats(0, 10))
def test_no_rate_is_ever_negative(before: list[int], after: list[int], seconds: float) -> None:
    first, second = (
        item("/a", 1, (counts[0], counts[1], counts[2]), refused=[refused("smtp", counts[3])])
        for counts in (before, after)
    )
    (row,) = rows(reading(5, first), reading(5 + seconds, second))
    assert min(row.public, row.private, row.loopback, row.refused) >= 0


def test_a_counter() -> None:
    assert [increase(5, 8), increase(8, 8), increase(8, 5), increase(8, 0)] == [3, 0, 5, 0]


def made(**sent: tuple[int, int, int]) -> list[Row]:
    """Rows by name, with what each sends a second."""
    names = list(sent)
    empty = reading(0, *(item(name, names.index(name)) for name in names))
    return rows(empty, reading(1, *(item(name, names.index(name), sent[name]) for name in names)))


def test_sorting() -> None:
    found = made(b=(5, 1, 3), a=(5, 2, 2), c=(7, 0, 1))
    orders = {sort: "".join(row.name for row in arranged(found, sort)) for sort in Sort}
    assert orders == {
        Sort.PUBLIC: "cab",
        Sort.PRIVATE: "abc",
        Sort.LOOPBACK: "bac",
        Sort.REFUSED: "abc",
        Sort.NAME: "abc",
    }


def test_filter_by_a_part_of_name_cgroup_or_policy() -> None:
    before = reading(0)
    pod = item("/kubepods/x1", 2, namespace="shop", pod="cart", container="web", policy=None)
    found = rows(before, reading(1, item("/job", 1), pod))
    assert [row.name for row in arranged(found, Sort.NAME)] == ["/job", "shop/cart/web"]
    for text, names in (("CART", ["shop/cart/web"]), ("x1", ["shop/cart/web"]), ("appe", ["/job"]), ("zz", [])):
        assert [row.name for row in arranged(found, Sort.NAME, text)] == names


def test_keys() -> None:
    view = View(Sort.PUBLIC)
    assert [view.after(key).sort.value for key in "pvlrnx"] == [
        "public",
        "private",
        "loopback",
        "refused",
        "name",
        "public",
    ]
    assert view.after("rq").ended and view.after(END).ended and view.after("/" + END).ended
    typed = view.after("/carq\x7ft")  # q is a letter like any other in a filter
    assert (typed.text, typed.typing, typed.ended) == ("cart", True, False)
    assert typed.after("\r") == View(Sort.PUBLIC, "cart")
    assert typed.after("\r" + "n").sort is Sort.NAME
    assert typed.after(ESCAPE) == view
    assert typed.after("\r" + ESCAPE) == view


@pytest.mark.parametrize(
    ("text", "seconds"), [("2s", 2), ("2", 2), ("0.5s", 0.5), ("500ms", 0.5), ("1m", 60), ("1ms", 0.1)]
)
def test_interval(text: str, seconds: float) -> None:
    assert read_interval(click.Context(click.Command("top")), click.Option(["--interval"]), text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "2h", "nan", "2 s"])
def test_no_interval(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no duration"):
        read_interval(click.Context(click.Command("top")), click.Option(["--interval"]), text)


def printed(shown: RenderableType, width: int = 160) -> list[str]:
    console = Console(width=width, record=True, highlight=False)
    with console.capture() as captured:
        console.print(shown)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_table() -> None:
    none = {"hooks": False, "packets": False, "seccomp": "0/0", "lsm": False}
    before = reading(0, item("/a", 1), item("/b", 2), item("/c", 3))
    after = reading(
        2,
        item("/a", 1, (3_000_000, 0, 400), refused=[refused("smtp", 5), refused("private", 6, audited=True)]),
        item(
            "/b",
            2,
            policy=None,
            mode="refuse all",
            layers=none,
        ),
        item("/c", 3, gone=True, layers=none),
    )
    titles, first, second, third, sums = printed(table(rows(before, after), View(Sort.PUBLIC), loaded=True))
    assert "PUBLIC/S ▼" in titles
    assert " ".join(first.split()) == (
        "/a 1.5 MB 0 200 B 5.5 private (audit) 3.0 +1 3 appengine enforce hooks, seccomp 1/2"
    )
    assert second.endswith("NO HOOKS")
    assert third.split()[-2:] == ["enforce", "gone"]
    assert " ".join(sums.split()) == "3 in all 1.5 MB 0 200 B 5.5"


def test_names_are_no_markup() -> None:
    found = rows(reading(0), reading(1, item("/[red]a[/red]", 1)))
    assert "/[red]a[/red]" in printed(table(found, View(Sort.NAME), loaded=True))[1]


@pytest.mark.parametrize("count", [1, 5, 6, 7, 50])
def test_the_screen_is_never_overfull(count: int) -> None:
    found = made(**{f"c{number:02}": (number, 0, 0) for number in range(count)})
    lines = printed(drawn(arranged(found, Sort.NAME), View(Sort.NAME), 10, loaded=True), width=200)
    assert len(lines) <= 10
    assert f"{count} in all" in lines[-3]
    assert ("more below" in lines[-2]) is (count > 6)
    assert names_of(lines) == [f"c{number:02}" for number in range(min(count, 6))]


def names_of(lines: Sequence[str]) -> list[str]:
    return [line.split()[0] for line in lines[1:-3]]
