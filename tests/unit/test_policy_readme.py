"""policies/README.md says what the code does: its examples are run, its tables are complete."""

import re

import pytest
from click.testing import CliRunner

from agent.policy import sets
from agent.policy.find import shipped
from agent.policy.model import Prefix
from agent.policy.parse import parse
from agent.policy.structure import KEYS
from agent.verbs.policy import policy

README = (sets.POLICIES / "README.md").read_text("utf-8")
HEAD = "apiVersion: weir.dev/v1\nkind: SocketPolicy\nmetadata: {name: example}\nspec:\n"
BLOCKS = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("text", BLOCKS)
def test_every_example_is_a_policy(text: str) -> None:
    whole = text if text.startswith("apiVersion") else HEAD + "".join(f"  {line}\n" for line in text.splitlines())
    parse(whole, "README.md", (Prefix.parse("10.96.0.10"),))


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 3


def test_the_explanation_is_what_weir_prints() -> None:
    shown = re.search(r"\$ weir policy (explain .*)\n((?:.*\n)*?)```", README)
    assert shown is not None
    result = CliRunner().invoke(policy, shown[1].split())
    assert result.stdout.replace(str(sets.POLICIES), "/opt/weir/policies") == shown[2]


def test_every_key_set_and_policy_is_described() -> None:
    cells = set(re.findall(r"`([A-Za-z0-9.-]+)`", README))
    leaves = {key for keys in KEYS.values() for key in keys} - {"spec", "metadata", "sockets", "options", "egress"}
    described = {word.rpartition(".")[2] for word in cells}
    assert leaves <= described | {"set"}  # {set: NAME} stands in an example of `to`
    assert set(sets.names()) <= cells
    assert set(shipped()) <= cells
