"""The JSON Schema: it comes from the types that check a policy, so it knows every key and value."""

import json
import re
from collections.abc import Iterator
from typing import Any

from agent.policy.document import APP_ENGINE_MOCKED, schema
from agent.policy.structure import KEYS


def objects(node: object) -> Iterator[dict[str, Any]]:
    """Yield every JSON object inside a schema."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from objects(value)
    if isinstance(node, list):
        for value in node:
            yield from objects(value)


def test_unknown_keys_are_refused_everywhere() -> None:
    mappings = [node for node in objects(schema()) if node.get("type") == "object"]
    assert len(mappings) == 10
    assert all(node["additionalProperties"] is False for node in mappings)


def test_a_selector_needs_a_key() -> None:
    selector = schema()["$defs"]["SelectorPart"]
    assert selector["minProperties"] == 1
    assert all(part.get("minItems", part.get("minProperties")) == 1 for part in selector["properties"].values())


def test_the_schema_knows_the_keys_of_the_format() -> None:
    properties: set[str] = set()
    for node in objects(schema()):
        if isinstance(node.get("properties"), dict):
            properties |= node["properties"].keys()
    assert properties == {key for keys in KEYS.values() for key in keys}


def test_null_is_nowhere() -> None:
    """A key without a value is an error, so the schema must not offer it."""
    assert "null" not in json.dumps(schema())


def test_required_keys() -> None:
    whole = schema()
    assert whole["required"] == ["apiVersion", "kind", "metadata", "spec"]
    assert whole["$defs"]["RulePart"]["required"] == ["name", "action"]
    assert "required" not in whole["$defs"]["SpecPart"]


def test_patterns_are_anchored_and_work() -> None:
    patterns = {str(node["pattern"]) for node in objects(schema()) if "pattern" in node}
    patterns |= {pattern for node in objects(schema()) for pattern in node.get("patternProperties", {})}
    assert all(pattern.startswith("^(") and pattern.endswith(")$") for pattern in patterns)
    for word in ("google-dns", "smtp.gmail.com", "8000-8099", "10m", "app.kubernetes.io/name", *APP_ENGINE_MOCKED):
        assert any(re.search(pattern, word) for pattern in patterns), word
    assert not any(re.search(pattern, "No Such Thing!") for pattern in patterns)
