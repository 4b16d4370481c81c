"""The text of a policy file → Policy, or every Problem in it at once."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from agent.errors import WeirError
from agent.policy import overlap, sets, yamlfile
from agent.policy.compile import MAX_RULES
from agent.policy.document import Document, NameDestination, Part, RulePart, SelectorPart, SetDestination, SocketsPart
from agent.policy.model import BOTH_PROTOCOLS, Options, Policy, Prefix, Rule, Selector, Sockets
from agent.policy.overlap import Place
from agent.policy.structure import child, problem_at, structural, whole_lists
from agent.policy.yamlfile import Node, Problem, brief

P = TypeVar("P", bound=Part)

MAX_SHOWN = 100  # problems printed; a file with more is of another kind, and the first ones say so


class PolicyInvalid(WeirError):
    """A policy file that cannot be used. ``problems`` holds every one of them, in the order of the file."""

    def __init__(self, file: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        count = len(self.problems)
        shown = [str(problem) for problem in self.problems[:MAX_SHOWN]]
        if count > MAX_SHOWN:
            shown.append(f"… and {count - MAX_SHOWN} more")
        headline = f"{file} is not a usable policy: {count} problem{'s' if count > 1 else ''}"
        super().__init__(
            "\n".join([headline, *shown]), "Nothing was changed. policies/README.md describes every key of the format."
        )


def parse(text: str | bytes, path: str, resolvers: tuple[Prefix, ...], policies: Path = sets.POLICIES) -> Policy:
    """Read a policy. ``path`` is the file's name in problems, ``resolvers`` what the set of that name stands for.

    ``policies`` is the directory whose sets/ are used. Raises PolicyInvalid, and WeirError when a set cannot be read.
    """
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    root, problems = yamlfile.read(data, path)
    if root is None:
        raise PolicyInvalid(path, problems)

    def expand(name: str) -> tuple[Prefix, ...]:
        return resolvers if name == sets.RESOLVERS else sets.read(name, policies)

    context = {"sets": sets.names(policies)}
    document = None
    try:
        document = Document.model_validate(root.plain(), context=context)
    except ValidationError as error:
        problems += structural(error, root, path)
    problems += [problem_at(root, path, place, message) for place, message in semantic(root, context, expand)]
    if document is None or problems:
        raise PolicyInvalid(path, problems)
    return build(document, root, path, data, expand)


def build(
    document: Document, root: Node, path: str, data: bytes, expand: Callable[[str], tuple[Prefix, ...]]
) -> Policy:
    """Return the meaning of a document that has no problems."""
    spec = document.spec
    sockets = spec.sockets
    lines = lines_of(root)
    return Policy(
        name=document.metadata.name,
        mode=spec.mode,
        sockets=Sockets(
            families=frozenset(sockets.families),
            protocols=frozenset(sockets.protocols),
            listen=sockets.listen,
            bind=sockets.bind,
            transfer=sockets.transfer,
            idle_timeout=sockets.idle_timeout,
            options=Options(mock=sockets.options.mock, others=sockets.options.others),
        ),
        egress=tuple(build_rule(rule, lines[index], expand) for index, rule in enumerate(spec.egress)),
        default=spec.default,
        source=path,
        sha256=hashlib.sha256(data).hexdigest(),
        text=data.decode("utf-8"),
        selector=build_selector(spec.selector) if spec.selector else None,
    )


def build_selector(part: SelectorPart) -> Selector:
    """Return the meaning of a selector."""
    return Selector(
        namespaces=part.namespaces,
        pod_labels=tuple(part.pod_labels.items()),
        containers=part.containers,
        cgroups=part.cgroups,
    )


def build_rule(rule: RulePart, line: int, expand: Callable[[str], tuple[Prefix, ...]]) -> Rule:
    """Return the meaning of one rule, its sets expanded."""
    prefixes: dict[Prefix, None] = {}
    for item in rule.to:
        if isinstance(item, Prefix):
            prefixes[item] = None
        elif isinstance(item, SetDestination):
            prefixes.update(dict.fromkeys(expand(item.set_name)))
    return Rule(
        name=rule.name,
        action=rule.action,
        prefixes=tuple(prefixes) if rule.to else None,
        names=tuple(item.dns_name for item in rule.to if isinstance(item, NameDestination)),
        ports=rule.ports,
        protocols=frozenset([rule.protocol]) if rule.protocol else BOTH_PROTOCOLS,
        line=line,
    )


def rule_nodes(root: Node) -> list[Node]:
    """Return the nodes of spec.egress; [] when there is no such list."""
    node = child(child(root, "spec"), "egress")
    return node.value if node and isinstance(node.value, list) else []


def lines_of(root: Node) -> dict[int, int]:
    """Return the line on which each rule begins, by its index."""
    return {index: node.line for index, node in enumerate(rule_nodes(root))}


def semantic(
    root: Node, context: dict[str, Any], expand: Callable[[str], tuple[Prefix, ...]]
) -> Iterator[tuple[Place, str]]:
    """Yield what is wrong between values that are right each by itself, also in a file that has other problems."""
    yield from whole_lists(root)
    nodes = rule_nodes(root)
    first_line: dict[str, int] = {}
    for index, node in enumerate(nodes):
        name = child(node, "name")
        if name and isinstance(name.value, str) and not name.broken:
            if name.value in first_line:
                message = (
                    f"line {first_line[name.value]} has a rule called {brief(name.value)}; give each rule its own name"
                )
                yield ("spec", "egress", index, "name"), message
            first_line.setdefault(name.value, name.line)
    if len(nodes) > MAX_RULES:  # what follows has a bit for each rule in the set of each of their values
        return

    rules = {index: rule for index, node in enumerate(nodes) if (rule := valid(RulePart, node, context))}
    sockets = valid(SocketsPart, child(child(root, "spec"), "sockets"), context) or SocketsPart()
    for index, rule in rules.items():
        if rule.protocol and rule.protocol not in sockets.protocols:
            message = f"spec.sockets.protocols lacks {rule.protocol.value}, so this rule can never match; take it out"
            yield ("spec", "egress", index, "protocol"), message
    yield from overlap.problems(rules, lines_of(root), expand)


def valid(kind: type[P], node: Node | None, context: dict[str, Any]) -> P | None:
    """Return the part of the file as its type, None when it is missing or has problems of its own."""
    try:
        return kind.model_validate(node.plain(), context=context) if node else None
    except ValidationError:
        return None
