"""Profiles for containers: what they answer against weir's own rules, and against the base that they were merged onto."""

from __future__ import annotations

import json
from dataclasses import replace
from errno import EACCES, EINVAL, ENOSYS, EPERM
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from agent.errors import WeirError
from agent.policy import find
from agent.policy.model import Action, Bind, Family, Protocol, Sockets
from agent.seccomp import base, oci
from agent.seccomp.merge import merge
from agent.seccomp.rules import Deny, rules
from agent.verbs.seccomp_profile import seccomp_profile
from tests import need
from tests.seccomp_expected import APPENGINE
from tests.seccomp_oci import ALLOWED, verdicts

DEBIAN = Path("/usr/share/containers/seccomp.json")
MACHINE = oci.MACHINES["x86_64"]
Json = dict[str, Any]

policies = st.builds(
    replace,
    st.just(APPENGINE),
    families=st.frozensets(st.sampled_from(Family)),
    protocols=st.frozensets(st.sampled_from(Protocol)),
    listen=st.sampled_from(Action),
    bind=st.sampled_from(Bind),
)
CALLS = sorted({rule.call for rule in rules(APPENGINE)} | {"read", "clone", "personality", "chroot", "unknown"})
# Values near those that matter, with and without something above the 32 bits that the kernel reads.
near = st.sampled_from(
    [*range(12), 15, 16, 17, 37, 38, 39, 40, 41, 58, 115, 132, 136, 255, 256, 262, 0x80001, 0x7E020000]
)
values = near | near.map(lambda value: 1 << 32 | value) | st.integers(0, 2**64 - 1)
arguments = st.tuples(values, values, values, values, values, values)
ops = st.sampled_from(["NE", "LT", "LE", "EQ", "GE", "GT"]).map("SCMP_CMP_{}".format)
small = st.sampled_from([0, 1, 2, 6, 10, 16, 17, 38, 1 << 32 | 2])


def refusal(denied: tuple[Deny, ...], call: str, values: tuple[int, ...]) -> int:
    """Return the errno with which weir's rules refuse the call, 0 when they do not."""
    matching = [
        rule.errno
        for rule in denied
        if rule.call == call and all(values[c.argument] & c.mask == c.value for c in rule.comparisons)
    ]
    assert len(matching) <= 1
    return matching[0] if matching else 0


def masked(index: int, mask: int, value: int) -> Json:
    return {"index": index, "value": mask, "valueTwo": value & mask, "op": "SCMP_CMP_MASKED_EQ"}


conditions = st.builds(
    lambda index, value, op: {"index": index, "value": value, "op": op}, st.integers(0, 2), small, ops
) | st.builds(masked, st.integers(0, 2), st.sampled_from([0xF, 0xFFFFFFFF, 0]), small)
entries = st.fixed_dictionaries(
    {
        "names": st.lists(st.sampled_from(["socket", "socketpair", "bind", "listen", "read"]), min_size=1, max_size=2),
        "action": st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_LOG", "SCMP_ACT_KILL_PROCESS"]),
        "args": st.lists(conditions, max_size=2),
    },
    optional={"errnoRet": st.sampled_from([EPERM, EINVAL, ENOSYS])},
)
bases = st.fixed_dictionaries(
    {
        "defaultAction": st.sampled_from(["SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW", "SCMP_ACT_KILL"]),
        "syscalls": st.lists(entries, max_size=4),
    },
    optional={"defaultErrnoRet": st.sampled_from([EPERM, ENOSYS])},
)


def merged(document: Json, sockets: Sockets = APPENGINE, *capabilities: str) -> Json:
    return merge(rules(sockets), base.read(document, MACHINE, capabilities), MACHINE)


def allows(profile: Json, call: str, *values: int) -> bool:
    """Return whether the profile allows the call; it must leave no doubt about it."""
    (one,) = verdicts(profile, call, (*values, 0, 0, 0, 0, 0, 0))
    return one == ALLOWED


@given(policies, st.sampled_from(CALLS), arguments)
@example(APPENGINE, "socket", (1 << 32 | 16, 3, 0, 0, 0, 0))
@example(APPENGINE, "socket", (2, 0x80001, 1 << 32 | 262, 0, 0, 0))
def test_a_profile_refuses_what_the_filter_of_weir_run_does(
    sockets: Sockets, call: str, values: tuple[int, ...]
) -> None:
    errno = refusal(rules(sockets), call, values)
    assert verdicts(oci.profile(rules(sockets), MACHINE), call, values) == {
        ("SCMP_ACT_ERRNO", errno) if errno else ALLOWED
    }


