"""YAML text → values that know their line and column, or every Problem that keeps them from being read.

A subset of YAML: one document, no anchors, aliases, tags or nulls, keys that are plain words and appear once. Numbers
that YAML 1.1 reads otherwise than they look (22:22, 010) are problems. Nothing here knows what a policy is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml
from yaml.resolver import Resolver

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 100_000  # every address of a full file; a wrong one is a problem to report, at some kilobytes each

Loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # libyaml's parser is ten times as fast

# What YAML forbids, and what breaks a line for YAML and for no editor: it would begin a key in what looks like a comment.
CONTROL = re.compile(
    r"\r(?!\n)|[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
DECIMAL = re.compile(r"0|-?[1-9][0-9]*")
CORE = "tag:yaml.org,2002:"
MAX_DIGITS = 18  # far above any number that a policy holds, below where Python's int() gets slow
EMPTY = "the file is empty; `policies/untrusted.yaml` is one to start from"
MAX_BRIEF = 100  # characters of a tag or another word in a message
MAX_WORD = 300  # characters; a DNS name, the longest word of a policy, has 253


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong in a file. Lines and columns count from 1; ``path`` is like spec.egress[2].to[0], or empty."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        path = f"{self.path}: " if self.path else ""
        return f"{self.file}:{self.line}:{self.column}: {path}{self.message}"


@dataclass(frozen=True)
class Node:
    """A value of the file. ``text`` is a scalar as written; ``keys`` has the position of each key of a mapping.

    A ``broken`` node has had its problem reported and its value means nothing.
    """

    line: int
    column: int
    value: "str | int | bool | list[Node] | dict[str, Node]"
    text: str = ""
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)
    broken: bool = False

    def plain(self) -> object:
        """Return the value without positions, as lists and dictionaries. A broken node stands as itself."""
        if self.broken:
            return self
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return self.value


class Unreadable(Exception):
    """A problem after which nothing more of the file can be read."""

    def __init__(self, line: int, column: int, message: str, path: str = "") -> None:
        super().__init__(message)
        self.line, self.column, self.message, self.path = line, column, message, path


def read(data: bytes, file: str) -> tuple[Node | None, list[Problem]]:
    """Read one YAML document; problems carry the name ``file``. Without a root there is at least one problem."""
    problems: list[Problem] = []
    try:
        return Composer(decode(data), file, problems).document(), problems
    except Unreadable as error:
        problems.append(Problem(file, error.line, error.column, error.path, error.message))
        return None, problems


def decode(data: bytes) -> str:
    """Return the text of a file. Raises Unreadable for one that is too big, not UTF-8 or holds control characters."""
    if len(data) > MAX_BYTES:
        raise Unreadable(
            1, 1, f"the file is over {MAX_BYTES:,} bytes; a policy is small: put long lists of addresses into a set"
        )
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line, column = position(data[: error.start].decode("utf-8"))
        raise Unreadable(line, column, f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    control = CONTROL.search(text)
    if control:
        line, column = position(text[: control.start()])
        raise Unreadable(line, column, f"a control character (U+{ord(control.group()):04X}); take it out")
    return text


def position(before: str) -> tuple[int, int]:
    """Return the line and column of what follows the given text."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


