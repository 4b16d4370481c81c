"""What is wrong with a policy file: where, what and what to do, everything at once, and never another exception."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.policy import sets
from agent.policy.model import Action, Bind, Family, Mode, Options, PortRange, Prefix, Protocol, Selector
from agent.policy.parse import PolicyInvalid, parse
from agent.policy.yamlfile import MAX_BYTES, MAX_DEPTH, MAX_VALUES
from tests.policies import selector_as_yaml, selectors

RESOLVERS = (Prefix.parse("10.96.0.10"),)

HEAD = "apiVersion: weir.dev/v1\nkind: SocketPolicy\nmetadata: {name: test}\n"

MANY_RULES = "".join(f"    - {{name: r{n}, action: deny}}\n" for n in range(512))

# Lines 1 to 3 are HEAD, so that a problem in the given text is on line 4 and later.
WRONG = {
    "unknown key at the top": ("spec: {}\nspecs: {}\n", ["5:1: specs: there is no such key; did you mean spec?"]),
    "unknown key in a rule": (
        "spec:\n  egress:\n    - name: a\n      action: deny\n      port: [25]\n",
        ["8:7: spec.egress[0].port: there is no such key; did you mean ports?"],
    ),
    "missing spec": ("", ["1:1: spec: the key is missing; add `spec:`"]),
    "missing name and action": (
        "spec:\n  egress:\n    - {ports: [25]}\n",
        ["6:7: spec.egress[0].action: the key is missing", "6:7: spec.egress[0].name: the key is missing"],
    ),
    "wrong types": (
        "spec:\n  sockets: yes please\n  egress: {}\n  mode: [enforce]\n",
        [
            "5:12: spec.sockets: 'yes please' stands where keys and values belong",
            "6:11: spec.egress: a mapping stands where a list belongs",
            "7:9: spec.mode: a list is not possible here; write enforce or audit",
        ],
    ),
    "an unknown value": (
        "spec: {default: alow}\n",
        ["4:17: spec.default: 'alow' is not possible here; write allow or deny"],
    ),
    "a YAML boolean": ("spec: {default: no}\n", ["4:17: spec.default: YAML reads 'no' as false; write allow or deny"]),
    "a boolean for a name": (
        "spec: {egress: [{name: on, action: deny, ports: [25]}]}\n",
        ["4:24: spec.egress[0].name: YAML reads 'on' as true; if you mean the word, put it in quotes"],
    ),
    "a number for a name": (
        "spec: {egress: [{name: 25, action: deny, ports: [25]}]}\n",
        ["4:24: spec.egress[0].name: '25' stands where text belongs"],
    ),
    "base 60": (
        "spec: {egress: [{name: a, action: deny, ports: [22:22]}]}\n",
        ["4:49: spec.egress[0].ports[0]: YAML reads 22:22"],
    ),
    "octal": (
        "spec: {egress: [{name: a, action: deny, ports: [025]}]}\n",
        ["4:49: spec.egress[0].ports[0]: YAML does not read 025"],
    ),
    "underscores": (
        "spec: {egress: [{name: a, action: deny, ports: [1_000]}]}\n",
        ["4:49: spec.egress[0].ports[0]: YAML does not"],
    ),
    "a huge number": (
        f"spec: {{egress: [{{name: a, action: deny, ports: [{'9' * 200}]}}]}}\n",
        ["4:49: spec.egress[0].ports[0]: a number of 200 digits"],
    ),
    "null": ("spec:\n  default:\n", ["5:11: spec.default: there is no value; write one, or take the key out"]),
    "to without a value": (
        "spec:\n  egress:\n    - name: a\n      action: allow\n      to:\n",
        ["8:10: spec.egress[0].to: there is no value"],
    ),
    "host bits": (
        'spec: {egress: [{name: a, action: deny, to: ["10.1.2.3/8"]}]}\n',
        ["4:46: spec.egress[0].to[0]: '10.1.2.3/8' has host bits set; the network is 10.0.0.0/8"],
    ),
    "no address": (
        "spec: {egress: [{name: a, action: deny, to: [10.0.0]}]}\n",
        ["4:46: spec.egress[0].to[0]: '10.0.0' is no IPv4"],
    ),
    "a whole IPv6": (
        'spec: {egress: [{name: a, action: allow, to: ["::/0"]}]}\n',
        ["4:47: spec.egress[0].to[0]: ::/0 holds IPv4 as well"],
    ),
    "an IPv6 around IPv4": (
        'spec: {egress: [{name: a, action: allow, to: ["::/64"]}]}\n',
        ["4:47: spec.egress[0].to[0]: ::/64 holds IPv4"],
    ),
    "zero": (
        "spec: {egress: [{name: a, action: deny, to: [0.0.0.0]}]}\n",
        ["4:46: spec.egress[0].to[0]: 0.0.0.0 never matches"],
    ),
    "unknown set": (
        "spec: {egress: [{name: a, action: deny, to: [{set: privat}]}]}\n",
        ["4:52: spec.egress[0].to[0].set: there is no address set 'privat'; the sets are broadcast, google"],
    ),
    "set and name": (
        "spec: {egress: [{name: a, action: deny, to: [{set: private, name: a.org}]}]}\n",
        ["4:61: spec.egress[0].to[0].name: name cannot stand beside the other key"],
    ),
    "no destination": (
        "spec: {egress: [{name: a, action: deny, to: [{cidr: 10.0.0.0/8}, 7, [x]]}]}\n",
        [
            "4:46: spec.egress[0].to[0]: a mapping is no destination",
            "4:66: spec.egress[0].to[1]: '7' is no destination",
            "4:69: spec.egress[0].to[2]: a list is no destination",
        ],
    ),
    "DNS names": (
        (
            'spec: {egress: [{name: a, action: allow, to: [{name: "*.a.org"}, {name: localhost}, {name: A.org}, '
            "{name: a.org.}]}]}\n"
        ),
        [
            "4:54: spec.egress[0].to[0].name: '*.a.org' is no DNS name",
            "4:73: spec.egress[0].to[1].name: 'localhost' is no DNS name",
            "4:92: spec.egress[0].to[2].name: 'A.org' is no DNS name",
            "4:107: spec.egress[0].to[3].name: 'a.org.' is no DNS name",
        ],
    ),
    "ports": (
        'spec: {egress: [{name: a, action: deny, ports: [0, 65536, 5-3, 1-65535, "http", -1, 80-, "80 - 90"]}]}\n',
        [
            "4:49: spec.egress[0].ports[0]: '0' is no port",
            "4:52: spec.egress[0].ports[1]: 65536 goes past the last port",
            "4:59: spec.egress[0].ports[2]: 5-3 is reversed; write 3-5",
            "4:64: spec.egress[0].ports[3]: 1-65535 is every port but 0",
            "4:73: spec.egress[0].ports[4]: 'http' is no port",
            "4:81: spec.egress[0].ports[5]: '-1' is no port",
            "4:85: spec.egress[0].ports[6]: '80-' is no port",
            "4:90: spec.egress[0].ports[7]: '80 - 90' is no port",
        ],
    ),
    "overlapping ports": (
        "spec: {egress: [{name: a, action: deny, ports: [20-30, 25, 443, 443]}]}\n",
        ["4:56: spec.egress[0].ports[1]: 25 overlaps 20-30", "4:65: spec.egress[0].ports[3]: 443 overlaps 443"],
    ),
    "repeated destinations": (
        "spec: {egress: [{name: a, action: deny, to: [10.0.0.0/8, 10.1.0.0/16, {set: google}, {set: google}]}]}\n",
        [
            "4:58: spec.egress[0].to[1]: 10.1.0.0/16 is inside 10.0.0.0/8 of the same list",
            "4:86: spec.egress[0].to[3]: the same destination is in this list already",
        ],
    ),
    "empty lists": (
        (
            "spec:\n  sockets: {families: [], protocols: []}\n"
            "  egress:\n    - {name: a, action: deny, to: [], ports: []}\n"
        ),
        [
            "5:23: spec.sockets.families: the list is empty",
            "5:38: spec.sockets.protocols: the list is empty",
            "7:35: spec.egress[0].to: the list is empty",
            "7:46: spec.egress[0].ports: the list is empty",
        ],
    ),
    "no rules": ("spec: {egress: []}\n", ["4:16: spec.egress: the list is empty"]),
    "names": (
        (
            "spec:\n  egress:\n    - {name: Big, action: deny, ports: [1]}\n"
            "    - {name: default, action: deny, ports: [2]}\n"
        ),
        ["6:14: spec.egress[0].name: 'Big' cannot be a name", "7:14: spec.egress[1].name: 'default' is what refusals"],
    ),
    "the same name": (
        "spec:\n  egress:\n    - {name: a, action: deny, ports: [1]}\n    - {name: a, action: wrong}\n",
        [
            "7:14: spec.egress[1].name: line 6 has a rule called a",
            "7:25: spec.egress[1].action: 'wrong' is not possible here",
        ],
    ),
    "a rule that never matches": (
        "spec:\n  egress:\n    - {name: a, action: deny}\n    - {name: b, action: allow, to: [8.8.8.8]}\n",
        ["7:7: spec.egress[1]: b can never match: a (line 6) decides all that it covers; move or remove it"],
    ),
    "a protocol that cannot be": (
        "spec:\n  sockets: {protocols: [tcp]}\n  egress:\n    - {name: a, action: allow, protocol: udp}\n",
        ["7:42: spec.egress[0].protocol: spec.sockets.protocols lacks udp, so this rule can never match"],
    ),
    "sockets": (
        (
            "spec:\n  sockets:\n    families: [inet, packet, inet]\n    bind: maybe\n    idleTimeout: 10\n"
            "    options: {mock: [keepalive, SO_LINGER, SO_LINGER]}\n"
        ),
        [
            "6:22: spec.sockets.families[1]: 'packet' is not possible here; write inet, inet6, unix or netlink",
            "6:30: spec.sockets.families[2]: inet is listed twice; take one out",
            "7:11: spec.sockets.bind: 'maybe' is not possible here; write deny, ephemeral or allow",
            "8:18: spec.sockets.idleTimeout: 10 is no duration; write a number and s, m or h",
            "9:22: spec.sockets.options.mock[0]: 'keepalive' is no socket option",
            "9:44: spec.sockets.options.mock[2]: SO_LINGER is listed twice; take one out",
        ],
    ),
    "an empty selector": ("spec: {selector: {}}\n", ["4:18: spec.selector: the selector is empty; give it namespaces"]),
    "empty parts of a selector": (
        "spec: {selector: {namespaces: [], podLabels: {}, containers: [''], cgroups: ['']}}\n",
        [
            "4:31: spec.selector.namespaces: the list is empty",
            "4:46: spec.selector.podLabels: the mapping is empty",
            "4:63: spec.selector.containers[0]: the text is empty, which matches nothing",
            "4:78: spec.selector.cgroups[0]: the text is empty",
        ],
    ),
    "types in a selector": (
        "spec:\n  selector:\n    namespaces: prod\n    podLabels: [app]\n    containers: {a: b}\n    cgroup: [x]\n",
        [
            "6:17: spec.selector.namespaces: 'prod' stands where a list belongs",
            "7:16: spec.selector.podLabels: a list stands where keys and values belong",
            "8:17: spec.selector.containers: a mapping stands where a list belongs",
            "9:5: spec.selector.cgroup: there is no such key; did you mean cgroups?",
        ],
    ),
    "label keys": (
        (
            "spec:\n  selector:\n    podLabels:\n      '': a\n      app.kubernetes.io/name: b\n      a/b/c: d\n"
            "      app*: e\n      Example.org/app: f\n      -app: ~\n"
        ),
        [
            "7:7: spec.selector.podLabels.: '' is no key of a Kubernetes label; write one such as app or app.k",
            "9:7: spec.selector.podLabels.a/b/c: 'a/b/c' is no key",
            "10:7: spec.selector.podLabels.app*: 'app*' is no key",
            "11:7: spec.selector.podLabels.Example.org/app: 'Example.org/app' is no key",
            "12:7: spec.selector.podLabels.-app: '-app' is no key",
            "12:13: spec.selector.podLabels.-app: there is no value",
        ],
    ),
    "label values": (
        "spec: {selector: {podLabels: {a: 1, b: yes, c: a/b, d: '[', e: [x], f: ''}}}\n",
        [
            "4:34: spec.selector.podLabels.a: '1' stands where text belongs",
            "4:40: spec.selector.podLabels.b: YAML reads 'yes' as true; if you mean the word, put it in quotes",
            "4:48: spec.selector.podLabels.c: 'a/b' never matches because of '/': a label's value has",
            "4:56: spec.selector.podLabels.d: '[' has a [ without a ]",
            "4:64: spec.selector.podLabels.e: a list stands where text belongs",
        ],
    ),
    "globs": (
        "spec:\n  selector:\n    namespaces: [Prod, 'team_*', '[A-Z]*', 'a[', '[]', '[!]', '[z-a]', 'a[]]', '[!a-c]?*']\n",
        [
            "6:18: spec.selector.namespaces[0]: 'Prod' never matches because of 'P': a namespace has lower-case",
            "6:24: spec.selector.namespaces[1]: 'team_*' never matches because of '_'",
            "6:44: spec.selector.namespaces[3]: 'a[' has a [ without a ] and a character between",
            "6:50: spec.selector.namespaces[4]: '[]' has a [ without",
            "6:56: spec.selector.namespaces[5]: '[!]' has a [ without",
            "6:63: spec.selector.namespaces[6]: '[z-a]' has the range z-a, which is reversed; write a-z",
        ],
    ),
    "globs for cgroups": (
        "spec: {selector: {cgroups: [/system.slice/*, system.slice/, a//b, 'system.slice/docker-*', a, a]}}\n",
        [
            "4:29: spec.selector.cgroups[0]: '/system.slice/*' never matches: paths count from the cgroup2 mount",
            "4:46: spec.selector.cgroups[1]: 'system.slice/' never matches",
            "4:61: spec.selector.cgroups[2]: 'a//b' never matches",
            "4:95: spec.selector.cgroups[5]: a is listed twice; take one out",
        ],
    ),
    "a glob twice": (
        "spec: {selector: {containers: [a, b, a]}}\n",
        ["4:38: spec.selector.containers[2]: a is listed twice; take one out"],
    ),
    "too many globs": (
        f"spec: {{selector: {{containers: [{', '.join(f'c{n}' for n in range(65))}]}}}}\n",
        ["4:31: spec.selector.containers: 65 items; the limit is 64, so join some"],
    ),
    "too many globs, and one that is wrong": (
        f"spec: {{selector: {{podLabels: {{{', '.join(f'l{n}: a' for n in range(64))}, '': ''}}}}}}\n",
        ["4:30: spec.selector.podLabels: 65 items; the limit is 64", "4:533: spec.selector.podLabels.: '' is no key"],
    ),
    "too many rules, and one that is wrong": (
        f"spec:\n  egress:\n{MANY_RULES}    - x\n",
        ["6:5: spec.egress: 513 items; the limit is 512, so join some", "518:7: spec.egress[512]: 'x' stands where"],
    ),
    "duplicates in a list of words": (
        "spec: {sockets: {families: [inet, unix, inet]}}\n",
        ["4:41: spec.sockets.families[2]: inet is listed twice"],
    ),
    "a key twice": (
        "spec:\n  default: deny\n  default: allow\n",
        ["6:3: spec.default: the key is here twice (first on line 5)"],
    ),
    "a key with a dot": (
        "spec: {sockets.bind: deny}\n",
        ["4:8: spec.sockets.bind: there is no such key; did you mean sockets? The keys here are selector"],
    ),
    "a key that does not show as it is": (
        'spec: {"\\e[2J\\n": x}\n',
        ["4:8: spec: a key that is not one word; write `key: value`"],
    ),
    "repeated words that do not show as they are": (
        'spec:\n  sockets: {families: ["\\e[2J", "\\e[2J"]}\n  egress: [{name: "\\e", action: deny}, {name: "\\e"}]\n',
        [
            "5:24: spec.sockets.families[0]: '\\x1b[2J' is not possible here",
            "5:33: spec.sockets.families[1]: '\\x1b[2J' is listed twice",
            "5:33: spec.sockets.families[1]: '\\x1b[2J' is not possible here",
            "6:19: spec.egress[0].name: '\\x1b' cannot be a name",
            "6:40: spec.egress[1].action: the key is missing",
            "6:47: spec.egress[1].name: '\\x1b' cannot be a name",
            "6:47: spec.egress[1].name: line 6 has a rule called '\\x1b'; give each",
        ],
    ),
    "a key that is an alias": ("spec: {*a : b}\n", ["4:8: spec: an alias (*a); write the value out"]),
    "a long anchor and a tag that does not show as it is": (
        f"spec: {{default: &{'a' * 101} deny, mode: !%1b%5b2J audit}}\n",
        [
            f"4:17: spec.default: an anchor (&'{'a' * 100}' …); take it out",
            "4:132: spec.mode: a tag ('!\\x1b[2J'); take it out",
        ],
    ),
    "an alias": (
        "spec: &all\n  egress:\n    - {name: a, action: deny, to: *all}\n",
        ["4:7: spec: an anchor (&all); take it out", "6:35: spec.egress[0].to: an alias (*all); write the value out"],
    ),
    "a tag": (
        "spec: {default: !!python/name:os.system deny}\n",
        ["4:17: spec.default: a tag (tag:yaml.org,2002:python/name"],
    ),
    "a merge key": ("spec: {<<: {default: allow}}\n", ["4:8: spec.<<: there is no such key"]),
    "a key that is a list": ("spec: {? [a] : b}\n", ["4:10: spec: a key that is not one word"]),
    "a long word": (f"spec: {{default: {'a' * 301}}}\n", ["4:17: spec.default: a value of 301 characters"]),
    "a long key": (f"spec: {{? {'a' * 301} : 1}}\n", ["4:10: spec: a value of 301 characters"]),
    "two documents": ("spec: {}\n---\n", ["5:1: a second document begins"]),
    "two documents, and the first is wrong": (
        "spec: {default: dny}\n---\nspec: {}\n",
        ["4:17: spec.default: 'dny' is not possible here", "5:1: a second document begins"],
    ),
    "a tab": ("spec:\n\tdefault: deny\n", ["5:1: a tab; YAML indents with spaces"]),
    "not YAML": ("spec: {default: deny\n", ["5:1: not YAML (did not find expected ',' or '}'"]),
    "an unquoted IPv6 address": ("spec: {egress: [{to: [::1]}]}\n", ["4:23: not YAML"]),
}


def problems(text: str | bytes) -> list[str]:
    """Return the problems of a policy as text, the file's name left out."""
    with pytest.raises(PolicyInvalid) as caught:
        parse(text, "p.yaml", RESOLVERS)
    assert all(str(problem) in caught.value.message for problem in caught.value.problems[:100])
    return [str(problem).removeprefix("p.yaml:") for problem in caught.value.problems]


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    text, expected = WRONG[name]
    found = problems(HEAD + text)
    assert len(found) == len(expected), found
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(beginning), found


