"""What pydantic finds wrong with a policy file, as Problems: where it is, what it is, and what to do."""

import difflib
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from agent.policy.compile import MAX_RULES
from agent.policy.document import MAX_GLOBS, Document
from agent.policy.overlap import Place
from agent.policy.yamlfile import Node, Problem, brief, join


def child(node: Node | None, key: str) -> Node | None:
    """Return the value of a key; None when there is no such mapping or key."""
    return node.value.get(key) if node and isinstance(node.value, dict) else None


def locate(root: Node, place: Place) -> tuple[str, Node, Node | None]:
    """Follow keys and indexes as far as the file has them.

    Return the whole path as people write it, the last node that is there, and the node itself if it is.
    """
    path, node, found = "", root, True
    for step in place:
        path = f"{path}[{step}]" if isinstance(step, int) else join(path, step)
        inner = None
        if isinstance(step, int):
            inner = node.value[step] if isinstance(node.value, list) and step < len(node.value) else None
        elif isinstance(node.value, dict):
            inner = node.value.get(step)
        found = found and inner is not None
        node = inner if found and inner else node
    return path, node, node if found else None


def problem_at(root: Node, file: str, place: Place, message: str) -> Problem:
    """Return a problem with the position of the value at ``place``, or of what is there of the way to it."""
    path, nearest, _ = locate(root, place)
    return Problem(file, nearest.line, nearest.column, path, message)


def structural(error: ValidationError, root: Node, file: str) -> Iterator[Problem]:
    """Yield a problem for each of pydantic's findings but those about nodes that are reported already."""
    for detail in error.errors(include_url=False):
        place = without_tag(detail["loc"])
        about_key = place[-1:] == (KEY,)
        place = place[:-1] if about_key else place
        path, nearest, node = locate(root, place)
        if node and node.broken and not about_key:
            continue
        if detail["type"] == "too_short" and node and node.value:
            continue  # pydantic counts the items that are right; those that are wrong have problems of their own
        if detail["type"] == "too_long":
            continue  # whole_lists() says so, also of a list with wrong items
        message = wording(detail, path, node)
        line, column = nearest.line, nearest.column
        if about_key or detail["type"] == "extra_forbidden":
            *parents, key = place
            parent, mapping, _ = locate(root, tuple(parents))
            line, column = mapping.keys[str(key)]
            message = message if about_key else unknown_key(parent, str(key))
        yield Problem(file, line, column, path, message)


LIMITS: dict[Place, int] = {
    ("spec", "egress"): MAX_RULES,
    ("spec", "selector", "namespaces"): MAX_GLOBS,
    ("spec", "selector", "podLabels"): MAX_GLOBS,
    ("spec", "selector", "containers"): MAX_GLOBS,
    ("spec", "selector", "cgroups"): MAX_GLOBS,
}
WITHOUT_REPEATS: tuple[Place, ...] = (
    ("spec", "sockets", "families"),
    ("spec", "sockets", "protocols"),
    ("spec", "sockets", "options", "mock"),
    ("spec", "selector", "namespaces"),
    ("spec", "selector", "containers"),
    ("spec", "selector", "cgroups"),
)


def whole_lists(root: Node) -> Iterator[tuple[Place, str]]:
    """Yield where a list is too long or has a word twice: pydantic would look only when each item is right."""
    for place, limit in LIMITS.items():
        node = locate(root, place)[2]
        count = len(node.value) if node and isinstance(node.value, (list, dict)) else 0
        if count > limit:
            yield place, f"{count} items; the limit is {limit}, so join some"
    for place in WITHOUT_REPEATS:
        node = locate(root, place)[2]
        seen = set()
        for index, item in enumerate(node.value if node and isinstance(node.value, list) else []):
            if isinstance(item.value, str) and not item.broken:
                if item.value in seen:
                    yield (*place, index), f"{brief(item.value)} is listed twice; take one out"
                seen.add(item.value)


KEY = "[key]"
"""What pydantic puts behind the place of a value when the key itself is wrong."""


def without_tag(place: Place) -> Place:
    """Return pydantic's place without the tag of the union that it puts in behind an item of `to`."""
    in_to = place[:2] == ("spec", "egress") and place[3:4] == ("to",)
    return place[:5] + place[6:] if in_to else place


WORDING = {
    "model_type": "{written} stands where keys and values belong; write `key: value`",
    "dict_type": "{written} stands where keys and values belong; write `key: value`",
    "tuple_type": "{written} stands where a list belongs; put it between [ and ]",
    "string_type": "{written} stands where text belongs; write it as one word, in quotes if it is a number",
    "too_short": "the {kind} is empty; put something in it, or take the key out",
    "union_tag_not_found": "{written} is no destination; write an address in quotes, {{set: NAME}} or {{name: NAME}}",
    "value_error": "{error}",
    "enum": "{written} is not possible here; write {expected}",
    "literal_error": "{written} is not possible here; write {expected}",
}
"""What to say for each type of pydantic's errors; the fields are its context and ``written``."""


def wording(detail: ErrorDetails, path: str, node: Node | None) -> str:
    """Say what is wrong, and what to do."""
    if detail["type"] == "missing":
        return f"the key is missing; add `{path.rpartition('.')[2]}:` and its value"
    context: dict[str, Any] = {
        "written": described(node),
        "kind": described(node).partition(" ")[2],
        **detail.get("ctx", {}),
    }
    if "expected" in context:
        context["expected"] = context["expected"].replace("'", "")
    if node and isinstance(node.value, bool):
        remedy = f"write {context['expected']}" if "expected" in context else "if you mean the word, put it in quotes"
        return f"YAML reads {context['written']} as {str(node.value).lower()}; {remedy}"
    if detail["type"] in WORDING:
        return WORDING[detail["type"]].format_map(context)
    return f"{context['written']}: {detail['msg']}; policies/README.md says what belongs here"


def described(node: Node | None) -> str:
    """Return a value as an error message names it."""
    if node is None:
        return "nothing"
    if isinstance(node.value, (list, dict)):
        return "a list" if isinstance(node.value, list) else "a mapping"
    return repr(node.text)


def known_keys(model: type[BaseModel] = Document, path: str = "") -> dict[str, tuple[str, ...]]:
    """Return the keys of each mapping of the format by its path, with [] for an index."""
    keys: dict[str, tuple[str, ...]] = {path: tuple(field.alias or name for name, field in model.model_fields.items())}
    for name, field in model.model_fields.items():
        inner = join(path, field.alias or name)
        for part, suffix in parts_of(field.annotation, ""):
            for where, names in known_keys(part, inner + suffix).items():
                keys[where] = keys.get(where, ()) + names
    return keys


def parts_of(annotation: object, suffix: str) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the models that a field's type leads to, with [] for each list on the way."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, suffix
    inner = suffix + "[]" if getattr(annotation, "__origin__", None) is tuple else suffix
    for argument in get_args(annotation):
        yield from parts_of(argument, inner)


KEYS = known_keys()


def unknown_key(parent: str, key: str) -> str:
    """Say which keys could have been meant inside the mapping at a path."""
    known = KEYS.get(re.sub(r"\[\d+\]", "[]", parent), ())
    if key in known:
        return f"{key} cannot stand beside the other key; make each an item of its own"
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}? The keys here are" if close else "take it out; the keys here are"
    return f"there is no such key; {hint} {', '.join(known)}"