def test_every_family_type_and_protocol() -> None:
    """All that differ, under 32 and 64 bits, so that no property depends on luck."""
    denied, profile = rules(APPENGINE), oci.profile(rules(APPENGINE), MACHINE)
    sockets = [e for e in profile["syscalls"] if "socket" in e["names"]]
    for family in [*range(48), 1 << 31, 1 << 32 | 2, 1 << 32 | 16]:
        for type_ in (*range(6), 10, 0x80001):
            for protocol in (0, 6, 17, 262, 1 << 32 | 6):
                values = (family, type_, protocol, 0, 0, 0)
                errno = refusal(denied, "socket", values)
                assert verdicts({**profile, "syscalls": sockets}, "socket", values) == {
                    ("SCMP_ACT_ERRNO", errno) if errno else ALLOWED
                }


def test_foreign_architectures_are_not_listed_unless_nothing_is_refused() -> None:
    assert oci.profile(rules(APPENGINE), MACHINE)["architectures"] == ["SCMP_ARCH_X86_64"]
    assert oci.profile((), MACHINE)["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    listing = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [],
    }
    assert merged(listing)["architectures"] == ["SCMP_ARCH_X86_64"]
    assert merge((), base.read(listing, MACHINE), MACHINE)["architectures"] == listing["architectures"]


@given(
    bases, policies, st.sampled_from(["socket", "socketpair", "bind", "listen", "read", "io_uring_setup"]), arguments
)
def test_merged_is_the_stricter_of_both(document: Json, sockets: Sockets, call: str, values: tuple[int, ...]) -> None:
    errno = refusal(rules(sockets), call, values)
    try:
        got = verdicts(merged(document, sockets), call, values)
    except WeirError as error:
        assert "too many rules" in error.message
        return
    of_base = verdicts(document, call, values)
    if errno:
        assert got == {("SCMP_ACT_ERRNO", errno)}
    elif call in {rule.call for rule in rules(sockets)}:
        assert len(got) == 1
        assert got <= of_base
        assert base.SEVERITY[min(got)[0]] == max(base.SEVERITY[action] for action, _ in of_base)
    else:
        assert got == of_base


@pytest.fixture(scope="module")
def debian() -> Json:
    """The profile of Debian's containers; skip where its package is not installed."""
    if not DEBIAN.exists():
        need.skip("needs /usr/share/containers/seccomp.json (golang-github-containers-common)")
    document: Json = json.loads(DEBIAN.read_bytes())
    return document


@pytest.mark.parametrize("name", find.shipped())
@pytest.mark.parametrize("capabilities", [(), ("CAP_AUDIT_WRITE", "CAP_SYS_CHROOT")])
def test_onto_debians_profile(debian: Json, name: str, capabilities: tuple[str, ...]) -> None:
    """Against the base alone, which is what merging nothing onto it gives."""
    denied = rules(find.load(name).sockets)
    both, alone = (merge(some, base.read(debian, MACHINE, capabilities), MACHINE) for some in (denied, ()))

    @given(st.lists(st.tuples(st.sampled_from(CALLS), arguments), min_size=10))
    def check(calls: list[tuple[str, tuple[int, ...]]]) -> None:
        for call, values in calls:
            errno, of_base = refusal(denied, call, values), verdicts(alone, call, values)
            assert len(of_base) == 1
            assert verdicts(both, call, values) == ({("SCMP_ACT_ERRNO", errno)} if errno else of_base)

    check()


def test_debians_profile_keeps_what_it_says_of_sockets(debian: Json) -> None:
    """Netlink's audit protocol is EINVAL for a container without CAP_AUDIT_WRITE."""
    everything = replace(APPENGINE, families=frozenset(Family), listen=Action.ALLOW, bind=Bind.ALLOW)
    audit = (16, 3, 9)
    assert verdicts(merged(debian, everything), "socket", audit) == {("SCMP_ACT_ERRNO", 93)}
    assert allows(merged(debian, everything), "socket", 16, 3, 0)
    netlink = (Deny("socket", EACCES, rules(APPENGINE)[0].comparisons),)  # one that leaves netlink as it is
    for capabilities, answer in (((), ("SCMP_ACT_ERRNO", EINVAL)), (("CAP_AUDIT_WRITE",), ALLOWED)):
        profile = merge(netlink, base.read(debian, MACHINE, capabilities), MACHINE)
        assert verdicts(profile, "socket", audit) == {answer}