def test_every_problem_at_once() -> None:
    """All of the above in one file: structure, values and what is between rules do not hide one another."""
    found = problems(
        "apiVersion: weir.dev/v2\nkind: Policy\nmetadata: {name: Bad, labels: {}}\n"
        "spec:\n  sockets: {listen: maybe}\n  egress:\n    - {name: a, action: deny}\n"
        "    - {name: a, action: alow, to: [10.0.0.1/8], ports: [9-3]}\n    - {name: c, action: allow, ports: [80]}\n"
    )
    assert [problem.split(": ")[1] for problem in found] == [
        "apiVersion", "kind", "metadata.name", "metadata.labels", "spec.sockets.listen", "spec.egress[1].name",
        "spec.egress[1].action", "spec.egress[1].to[0]", "spec.egress[1].ports[0]", "spec.egress[2]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "beginning"),
    [
        (b"", "1:1: the file is empty"),
        (b"# nothing\n", "1:1: the file is empty"),
        (b"- a\n", "1:1: a list stands where keys and values belong"),
        (b"just words", "1:1: 'just words' stands where"),
        (b"a: b\n\xff\xfe", "2:1: byte 0xff is not UTF-8"),
        ("a: é".encode("latin-1"), "1:4: byte 0xe9 is not UTF-8"),
        (b"a: b\nc: \x00", "2:4: a control character (U+0000)"),
        (b"a: \x1b[31m", "1:4: a control character (U+001B)"),
        ("a: b # c\u2028d: e".encode(), "1:9: a control character (U+2028)"),  # for YAML, the comment ends here
        ("a: b # c\x85d: e".encode(), "1:9: a control character (U+0085)"),
        (b"a: b # c\rd: e", "1:9: a control character (U+000D)"),
        (b"\xef\xbb\xbfa: \x00", "1:4: a control character (U+0000)"),
        (b"\xef\xbb\xbf\xef\xbb\xbfa: b", "1:1: a control character (U+FEFF)"),
        (b"a: b".decode().encode("utf-16"), "1:1: byte 0xff is not UTF-8"),
        (b"---\n", "2:1: the file is empty"),
        (b"~", "1:1: the file is empty"),
        (b"[" * (MAX_DEPTH + 1), "1:21: nested deeper than 20 levels"),
        (b"{a: " * 100_000, "1:81: nested deeper than 20 levels"),
        (b"[" + b"a," * MAX_VALUES + b"]", "1:200000: more than 100,000 values"),
        (b"x" * (MAX_BYTES + 1), "1:1: the file is over 1,000,000 bytes"),
        (b"%YAML 3.0\n---\na: b\n", "1:1: not YAML"),
    ],
)
def test_no_policy_at_all(data: bytes, beginning: str) -> None:
    found = problems(data)
    assert len(found) == 1
    assert found[0].startswith(beginning)


