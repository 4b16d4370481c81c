"""The cgroups that the agent enrols, from what is found in the tree and what the CRI says of it; pure.

A managed parent is under the default policy, a pod's cgroup under the policy of the pod's next container, a container
under its own. So a container starts under its own policy when the pod's sandbox was seen before it, which the CRI's order
of calls makes the rule, and under the default in any case.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from agent.cgroups.containers import CRI_RUNTIMES, Identity, Kind, identify
from agent.kernel.abi import LABELS
from agent.node.choose import Choice, Facts, Why, choose, choose_for_pod
from agent.policy.model import Selector


@dataclass(frozen=True, slots=True)
class Names:
    """What Kubernetes calls it; None is what nobody has said yet."""

    namespace: str | None = None
    pod: str | None = None
    container: str | None = None
    labels: Mapping[str, str] | None = None
    annotations: Mapping[str, str] | None = None


class Namer(Protocol):
    """Who knows names: the newest answer of the CRI."""

    @property
    def answer(self) -> object:
        """Equal as long as nothing is known anew."""

    def container(self, container_id: str) -> Names | None:
        """The names of a container, None while they are not known."""

    def pod(self, pod_uid: str) -> Names | None:
        """The names of a pod; its ``container`` is None."""


@dataclass(frozen=True, slots=True)
class Member:
    """``kind`` is None for a managed parent. ``named`` is false while the CRI may still say more."""

    path: PurePosixPath
    cgroup: int
    identity: Identity | None
    names: Names
    choice: Choice
    named: bool = True

    @property
    def is_parent(self) -> bool:
        """Whether cgroups born below it get entries of their own."""
        return self.identity is None or self.identity.kind is Kind.POD

    @property
    def label(self) -> str:
        """What a later agent, or `weir status` without one, wants to know of it, in JSON.

        ASCII, since a cgroup's name can be any bytes.
        """
        known = {
            "cgroup": f"/{self.path}",
            "namespace": self.names.namespace or "",
            "pod": self.names.pod or "",
            "container": self.names.container or "",
            "id": self.identity.id if self.identity else "",
            "runtime": self.identity.runtime if self.identity else "",
        }
        text = json.dumps(known)
        while len(text) >= LABELS:  # a path can have 4,096 bytes; its end tells more than its beginning
            longest = max(known, key=lambda key: len(json.dumps(known[key])))
            known[longest] = "…" + known[longest][len(known[longest]) // 4 + 1 :]
            text = json.dumps(known)
        return text


def members(
    found: Mapping[PurePosixPath, int],
    root: PurePosixPath,
    namer: Namer,
    policies: Sequence[tuple[str, Selector | None]],
    default: str,
    known: Mapping[int, Member],
    *,
    settled: bool = False,
) -> Iterator[Member]:
    """The members below one managed parent, itself included. ``found``: path below the mount → cgroup id.

    ``known`` are those of the last look, by cgroup id: what has not changed is taken from there, as the same object.
    ``settled``: names and policies are as they were then, so that only what is new, or has no name yet, is looked at.
    """
    for path, cgroup in found.items():
        before = known.get(cgroup)
        if before is not None and before.path != path:
            before = None
        if settled and before is not None and before.named:
            yield before
            continue
        if path == root:
            parent = Member(path, cgroup, None, Names(), Choice(default, Why.DEFAULT))
            yield before if before == parent else parent
            continue
        identity = before.identity if before else _identity(path, root)
        if identity is None:
            continue
        names, named = names_of(identity, namer)
        facts = Facts(f"/{path}", names.namespace, names.container, names.labels, names.annotations)
        choice = (choose_for_pod if identity.kind is Kind.POD else choose)(facts, policies, default)
        member = Member(before.path if before else path, cgroup, identity, names, choice, named)
        yield before if before == member else member


def _identity(path: PurePosixPath, root: PurePosixPath) -> Identity | None:
    """What a cgroup is; None for what is no member."""
    seen = identify(path, root)
    return seen.identity if seen and seen.path == path and seen.identity.kind is not Kind.STRUCTURE else None


def names_of(identity: Identity, namer: Namer) -> tuple[Names, bool]:
    """The names of a cgroup, and whether they are all that there will be."""
    if identity.kind is Kind.POD:
        pod = namer.pod(identity.pod_uid)
        return pod or Names(), pod is not None
    if identity.kind is Kind.CGROUP or identity.runtime not in CRI_RUNTIMES:
        return Names(), True
    names = namer.container(identity.id)
    if names:
        return names, True
    return (namer.pod(identity.pod_uid) if identity.pod_uid else None) or Names(), False
