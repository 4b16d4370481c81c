"""weir policy …: what is printed, and that failures are WeirErrors with a hint."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from agent.errors import WeirError
from agent.policy.document import schema
from agent.verbs.policy import policy

DATA = Path(__file__).parent / "data"
GOOD = "apiVersion: weir.dev/v1\nkind: SocketPolicy\nmetadata: {name: good}\nspec: {default: deny}\n"


def weir(*arguments: object) -> Result:
    return CliRunner().invoke(policy, [str(argument) for argument in arguments], prog_name="weir policy")


def printed(*arguments: object) -> str:
    result = weir(*arguments)
    assert result.exit_code == 0, result.output
    assert result.exception is None
    return result.stdout


def failure(*arguments: object) -> WeirError:
    error = weir(*arguments).exception
    assert isinstance(error, WeirError)
    assert error.hint
    return error


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    return file


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    file = tmp_path / "bad.yaml"
    file.write_text(GOOD.replace("deny", "dny").replace("spec: {", "spec: {mod: audit, "))
    return file


@pytest.mark.parametrize("name", [[], *([name] for name in policy.commands)])
def test_help_has_an_example(name: list[str]) -> None:
    text = " ".join(printed(*name, "--help").split())
    assert "Example: weir policy " in text


def test_the_example_of_each_help_is_a_command_that_exists() -> None:
    for command in [policy, *policy.commands.values()]:
        words = (command.epilog or "").split("weir policy ")[1].split()
        assert isinstance(policy.get_command(click.Context(policy), words[0]), click.Command)


def test_check_good(good: Path) -> None:
    lines = printed("check", good, "audit").splitlines()
    assert lines[0] == f"{good}: good: 0 rules, {lines[0].split(', ')[1].split()[0]} table entries: ok"
    assert any(line.startswith("  note: Socket options") for line in lines)
    assert any("audit.yaml: audit: 9 rules" in line for line in lines)


def test_check_names_every_problem_of_every_file(good: Path, bad: Path) -> None:
    result = weir("check", bad, good, "nosuch", "/nowhere/x.yaml")
    assert isinstance(result.exception, WeirError)
    assert f"{good}: good" in result.stdout
    message = result.exception.message.splitlines()
    assert message[0] == f"{bad} is not a usable policy: 2 problems"
    assert message[1].startswith(f"{bad}:4:8: spec.mod: there is no such key; did you mean mode?")
    assert message[2].startswith(f"{bad}:4:29: spec.default: 'dny' is not possible here")
    assert message[3] == "there is no policy called 'nosuch'"
    assert message[4] == "the policy /nowhere/x.yaml cannot be read: No such file or directory"


def test_check_finds_what_only_the_compiler_sees(tmp_path: Path) -> None:
    ports = ", ".join(str(port) for port in range(1, 400, 2))
    file = tmp_path / "wide.yaml"
    file.write_text(GOOD.replace("{default", f"{{egress: [{{name: a, action: deny, ports: [{ports}]}}], default"))
    assert "the limit is 128" in failure("check", file).message


def test_show() -> None:
    lines = printed("show", "untrusted").splitlines()
    assert lines[0].startswith("policy   untrusted (")
    assert "  line  rule         action  protocol  ports            to" in lines
    assert any(line.split()[1:] == ["https", "allow", "tcp", "443", "any"] for line in lines)
    assert any(line.split()[1:] == ["private", "deny", "any", "any", "8", "prefixes"] for line in lines)
    assert any(line.split() == ["default", "deny", "any", "any", "any"] for line in lines)


def test_show_says_which_containers_it_is_for(good: Path) -> None:
    assert "selects  no container by itself: by annotation, by --policy, or as the default" in printed("show", good)
    assert json.loads(printed("show", good, "--json"))["selector"] is None
    good.write_text(
        GOOD.replace(
            "{default", "{selector: {namespaces: [a, b-*], podLabels: {app: web, tier: ''}, cgroups: [x/*]}, default"
        )
    )
    assert "selects  namespace a or b-*; pod label app=web and tier=; cgroup x/*\n" in printed("show", good)
    assert json.loads(printed("show", good, "--json"))["selector"] == {
        "namespaces": ["a", "b-*"], "podLabels": {"app": "web", "tier": ""}, "containers": [], "cgroups": ["x/*"],
    }  # fmt: skip


def test_show_json() -> None:
    shown = json.loads(printed("show", "appengine", "--json"))
    assert (shown["name"], shown["mode"], shown["default"]) == ("appengine", "enforce", "allow")
    assert shown["sockets"]["idleTimeoutSeconds"] == 600
    rules = {rule["name"]: rule for rule in shown["egress"]}
    assert rules["smtp"]["prefixes"] is None
    assert rules["gmail-pop"] == {
        "name": "gmail-pop", "line": rules["gmail-pop"]["line"], "action": "allow", "prefixes": [],
        "names": ["pop.gmail.com"], "ports": ["995"], "protocols": ["tcp"],
    }  # fmt: skip
    assert len(rules["google"]["prefixes"]) == 401
    assert len(shown["notInForce"]) == 4


def test_explain() -> None:
    text = printed("explain", "--policy", "appengine", "tcp", "10.0.0.1", "443")
    assert "by rule private (" in text.splitlines()[0]
    assert text.count("    no  ") == 7


def test_explain_with_a_name_in_json() -> None:
    arguments = ["explain", "--policy", "appengine", "tcp", "142.250.0.1", "993", "--name", "IMAP.gmail.com.", "--json"]
    shown = json.loads(printed(*arguments))
    assert (shown["action"], shown["rule"], shown["byAddress"]["rule"]) == ("allow", "gmail-imap", "google")


def test_explain_does_not_look_up_names() -> None:
    error = failure("explain", "--policy", "appengine", "tcp", "smtp.gmail.com", "465")
    assert error.message.startswith("'smtp.gmail.com' is no IPv4 or IPv6 address")
    assert "--name" in error.hint


@pytest.mark.parametrize("arguments", [["icmp", "10.0.0.1", "1"], ["tcp", "10.0.0.1", "65536"], ["tcp", "10.0.0.1"]])
def test_explain_refuses_what_is_no_flow(arguments: list[str]) -> None:
    assert weir("explain", "--policy", "appengine", *arguments).exit_code == 2


def test_schema() -> None:
    assert json.loads(printed("schema")) == schema()


def test_refresh_set(tmp_path: Path) -> None:
    output = tmp_path / "google.txt"
    text = printed("refresh-set", "google", DATA / "goog.json", DATA / "cloud.json", "--output", output)
    assert text == f"{output}: 401 prefixes, no address changed\n"
    assert output.read_text().startswith("# Google's own addresses")


def test_refresh_set_prints_what_changed(tmp_path: Path) -> None:
    goog = tmp_path / "goog.json"
    content = json.loads((DATA / "goog.json").read_text())
    content["prefixes"] = [*content["prefixes"][1:], {"ipv4Prefix": "93.184.216.0/24"}]
    goog.write_text(json.dumps(content))
    text = printed("refresh-set", "google", goog, DATA / "cloud.json", "--output", tmp_path / "out.txt")
    assert text.splitlines()[:2] == ["+ 93.184.216.0/24", "- 8.8.4.0/24"]
    assert text.endswith("401 prefixes, 256 IPv4 addresses came, 256 went\n")


def test_refresh_set_leaves_the_file_alone_when_the_input_is_wrong(tmp_path: Path) -> None:
    output = tmp_path / "google.txt"
    output.write_text("as it was")
    error = failure("refresh-set", "google", DATA / "cloud.json", DATA / "goog.json", "--output", output)
    assert "is none of goog.json's" in error.message
    assert output.read_text() == "as it was"