def test_ten_megabytes_are_refused_unread() -> None:
    data = HEAD.encode() + b"spec: {egress: [" + b"{name: a, action: deny}," * 420_000 + b"]}\n"
    assert problems(data)[0].startswith("1:1: the file is over")


def test_a_laughing_bomb_is_never_expanded() -> None:
    layers = "".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    found = problems(f"{HEAD}spec:\n  a0: &a0 [x]\n{layers}")
    assert "5:7: spec.a0: an anchor (&a0); take it out, aliases are not read" in found
    assert len(found) < 200  # one for each anchor, alias and unknown key: nothing was expanded


def test_a_file_full_of_mistakes_is_reported_in_part() -> None:
    rules = "".join(f"    - {{name: r{n}, action: what}}\n" for n in range(300))
    with pytest.raises(PolicyInvalid) as caught:
        parse(f"{HEAD}spec:\n  egress:\n{rules}", "p.yaml", RESOLVERS)
    assert len(caught.value.problems) == 300
    assert caught.value.message.endswith("… and 200 more")
    assert "300 problems" in caught.value.message


def test_the_limit_of_rules() -> None:
    rules = "".join(
        f"    - {{name: r{n}, action: deny, to: [{{set: google}}], ports: [{n + 1}]}}\n" for n in range(512)
    )
    assert len(parse(f"{HEAD}spec:\n  egress:\n{rules}", "p.yaml", RESOLVERS).egress) == 512
    assert (
        "513 items; the limit is 512"
        in problems(f"{HEAD}spec:\n  egress:\n{rules}    - {{name: x, action: deny}}\n")[0]
    )