def one(action: str, **fields: Any) -> Json:
    """A base that refuses all but what one entry says of read()."""
    return {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read", "bind"], "action": action, **fields}]}


@pytest.mark.parametrize(
    ("when", "allowed"),
    [
        ({}, True),
        ({"includes": {"caps": ["CAP_KILL"]}}, True),
        ({"includes": {"caps": ["CAP_KILL", "CAP_BPF"]}}, False),
        ({"excludes": {"caps": ["CAP_KILL"]}}, False),
        ({"excludes": {"caps": ["CAP_BPF"]}}, True),
        ({"includes": {"arches": ["amd64", "arm64"]}}, True),
        ({"includes": {"arches": ["s390x"]}}, False),
        ({"excludes": {"arches": ["amd64"]}}, False),
        ({"includes": {"minKernel": "4.8"}}, True),
        ({"includes": {"minKernel": "5.11"}}, False),
        ({"excludes": {"minKernel": "4.8"}}, False),
        ({"excludes": {"minKernel": "6.8"}}, False),
        ({"includes": None, "excludes": {}, "comment": "", "args": None}, True),
    ],
)
def test_an_entry_that_allows_must_apply_for_certain(when: Json, allowed: bool) -> None:
    profile = merged(one("SCMP_ACT_ALLOW", **when), replace(APPENGINE, bind=Bind.ALLOW), "CAP_KILL")
    assert allows(profile, "read") is allowed
    assert allows(profile, "bind") is allowed


@pytest.mark.parametrize(
    ("when", "refused"),
    [
        ({"includes": {"caps": ["CAP_BPF"]}}, True),
        ({"excludes": {"caps": ["CAP_KILL"]}}, False),
        ({"includes": {"minKernel": "6.8"}}, True),
        ({"excludes": {"minKernel": "6.8"}}, True),
        ({"excludes": {"minKernel": "4.8"}}, False),
        ({"includes": {"arches": ["s390x"]}}, False),
    ],
)
def test_an_entry_that_refuses_may_apply(when: Json, refused: bool) -> None:
    """Beside another that allows the same call, so that it must not be left to libseccomp which one wins."""
    document = one("SCMP_ACT_ERRNO", errnoRet=EINVAL, **when)
    document["syscalls"].append({"names": ["read", "bind"], "action": "SCMP_ACT_ALLOW"})
    profile = merged(document, replace(APPENGINE, bind=Bind.ALLOW), "CAP_KILL")
    assert allows(profile, "read") is not refused
    assert allows(profile, "bind") is not refused


def test_two_comparisons_of_one_argument_are_either_of_them() -> None:
    equal = [{"index": 0, "value": family, "op": "SCMP_CMP_EQ"} for family in (1, 2)]
    profile = merged(
        {
            "defaultAction": "SCMP_ACT_KILL",
            "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": equal}],
        }
    )
    assert allows(profile, "socket", 1, 1, 0)
    assert allows(profile, "socket", 2, 1, 6)
    assert verdicts(profile, "socket", (10, 1, 6)) == {("SCMP_ACT_KILL", None)}
    assert verdicts(profile, "socket", (1 << 32 | 1, 1, 6)) == {("SCMP_ACT_KILL", None)}
    assert verdicts(profile, "socket", (16, 3, 0)) == {("SCMP_ACT_ERRNO", 97)}


@pytest.mark.parametrize("op", ["NE", "LT", "LE", "EQ", "GE", "GT"])
@pytest.mark.parametrize("value", [0, 1, 6, 1 << 63, 2**64 - 1])
def test_each_comparison_at_its_edge(op: str, value: int) -> None:
    """Of an argument about which weir says nothing: the type of an AF_UNIX socket."""
    document = one("SCMP_ACT_ALLOW", args=[{"index": 1, "value": value, "op": f"SCMP_CMP_{op}"}])
    document["syscalls"][0]["names"] = ["socket"]
    profile = merged(document)
    for type_ in {0, 2**64 - 1, *(min(max(value + step, 0), 2**64 - 1) for step in (-2, -1, 0, 1, 2))}:
        values = (1, type_, 0, 0, 0, 0)
        assert verdicts(profile, "socket", values) == verdicts(document, "socket", values)


