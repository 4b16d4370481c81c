"""Which policy a container gets: its pod's annotation, else the first selector that matches, else the default. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from agent.policy import globs
from agent.policy.model import Selector

ANNOTATION = "weir.dev/policy"

MAX_NAMED = 20  # policies that a problem lists; more are counted
MAX_SHOWN = 63  # characters of a wrong annotation; no policy's name is longer


class Why(str, Enum):
    """What the choice was made by."""

    ANNOTATION = "annotation"
    SELECTOR = "selector"
    DEFAULT = "default"


@dataclass(frozen=True)
class Facts:
    """What is known of a container. ``cgroup`` is its path below the cgroup2 mount; None is what nobody has said yet.

    A container that Kubernetes did not make has the names that its runtime gives, or none.
    """

    cgroup: str
    namespace: str | None = None
    container: str | None = None
    labels: Mapping[str, str] | None = None
    annotations: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy by its name. ``problem`` is a sentence when it is not the one that the annotation asks for."""

    policy: str
    why: Why
    problem: str = ""


def choose(facts: Facts, policies: Sequence[tuple[str, Selector | None]], default: str) -> Choice:
    """Return the policy of a container. ``policies`` are those there are, in file order.

    A selector that asks for something not known yet does not match; it may when the question is put again.
    """
    asked = (facts.annotations or {}).get(ANNOTATION)
    if asked is not None:
        names = [name for name, _ in policies]
        if asked == default or asked in names:
            return Choice(asked, Why.ANNOTATION)
        return Choice(default, Why.DEFAULT, unknown(asked, dict.fromkeys([*names, default]), default))
    for name, selector in policies:
        if selector and selects(selector, facts):
            return Choice(name, Why.SELECTOR)
    return Choice(default, Why.DEFAULT)


def choose_for_pod(facts: Facts, policies: Sequence[tuple[str, Selector | None]], default: str) -> Choice:
    """Return the policy of a pod's own cgroup, whose path is in ``facts``: what its next container starts under.

    No selector matches that asks for a container's name, whatever name the facts have.
    """
    return choose(replace(facts, container=None), policies, default)


def selects(selector: Selector, facts: Facts) -> bool:
    """Return whether every part of the selector that is not empty matches."""
    labels = facts.labels or {}
    return (
        fits(selector.namespaces, facts.namespace)
        and all(key in labels and globs.matches(glob, labels[key]) for key, glob in selector.pod_labels)
        and fits(selector.containers, facts.container)
        and fits(selector.cgroups, facts.cgroup)
    )


def fits(wanted: Sequence[str], text: str | None) -> bool:
    """Return whether one of the globs matches, or there is none. Text that is not known matches no glob."""
    return not wanted or (text is not None and any(globs.matches(glob, text) for glob in wanted))


def unknown(asked: str, names: Mapping[str, None], default: str) -> str:
    """Say that an annotation names no policy, what is in force, and what could have been named."""
    written = repr(asked if len(asked) <= MAX_SHOWN else asked[:MAX_SHOWN] + "…")
    listed = ", ".join([*names][:MAX_NAMED])
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{ANNOTATION} names {written}, and there is no such policy ({listed}{more}); {default}, the default, is in force."