def test_the_smallest_policy_is_the_strictest() -> None:
    for text in ("spec: {default: deny}\n", "spec: {}\n"):
        policy = parse(HEAD + text, "p.yaml", RESOLVERS)
        assert (policy.mode, policy.egress, policy.default) == (Mode.ENFORCE, (), Action.DENY)
        sockets = policy.sockets
        assert (sockets.listen, sockets.bind, sockets.transfer) == (Action.DENY, Bind.DENY, Action.DENY)
        assert sockets.families == {Family.INET, Family.INET6, Family.UNIX}
        assert sockets.protocols == frozenset(Protocol)
        assert (sockets.options.others, sockets.idle_timeout) == (Action.DENY, None)


def test_every_key_arrives() -> None:
    text = HEAD + (
        "spec:\n  mode: audit\n  sockets:\n    families: [inet, netlink]\n    protocols: [tcp]\n    listen: allow\n"
        "    bind: ephemeral\n    transfer: allow\n    idleTimeout: 2h\n    options: {mock: [], others: allow}\n"
        "  egress:\n"
        '    - name: one\n      action: allow\n      to: [10.0.0.0/8, "2001:db8::1", {name: a.org}, {set: resolvers}]\n'
        "      ports: [53, 8000-8099]\n      protocol: tcp\n    - {name: two, action: deny}\n  default: allow\n"
    )
    policy = parse(text, "p.yaml", RESOLVERS)
    sockets = policy.sockets
    assert (policy.name, policy.mode, policy.default, policy.source) == ("test", Mode.AUDIT, Action.ALLOW, "p.yaml")
    assert sockets.families == {Family.INET, Family.NETLINK}
    assert sockets.protocols == {Protocol.TCP}
    assert (sockets.listen, sockets.bind, sockets.transfer) == (Action.ALLOW, Bind.EPHEMERAL, Action.ALLOW)
    assert (sockets.idle_timeout, sockets.options) == (7200, Options((), Action.ALLOW))
    one, two = policy.egress
    assert (one.name, one.action, one.line, two.line) == ("one", Action.ALLOW, 15, 20)
    assert [str(prefix) for prefix in one.prefixes or ()] == ["10.0.0.0/8", "2001:db8::1", "10.96.0.10"]
    assert (one.names, one.ports) == (("a.org",), (PortRange(53, 53), PortRange(8000, 8099)))
    assert one.protocols == {Protocol.TCP}
    assert two.protocols == frozenset(Protocol)
    assert (two.prefixes, two.names, two.ports) == (None, (), ())