def test_no_rule_repeats_the_default() -> None:
    """libseccomp refuses such a rule, and what a runtime makes of it is its own affair."""
    document = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": ENOSYS, "syscalls": []}
    profile = merged(document)
    assert ["SCMP_ACT_ERRNO"] * len(profile["syscalls"]) == [entry["action"] for entry in profile["syscalls"]]
    assert ENOSYS not in [entry["errnoRet"] for entry in profile["syscalls"]]


def test_docker_and_podman_names_of_errnos_and_of_single_calls() -> None:
    document = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrno": "ENOSYS",
        "syscalls": [{"name": "read", "action": "SCMP_ACT_ERRNO", "errno": "EINVAL"}],
    }
    profile = merged(document)
    assert verdicts(profile, "read", ()) == {("SCMP_ACT_ERRNO", EINVAL)}
    assert verdicts(profile, "other", ()) == {("SCMP_ACT_ERRNO", ENOSYS)}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "the profile is no JSON object"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}, "'listenerPath'"),
        ({"syscalls": []}, "defaultAction None"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "'SCMP_ACT_NOTIFY'"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": "1"}, "no errno"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrno": "EWHAT"}, "'EWHAT'"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": {}}, "no list"),
        (one("SCMP_ACT_NOTIFY"), "entry 1 has the action 'SCMP_ACT_NOTIFY'"),
        (one("SCMP_ACT_ALLOW", includes={"namespaces": []}), "'namespaces'"),
        (one("SCMP_ACT_ALLOW", includes={"minKernel": "new"}), "minKernel 'new'"),
        (one("SCMP_ACT_ALLOW", unless="x"), "'unless'"),
        (one("SCMP_ACT_ALLOW", args=[{"index": 0, "op": "SCMP_CMP_ALMOST"}]), "'SCMP_CMP_ALMOST'"),
        (one("SCMP_ACT_ALLOW", args=[{"index": 6, "op": "SCMP_CMP_EQ"}]), "none of 0 to 5"),
        (one("SCMP_ACT_ALLOW", args=[{"index": 0, "value": -1, "op": "SCMP_CMP_EQ"}]), "64 bits"),
        (one("SCMP_ACT_ALLOW", args=[{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"}]), "mask"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": [], "action": "SCMP_ACT_ALLOW"}]}, "no names"),
    ],
)
def test_what_weir_does_not_understand_is_an_error(document: Any, says: str) -> None:
    with pytest.raises(WeirError, match=says) as failure:
        base.read(document, MACHINE)
    assert failure.value.hint


def test_too_many_conditions_are_an_error() -> None:
    each = [{"index": index, "value": 0x5555, "op": "SCMP_CMP_NE"} for index in range(3)]
    document = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": each}],
    }
    with pytest.raises(WeirError, match="socket\\(\\) make too many rules"):
        merged(document)


def printed(*words: object) -> Json:
    result = CliRunner().invoke(seccomp_profile, [str(word) for word in words], catch_exceptions=False)
    document: Json = json.loads(result.stdout)
    return document


def test_the_verb_prints_the_profile(tmp_path: Path) -> None:
    assert printed("-p", "appengine", "--arch", "x86_64") == oci.profile(rules(find.load("appengine").sockets), MACHINE)
    assert printed("-p", "appengine", "--arch", "aarch64")["architectures"] == ["SCMP_ARCH_AARCH64"]
    file = tmp_path / "base.json"
    file.write_text(json.dumps(one("SCMP_ACT_ALLOW", includes={"caps": ["CAP_BPF"]})))
    assert not allows(printed("-p", "appengine", "--base", file), "read")
    assert allows(printed("-p", "appengine", "--base", file, "--cap", "CAP_BPF"), "read")


def test_an_audit_policy_refuses_nothing() -> None:
    assert printed("-p", "audit")["syscalls"] == []


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        (None, ("--base", "FILE"), "cannot be read: No such file"),
        ("{", ("--base", "FILE"), "is not JSON"),
        ("[]", ("--base", "FILE"), "base.json: the base profile cannot be used"),
        ("{}", ("--base", "FILE", "--cap", "bpf"), "'bpf' is no capability"),
        (None, ("--cap", "CAP_BPF"), "without --base"),
    ],
)
def test_failures_of_the_verb(tmp_path: Path, text: str | None, words: tuple[str, ...], says: str) -> None:
    file = tmp_path / "base.json"
    if text is not None:
        file.write_text(text)
    given = ["-p", "appengine", *(str(file) if word == "FILE" else word for word in words)]
    failure = CliRunner().invoke(seccomp_profile, given).exception
    assert isinstance(failure, WeirError)
    assert says in failure.message
    assert failure.hint
