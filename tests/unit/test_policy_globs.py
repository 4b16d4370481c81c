"""Globs of selectors: those of the shell, and every one that is accepted can be matched."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.policy import globs


@pytest.mark.parametrize(
    ("glob", "text", "holds"),
    [
        ("shop", "shop", True),
        ("shop", "shop2", False),
        ("shop", "ashop", False),
        ("Shop", "shop", False),
        ("team-*", "team-", True),
        ("team-?", "team-", False),
        ("a*/b", "a/x/y/b", True),
        ("a.b", "axb", False),
        ("v[0-9]", "v7", True),
        ("v[!0-9]", "v7", False),
        ("v[]x]", "v]", True),
        ("[*]", "*", True),
        ("[*]", "a", False),
        ("[[]a", "[a", True),
        (r"a\x2db", r"a\x2db", True),
        ("*", "", True),
        ("*", "two\nlines", True),
        ("a", "a\n", False),
        ("", "", True),
        ("", "a", False),
    ],
)
def test_matches(glob: str, text: str, holds: bool) -> None:
    globs.literals(glob)
    assert globs.matches(glob, text) is holds


@given(st.text(alphabet="ab-z*?[]!^\\/", max_size=12), st.text(alphabet="ab-z*[]!", max_size=6))
def test_what_is_accepted_is_a_pattern_and_means_what_it_says(glob: str, text: str) -> None:
    """Every [ of it is read as a bracket: were one left as a letter, escaping it would change nothing."""
    try:
        literals = globs.literals(glob)
    except ValueError as error:
        assert repr(glob) in str(error)
        return
    globs.matches(glob, text)
    assert "[" not in literals
    assert literals == re.sub(r"\[!?.[^]]*\]|[*?]", "", glob)


def test_a_glob_full_of_stars_takes_no_time() -> None:
    """A hundred stars against a text that almost matches: with plain backtracking this does not end."""
    assert not globs.matches("*a" * 100 + "b", "a" * 300)