def test_every_key_of_a_selector_arrives() -> None:
    parts = {
        "namespaces: [prod, 'team-[!x]*']": Selector(namespaces=("prod", "team-[!x]*")),
        "podLabels: {app.kubernetes.io/name: web*, tier: ''}": Selector(
            pod_labels=(("app.kubernetes.io/name", "web*"), ("tier", ""))
        ),
        "containers: [php]": Selector(containers=("php",)),
        "cgroups: ['*/docker-*.scope']": Selector(cgroups=("*/docker-*.scope",)),
    }
    for text, selector in parts.items():
        assert parse(HEAD + f"spec: {{selector: {{{text}}}}}\n", "p.yaml", ()).selector == selector
    whole = parse(HEAD + f"spec: {{selector: {{{', '.join(parts)}}}}}\n", "p.yaml", ()).selector
    assert whole == Selector(("prod", "team-[!x]*"), whole.pod_labels if whole else (), ("php",), ("*/docker-*.scope",))
    assert parse(HEAD + "spec: {}\n", "p.yaml", ()).selector is None


@given(selectors())
def test_a_selector_reads_back_as_it_is_written(selector: Selector) -> None:
    text = yaml.safe_dump({"spec": {"selector": selector_as_yaml(selector)}}, sort_keys=False, width=10_000)
    assert parse(HEAD + text, "p.yaml", ()).selector == selector


