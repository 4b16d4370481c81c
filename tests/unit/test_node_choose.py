"""Which policy a container gets: annotation, first selector that matches, default; and what counts before names are known."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.node.choose import ANNOTATION, Choice, Facts, Why, choose, choose_for_pod, selects
from agent.policy.model import Selector
from tests.policies import CGROUPS, CONTAINERS, LABELS, NAMESPACES, selectors

POD = "kubepods.slice/kubepods-pod1.slice"
PHP = Facts(f"{POD}/cri-containerd-1.scope", "shop", "php", {"app": "web", "tier": ""}, {"other": "x"})
UNKNOWN = Facts(PHP.cgroup)


@pytest.mark.parametrize(
    ("selector", "holds"),
    [
        (Selector(namespaces=("shop",)), True),
        (Selector(namespaces=("sho",)), False),
        (Selector(namespaces=("team-*", "sh*")), True),
        (Selector(namespaces=("Shop",)), False),
        (Selector(pod_labels=(("app", "web"),)), True),
        (Selector(pod_labels=(("app", "w?b"), ("tier", ""))), True),
        (Selector(pod_labels=(("app", "web"), ("tier", "x"))), False),
        (Selector(pod_labels=(("app", ""),)), False),
        (Selector(pod_labels=(("tier", "*"),)), True),
        (Selector(pod_labels=(("absent", "*"),)), False),
        (Selector(pod_labels=(("absent", ""),)), False),
        (Selector(containers=("php",)), True),
        (Selector(containers=("php-*",)), False),
        (Selector(cgroups=("kubepods*",)), True),
        (Selector(cgroups=("cri-containerd-1.scope",)), False),
        (Selector(cgroups=("*/cri-containerd-1.scope",)), True),
        (Selector(("shop",), (("app", "web"),), ("php",), ("kubepods*",)), True),
        (Selector(("team-a",), (("app", "web"),), ("php",), ("kubepods*",)), False),
        (Selector(("shop",), (("app", "db"),), ("php",), ("kubepods*",)), False),
        (Selector(("shop",), (("app", "web"),), ("db",), ("kubepods*",)), False),
        (Selector(("shop",), (("app", "web"),), ("php",), ("system*",)), False),
    ],
)
def test_selects(selector: Selector, holds: bool) -> None:
    assert selects(selector, PHP) is holds


EVERYTHING = Selector(cgroups=("*",))
POLICIES = [
    ("strict", None),
    ("shop", Selector(namespaces=("shop",))),
    ("web", Selector(pod_labels=(("app", "web"),))),
    ("php", Selector(containers=("php",))),
    ("rest", EVERYTHING),
]


def test_the_first_in_file_order_wins() -> None:
    assert choose(PHP, POLICIES, "strict") == Choice("shop", Why.SELECTOR)
    assert choose(PHP, [*reversed(POLICIES)], "strict") == Choice("rest", Why.SELECTOR)
    assert choose(replace(PHP, namespace="x"), POLICIES, "strict") == Choice("web", Why.SELECTOR)
    assert choose(replace(PHP, namespace="x", labels={}), POLICIES, "strict") == Choice("php", Why.SELECTOR)


def test_nothing_matches() -> None:
    assert choose(replace(PHP, namespace="x", labels={}), POLICIES[:3], "strict") == Choice("strict", Why.DEFAULT)
    assert choose(PHP, [], "appengine") == Choice("appengine", Why.DEFAULT)


def annotated(value: str) -> Facts:
    return replace(PHP, annotations={ANNOTATION: value})


def test_the_annotation_comes_first() -> None:
    assert choose(annotated("rest"), POLICIES, "strict") == Choice("rest", Why.ANNOTATION)
    assert choose(annotated("strict"), POLICIES, "appengine") == Choice("strict", Why.ANNOTATION)
    assert choose(annotated("appengine"), POLICIES, "appengine") == Choice("appengine", Why.ANNOTATION)


@pytest.mark.parametrize("value", ["stricter", "", " strict", "Strict", "strict\n", "../strict", "weir.dev/policy"])
def test_an_annotation_that_names_no_policy_leaves_the_default(value: str) -> None:
    """And not the policy that a selector would give, which the annotation meant to leave."""
    choice = choose(annotated(value), POLICIES, "appengine")
    assert (choice.policy, choice.why) == ("appengine", Why.DEFAULT)
    assert choice.problem == (
        f"weir.dev/policy names {value!r}, and there is no such policy (strict, shop, web, php, rest, appengine); "
        "appengine, the default, is in force."
    )


def test_a_problem_is_a_line_of_bounded_length() -> None:
    many = [(f"policy-{n}", None) for n in range(200)]
    problem = choose(annotated("\n" * 262_144), many, "policy-7").problem
    assert len(problem) < 700
    assert "\n" not in problem
    assert "policy-19 and 180 more)" in problem


def test_unknown_names_match_cgroups_only() -> None:
    assert choose(UNKNOWN, POLICIES, "strict") == Choice("rest", Why.SELECTOR)
    both = [("both", Selector(namespaces=("*",), cgroups=("*",)))]
    assert choose(UNKNOWN, both, "strict") == Choice("strict", Why.DEFAULT)
    for part in (
        Selector(namespaces=("*",)),
        Selector(pod_labels=(("app", "*"),)),
        Selector(containers=("*",)),
    ):
        assert choose(UNKNOWN, [("any", part)], "strict") == Choice("strict", Why.DEFAULT)


def test_a_pod_gets_what_needs_no_container() -> None:
    pod = Facts(POD, "shop", None, {"app": "web"}, {})
    assert choose_for_pod(pod, POLICIES, "strict") == Choice("shop", Why.SELECTOR)
    assert choose_for_pod(replace(pod, container="php"), POLICIES[3:4], "strict") == Choice("strict", Why.DEFAULT)
    narrow = [("narrow", Selector(namespaces=("shop",), containers=("*",)))]
    assert choose_for_pod(pod, narrow, "strict") == Choice("strict", Why.DEFAULT)
    asked = replace(pod, annotations={ANNOTATION: "php"})
    assert choose_for_pod(asked, POLICIES, "strict") == Choice("php", Why.ANNOTATION)


facts = st.builds(
    Facts,
    cgroup=st.sampled_from(CGROUPS),
    namespace=st.none() | st.sampled_from(NAMESPACES),
    container=st.none() | st.sampled_from(CONTAINERS),
    labels=st.none() | st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in LABELS.items()}),
    annotations=st.none() | st.just({}) | st.sampled_from(["p0", "p2", "px"]).map(lambda name: {ANNOTATION: name}),
)


@given(facts, st.lists(st.none() | selectors(), max_size=4))
def test_the_choice_exists_and_more_knowledge_never_takes_a_match_away(known: Facts, listed: list[Selector]) -> None:
    policies = [(f"p{index}", selector) for index, selector in enumerate(listed)]
    choice = choose(known, policies, "fallback")
    assert choice.policy in {"fallback", *(name for name, _ in policies)}
    assert bool(choice.problem) <= (choice.policy == "fallback")
    less = replace(known, namespace=None, container=None, labels=None)
    for _, selector in policies:
        if selector and selects(selector, less):
            assert selects(selector, known)
            assert selector == Selector(cgroups=selector.cgroups)
        if selector:
            alone = [selects(replace(Selector(), **{part: getattr(selector, part)}), known) for part in vars(selector)]
            assert selects(selector, known) == all(alone)


def test_choosing_needs_no_yaml() -> None:
    """The agent stays within its memory: pydantic and PyYAML are the child's."""
    code = "import sys, agent.node.choose; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "agent.policy.globs" in loaded
    assert not [name for name in loaded if name.startswith(("pydantic", "yaml"))]
