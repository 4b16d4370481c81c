"""Random policies, and flows that fall near their edges, for property tests in every tier."""

import yaml
from hypothesis import strategies as st

from agent.policy.compile import MAX_RULES
from agent.policy.model import (
    BOTH_PROTOCOLS,
    IPV4_MAPPED,
    MAX_PORT,
    Action,
    Bind,
    Family,
    Flow,
    Mode,
    Options,
    Policy,
    PortRange,
    Prefix,
    Protocol,
    Rule,
    Selector,
    Sockets,
    parse_address,
)

LAST_ADDRESS = (1 << 128) - 1

OPEN_SOCKETS = Sockets(
    families=frozenset(Family),
    protocols=BOTH_PROTOCOLS,
    listen=Action.ALLOW,
    bind=Bind.ALLOW,
    transfer=Action.ALLOW,
    idle_timeout=None,
    options=Options(mock=(), others=Action.ALLOW),
)
"""Sockets without a restriction of their own, so that the rules alone decide."""

IPV4_BASES = [
    parse_address(text)
    for text in (
        "0.0.0.0", "8.8.8.8", "10.0.0.0", "10.255.255.255", "93.184.216.34", "127.0.0.1", "127.255.255.255",
        "169.254.169.254", "192.168.1.1", "224.0.0.1", "255.255.255.255",
    )
]  # fmt: skip
IPV6_BASES = [
    parse_address(text)
    for text in (
        "::", "::1", "::2", "64:ff9b::", "64:ff9b:1::1", "2001:db8::1", "2002::", "2606:2800:220:1::1", "fd00:ec2::254",
        "fe80::1", "ff02::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "::fffe:ffff:ffff", "::1:0:0:0",
    )
]  # fmt: skip
DNS_NAMES = ["smtp.gmail.com", "pop.gmail.com", "example.org"]
PORTS = [1, 20, 21, 25, 53, 80, 443, 587, 8080, MAX_PORT]


def embeddings(ipv4: int) -> list[int]:
    """Return the IPv6 addresses that lead to an IPv4 address: NAT64, 6to4 and IPv4-compatible."""
    low = ipv4 & 0xFFFFFFFF
    return [0x64FF9B << 96 | low, 0x2002 << 112 | low << 80, low]


ipv4_addresses = st.sampled_from(IPV4_BASES) | st.integers(0, 0xFFFFFFFF).map(lambda low: IPV4_MAPPED | low)
embedding_addresses = ipv4_addresses.flatmap(lambda ipv4: st.sampled_from(embeddings(ipv4)))
addresses = (
    ipv4_addresses
    | embedding_addresses
    | st.sampled_from(IPV6_BASES)
    | st.integers(min_value=0, max_value=LAST_ADDRESS)
)


@st.composite
def prefixes(draw: st.DrawFn) -> Prefix:
    """Draw a prefix of any length around an address of interest, so that many of them overlap."""
    address = draw(addresses)
    length = draw(st.integers(96, 128) | st.integers(0, 128))
    return Prefix(address >> (128 - length) << (128 - length), length)


@st.composite
def port_ranges(draw: st.DrawFn) -> PortRange:
    """Draw a port, or a range between two ports of interest."""
    first = draw(st.sampled_from(PORTS) | st.integers(0, MAX_PORT))
    last = draw(st.just(first) | st.sampled_from(PORTS))
    return PortRange(min(first, last), max(first, last))


@st.composite
def rules(draw: st.DrawFn, name: str, line: int) -> Rule:
    """Draw a rule; one in three has no destination, one in three no ports."""
    to = st.lists(prefixes(), max_size=4).map(tuple)
    destinations = draw(st.none() | to | to)
    names = st.lists(st.sampled_from(DNS_NAMES), max_size=2, unique=True)
    return Rule(
        name=name,
        action=draw(st.sampled_from(Action)),
        prefixes=destinations,
        names=() if destinations is None else tuple(draw(st.just([]) | st.just([]) | names)),
        ports=draw(st.just(()) | st.lists(port_ranges(), max_size=3).map(tuple)),
        protocols=draw(st.sampled_from([BOTH_PROTOCOLS, frozenset([Protocol.TCP]), frozenset([Protocol.UDP])])),
        line=line,
    )


NAMESPACES = ["shop", "team-a", "team-b", "kube-system"]
LABELS = {"app": ["web", "web-2", ""], "app.kubernetes.io/name": ["php", "Php_7.4"]}
CONTAINERS = ["php", "php-fpm", "sidecar"]
CGROUPS = [
    "kubepods.slice/kubepods-pod1.slice/cri-containerd-1.scope",
    "system.slice/docker-2.scope",
    "kubepods/pod3/4",
]