def test_the_digest_is_that_of_the_bytes() -> None:
    data = (HEAD + "spec: {}\n").encode()
    assert parse(data, "p.yaml", ()).sha256 == parse(data.decode(), "p.yaml", ()).sha256
    assert parse(data, "p.yaml", ()).text == data.decode()
    assert parse(data + b"# x\n", "p.yaml", ()).sha256 != parse(data, "p.yaml", ()).sha256


def test_a_byte_order_mark_and_windows_lines_are_no_problem() -> None:
    assert parse(b"\xef\xbb\xbf" + (HEAD + "spec: {}\n").replace("\n", "\r\n").encode(), "p.yaml", ()).name == "test"


def only_policy_invalid(data: str | bytes) -> None:
    """Parse, and let nothing but PolicyInvalid pass; every problem lies in the file."""
    try:
        parse(data, "p.yaml", RESOLVERS)
    except PolicyInvalid as error:
        lines = (data if isinstance(data, bytes) else data.encode("utf-8", "replace")).count(b"\n") + 2
        assert error.problems
        assert all(1 <= problem.line <= lines and problem.column >= 1 for problem in error.problems)


APPENGINE = (sets.POLICIES / "appengine.yaml").read_text("utf-8")
WORDS = [
    "apiVersion", "weir.dev/v1", "kind", "SocketPolicy", "metadata", "name", "spec", "mode", "sockets",
    "egress", "default", "action", "to", "ports", "protocol", "set", "families", "options", "mock",
    "selector", "namespaces", "podLabels", "cgroups", "team-*", "[", "idleTimeout", "deny", "allow", "private", "10.0.0.0/8", "::1", "25", "20-21", "22:22", "~", "no", "", "<<",
    "0x1f", "1e5", ".nan", "2026-01-01", "10m",
]  # fmt: skip
leaves = st.sampled_from(WORDS) | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet="ab:-[]{}*&!|>'\"%@#,? \t\n0123456789.~", max_size=80) | st.binary())
def test_random_text(data: str | bytes) -> None:
    only_policy_invalid(data)


@settings(max_examples=300, deadline=None)
@given(values, st.booleans())
def test_random_structures(value: object, flow: bool) -> None:
    only_policy_invalid(yaml.safe_dump(value, default_flow_style=flow))
    only_policy_invalid(
        HEAD
        + yaml.safe_dump({"spec": {"egress": [value], "sockets": value, "selector": value}}, default_flow_style=flow)
    )


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(APPENGINE)), st.integers(0, 12), st.text(max_size=3) | st.sampled_from(WORDS))
def test_a_damaged_policy(at: int, cut: int, put: str) -> None:
    only_policy_invalid(APPENGINE[:at] + put + APPENGINE[at + cut :])
