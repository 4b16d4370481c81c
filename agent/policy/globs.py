"""The globs of a selector: `*`, `?`, `[abc]`, `[a-z]` and `[!abc]`, as in the shell, but `*` goes past a `/` too.

`[*]` stands for a star itself. Upper and lower case differ.
"""

import fnmatch
import re
from functools import lru_cache

MAX_COMPILED = 4096  # patterns kept; a kilobyte each, and every container is held against all of them


def matches(glob: str, text: str) -> bool:
    """Return whether the whole text is what the glob describes."""
    return pattern(glob).match(text) is not None


@lru_cache(maxsize=MAX_COMPILED)
def pattern(glob: str) -> re.Pattern[str]:
    """Return the glob as a regular expression."""
    return re.compile(fnmatch.translate(glob))


def literals(glob: str) -> str:
    """Return the characters of the glob that stand for themselves, those in brackets left out.

    Raises ValueError, with a sentence for the user, for a bracket that does not say which characters it means.
    """
    found = []
    at = 0
    while at < len(glob):
        character = glob[at]
        at += 1
        if character == "[":
            at = end_of_bracket(glob, at)
        elif character not in "*?":
            found.append(character)
    return "".join(found)


def end_of_bracket(glob: str, first: int) -> int:
    """Return the index behind the bracket whose content begins at ``first``. Raises ValueError as ``literals``."""
    begin = first + 1 if glob[first : first + 1] == "!" else first
    end = glob.find("]", begin + 1)  # a ] in the first place is one of the characters
    if end < 0:
        raise ValueError(f"{glob!r} has a [ without a ] and a character between; for the character itself write [[]")
    inside = glob[begin:end]
    for low, high in re.findall(r"(.)-(.)", inside):
        if low > high:
            raise ValueError(f"{glob!r} has the range {low}-{high}, which is reversed; write {high}-{low}")
    return end + 1
