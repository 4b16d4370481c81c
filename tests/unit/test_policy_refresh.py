"""The set google, recomputed: prefix subtraction, the published facts, and files that are something else."""

import json
from ipaddress import IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import WeirError
from agent.policy import sets
from agent.policy.model import Prefix
from agent.policy.refresh import difference, ipv4_addresses, prefixes_of, refresh, spans, write

DATA = Path(__file__).parent / "data"
LAST = (1 << 128) - 1

small = st.tuples(st.integers(0, 255), st.integers(120, 128)).map(
    lambda p: Prefix(p[0] >> (128 - p[1]) << (128 - p[1]), p[1])
)


def members(prefixes: "tuple[Prefix, ...] | list[Prefix]") -> set[int]:
    return {
        address
        for prefix in prefixes
        for address in range(prefix.address, prefix.address + (1 << (128 - prefix.length)))
    }


@given(st.lists(small, max_size=8), st.lists(small, max_size=8))
def test_difference_is_that_of_sets(minuend: list[Prefix], subtrahend: list[Prefix]) -> None:
    result = difference(minuend, subtrahend)
    assert members(result) == members(minuend) - members(subtrahend)
    assert list(result) == sorted(result)
    assert len(result) == sum(len(prefixes_of(first, last)) for first, last in spans(result))  # none could be joined


@given(st.integers(0, 255), st.integers(0, 255))
def test_prefixes_of_a_span(first: int, last: int) -> None:
    result = prefixes_of(first, last)
    assert members(result) == set(range(first, last + 1))
    assert all(prefix.address % (1 << (128 - prefix.length)) == 0 for prefix in result)


def test_prefixes_that_touch_are_joined() -> None:
    """The shipped file would else depend on how the publisher happens to cut the ranges."""
    halves = [Prefix.parse("10.0.0.0/9"), Prefix.parse("10.128.0.0/9")]
    assert difference(halves, []) == (Prefix.parse("10.0.0.0/8"),)


def test_the_edges_of_the_address_space() -> None:
    everything = Prefix(0, 0)
    assert difference([everything], []) == (everything,)
    assert difference([everything], [everything]) == ()
    assert difference([], [everything]) == ()
    assert difference([everything], [Prefix(0, 1)]) == (Prefix(1 << 127, 1),)
    assert difference([everything], [Prefix(1 << 127, 1)]) == (Prefix(0, 1),)
    assert prefixes_of(LAST, LAST) == [Prefix(int(IPv6Address(LAST)), 128)]


def test_the_shipped_set_is_what_the_published_files_give() -> None:
    fresh = refresh(DATA / "goog.json", DATA / "cloud.json", sets.read("google"))
    assert fresh.text == (sets.POLICIES / "sets" / "google.txt").read_text("utf-8")
    assert (fresh.added, fresh.removed) == ((), ())
    assert ipv4_addresses(fresh.prefixes) == 4_995_200


def test_what_came_and_went() -> None:
    old = [*sets.read("google")[1:], Prefix.parse("93.184.216.0/24")]
    fresh = refresh(DATA / "goog.json", DATA / "cloud.json", old)
    assert [str(prefix) for prefix in fresh.added] == ["8.8.4.0/24"]
    assert [str(prefix) for prefix in fresh.removed] == ["93.184.216.0/24"]


GOOG = {"creationTime": "2026-10-08", "prefixes": [{"ipv4Prefix": "8.8.8.0/24"}]}
CLOUD = {
    "creationTime": "2026-10-08",
    "prefixes": [{"ipv4Prefix": "8.8.9.0/24", "service": "Google Cloud", "scope": "x"}],
}


@pytest.mark.parametrize(
    ("goog", "cloud", "message"),
    [
        ("{", CLOUD, "goog.json is not JSON"),
        ("[" * 100_000, CLOUD, "goog.json is not JSON"),
        (b"\xff", CLOUD, "goog.json is not JSON"),
        ([], CLOUD, "goog.json has no creationTime or no prefixes"),
        ({"creationTime": "x", "prefixes": []}, CLOUD, "goog.json has no creationTime or no prefixes"),
        ({"prefixes": GOOG["prefixes"]}, CLOUD, "goog.json has no creationTime or no prefixes"),
        ({**GOOG, "creationTime": "a\n10.0.0.0/8"}, CLOUD, "goog.json has no creationTime or no prefixes"),
        ({**GOOG, "prefixes": ["8.8.8.0/24"]}, CLOUD, r"prefixes\[0\] is none of goog.json's"),
        ({**GOOG, "prefixes": [{"ipv4Prefix": 8}]}, CLOUD, r"prefixes\[0\] has not exactly one of"),
        ({**GOOG, "prefixes": [{}]}, CLOUD, r"prefixes\[0\] has not exactly one of"),
        ({**GOOG, "prefixes": [{"ipv4Prefix": "8.8.8.1/24"}]}, CLOUD, r"prefixes\[0\]: '8.8.8.1/24' has host bits set"),
        (CLOUD, GOOG, r"goog.json: prefixes\[0\] is none of goog.json's"),
        (GOOG, GOOG, r"cloud.json: prefixes\[0\] is none of cloud.json's"),
        (GOOG, {**CLOUD, "prefixes": [{"ipv4Prefix": "8.8.0.0/16", "service": "x"}]}, "nothing is left"),
        (None, CLOUD, "goog.json cannot be read"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, goog: object, cloud: object, message: str) -> None:
    for name, content in (("goog.json", goog), ("cloud.json", cloud)):
        if content is not None:
            text = content if isinstance(content, (str, bytes)) else json.dumps(content)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WeirError, match=message):
        refresh(tmp_path / "goog.json", tmp_path / "cloud.json", ())


def test_write_replaces_the_file_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "google.txt"
    file.write_text("old")
    with file.open() as reader:
        write(file, "new\n")
        assert reader.read() == "old"  # who had it open keeps the old one whole
    assert file.read_text() == "new\n"
    assert file.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["google.txt"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "google.txt").mkdir()
    with pytest.raises(WeirError, match=r"google\.txt cannot be written"):
        write(tmp_path / "google.txt", "new\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["google.txt"]
    with pytest.raises(WeirError, match="cannot be written: No such file or directory"):
        write(tmp_path / "missing" / "google.txt", "new\n")