class Composer:
    """Builds nodes from PyYAML's events. Not yaml.compose(): it overflows on nesting and joins duplicate keys."""

    def __init__(self, text: str, file: str, problems: list[Problem]) -> None:
        self._text = text
        self._file = file
        self._problems = problems
        self._events = self._parse()
        self._resolver = Resolver()
        self._count = 0

    def document(self) -> Node:
        """Return the root of the file's first document; a second one is a problem. Raises Unreadable."""
        root: Node | None = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent) and root:
                self._problem(event, "", "a second document begins; put each policy into a file of its own")
                break
            if isinstance(event, yaml.NodeEvent):
                root = self._node(event, "", 1)
        if root is None:
            raise Unreadable(1, 1, EMPTY)
        return root

    def _parse(self) -> Iterator[yaml.Event]:
        try:
            yield from yaml.parse(self._text, Loader=Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            raise Unreadable(line, column, self._syntax(line, column, error)) from None
        except yaml.YAMLError as error:
            raise Unreadable(1, 1, f"not YAML ({error}); save the file as plain UTF-8 text") from None

    def _syntax(self, line: int, column: int, error: yaml.MarkedYAMLError) -> str:
        lines = self._text.split("\n")
        if line <= len(lines) and lines[line - 1][column - 1 : column] == "\t":
            return "a tab; YAML indents with spaces, so put spaces in its place"
        what = f"{error.problem} {error.context}" if error.context else error.problem
        return f"not YAML ({what}); look for a missing bracket, quote, colon or space; [::1] needs quotes around ::1"

    def _problem(self, event: yaml.Event, path: str, message: str) -> None:
        self._problems.append(Problem(self._file, *place(event), path, message))

    def _broken(self, event: yaml.Event, path: str, message: str) -> Node:
        self._problem(event, path, message)
        return Node(*place(event), "", broken=True)

    def _node(self, event: yaml.Event, path: str, depth: int) -> Node:
        self._count += 1
        if self._count > MAX_VALUES:
            message = f"more than {MAX_VALUES:,} values; put long lists of addresses into a set"
            raise Unreadable(*place(event), message)
        if depth > MAX_DEPTH:
            raise Unreadable(*place(event), f"nested deeper than {MAX_DEPTH} levels; a policy needs six")
        if isinstance(event, yaml.AliasEvent):
            return self._broken(event, path, f"an alias (*{brief(str(event.anchor))}); write the value out")
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            if event.anchor is not None:
                self._problem(event, path, f"an anchor (&{brief(event.anchor)}); take it out, aliases are not read")
            if event.tag is not None and event.tag != CORE + "str":
                self._problem(event, path, f"a tag ({brief(event.tag)}); take it out")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(event, path, depth)
        return self._mapping(event, path, depth)

    def _sequence(self, event: yaml.Event, path: str, depth: int) -> Node:
        items: list[Node] = []
        while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(item, f"{path}[{len(items)}]", depth + 1))
        return Node(*place(event), items)

    def _mapping(self, event: yaml.Event, path: str, depth: int) -> Node:
        values: dict[str, Node] = {}
        keys: dict[str, tuple[int, int]] = {}
        while not isinstance(key := next(self._events), yaml.MappingEndEvent):
            name = key.value if isinstance(key, yaml.ScalarEvent) and usable(key.value) else None
            if name is None and not self._node(key, path, depth + 1).broken:  # reads it to its end, whatever it is
                self._problem(key, path, "a key that is not one word; write `key: value`")
            inner = join(path, name or "?")
            value = self._node(next(self._events), inner, depth + 1)
            if name in keys:
                self._problem(key, inner, f"the key is here twice (first on line {keys[name][0]}); take one out")
            elif name is not None:
                values[name], keys[name] = value, place(key)
        return Node(*place(event), values, keys=keys)

    def _scalar(self, event: yaml.ScalarEvent, path: str) -> Node:
        text = event.value
        resolved = self._resolver.resolve(yaml.ScalarNode, text, event.implicit)  # type: ignore[no-untyped-call]
        tag = event.tag or resolved
        if len(text) > MAX_WORD:
            return self._broken(event, path, f"a value of {len(text):,} characters; nothing in a policy is that long")
        if tag == CORE + "null":
            return self._broken(event, path, "there is no value; write one, or take the key out" if path else EMPTY)
        if tag == CORE + "int" and (not DECIMAL.fullmatch(text) or len(text) > MAX_DIGITS):
            return self._broken(event, path, odd_number(text))
        value: str | int | bool = text
        if tag == CORE + "int":
            value = int(text)
        elif tag == CORE + "bool":
            value = text.lower() in {"yes", "true", "on"}
        return Node(*place(event), value, text)


def usable(key: str) -> bool:
    """Return whether a key may stand in the path of a problem: it is no longer than a word, and shows as it is."""
    return len(key) <= MAX_WORD and key.isprintable()


def brief(text: str) -> str:
    """Return a word of a file for a message: as it is, or as Python writes it where it could harm a terminal, and cut."""
    if len(text) <= MAX_BRIEF:
        return text if text.isprintable() else repr(text)
    return f"{text[:MAX_BRIEF]!r} …"


def odd_number(text: str) -> str:
    """Say why YAML 1.1 does not read a number as a person would."""
    if ":" in text:
        return f"YAML reads {text} as one number in base 60; write a range with a hyphen, or put the text in quotes"
    if len(text) > MAX_DIGITS:
        return f"a number of {len(text)} digits; nothing in a policy is that large"
    return f"YAML does not read {text} as the decimal number that it looks like; write it in digits, with no 0 in front"


def place(event: yaml.Event) -> tuple[int, int]:
    """Return where an event begins, as line and column from 1."""
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def join(path: str, key: str) -> str:
    """Return the path of a key inside the mapping at ``path``."""
    return f"{path}.{key}" if path else key