@st.composite
def globs(draw: st.DrawFn, texts: list[str]) -> str:
    """Draw a glob that was made from one of the texts, so that many of them match one."""
    text = draw(st.sampled_from([text for text in texts if text]))
    first = draw(st.integers(0, len(text) - 1))
    last = draw(st.integers(first + 1, len(text)))
    middle = draw(
        st.sampled_from([text[first:last], "*", "?" * (last - first), f"[{text[first]}]*", "[!x]*", "*[0-9]"])
    )
    glob = text[:first] + middle + text[last:]
    return glob if glob.strip("/") == glob and "//" not in glob else text


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    """Draw a selector with at least one part."""
    keys = draw(st.lists(st.sampled_from(sorted(LABELS)), max_size=2, unique=True))
    lists = [
        tuple(draw(st.just([]) | st.lists(globs(texts), max_size=3, unique=True)))
        for texts in (NAMESPACES, CONTAINERS, CGROUPS)
    ]
    labels = tuple((key, draw(globs(LABELS[key]) | st.just(""))) for key in keys)
    selector = Selector(lists[0], labels, lists[1], lists[2])
    return Selector(namespaces=("*",)) if selector == Selector() else selector


def selector_as_yaml(selector: Selector) -> dict[str, object]:
    """Return what spec.selector of a policy file holds."""
    parts = {
        "namespaces": list(selector.namespaces),
        "podLabels": dict(selector.pod_labels),
        "containers": list(selector.containers),
        "cgroups": list(selector.cgroups),
    }
    return {key: part for key, part in parts.items() if part}


@st.composite
def policies(draw: st.DrawFn, max_rules: int = 8) -> Policy:
    """Draw a policy of up to ``max_rules`` rules whose prefixes overlap; nothing but egress and default restricts."""
    count = draw(st.integers(0, min(max_rules, MAX_RULES)))
    return Policy(
        name="random",
        mode=Mode.ENFORCE,
        sockets=OPEN_SOCKETS,
        egress=tuple(draw(rules(f"rule-{index}", index + 1)) for index in range(count)),
        default=draw(st.sampled_from(Action)),
        source="random.yaml",
        sha256="0" * 64,
        text="",
    )


def edges(prefix: Prefix) -> list[int]:
    """Return the first and last address of a prefix and their neighbours outside."""
    last = prefix.address | ((1 << (128 - prefix.length)) - 1)
    candidates = (prefix.address - 1, prefix.address, prefix.address + 1, last - 1, last, last + 1)
    return [address for address in candidates if 0 <= address <= LAST_ADDRESS]


@st.composite
def flows(draw: st.DrawFn, policy: Policy, *, names: bool = False) -> Flow:
    """Draw a flow near the edges of the policy's prefixes and ports; with ``names`` it may carry DNS names."""
    near = [address for rule in policy.egress for prefix in rule.prefixes or () for address in edges(prefix)]
    near += [inner for address in near if address >> 32 == 0xFFFF for inner in embeddings(address)]
    ports = {
        port for rule in policy.egress for ports in rule.ports for port in (ports.first - 1, ports.last + 1, *ports)
    }
    ports = {port for port in ports if 0 <= port <= MAX_PORT}
    return Flow(
        protocol=draw(st.sampled_from(Protocol)),
        address=draw(st.sampled_from(near) | addresses if near else addresses),
        port=draw(st.sampled_from(sorted(ports)) | st.integers(0, MAX_PORT) if ports else st.integers(0, MAX_PORT)),
        names=frozenset(draw(st.lists(st.sampled_from(DNS_NAMES), max_size=2))) if names else frozenset(),
    )


def as_yaml(policy: Policy) -> str:
    """Return the text of a policy file that says what the policy's egress and default say; its sockets are open."""
    egress = []
    for rule in policy.egress:
        to = [str(prefix) for prefix in rule.prefixes or ()] + [{"name": name} for name in rule.names]
        part: dict[str, object] = {"name": rule.name, "action": rule.action.value}
        if rule.prefixes is not None:
            part["to"] = to
        if rule.ports:
            part["ports"] = [str(ports) for ports in rule.ports]
        if len(rule.protocols) == 1:
            part["protocol"] = next(iter(rule.protocols)).value
        egress.append(part)
    sockets = {
        "families": [family.value for family in Family],
        "listen": "allow",
        "bind": "allow",
        "transfer": "allow",
        "options": {"mock": [], "others": "allow"},
    }
    spec: dict[str, object] = {"sockets": sockets, "default": policy.default.value}
    if egress:
        spec["egress"] = egress
    if policy.selector:
        spec["selector"] = selector_as_yaml(policy.selector)
    head = {"apiVersion": "weir.dev/v1", "kind": "SocketPolicy", "metadata": {"name": policy.name}}
    return yaml.safe_dump({**head, "spec": spec}, sort_keys=False)
