"""The shipped address sets, and the host's DNS servers."""

from pathlib import Path

import pytest

from agent.errors import WeirError
from agent.policy import sets
from agent.policy.model import IPV4_MAPPED, Destination, nested, parse_address

FILES = ("broadcast", "google", "link-local", "loopback", "multicast", "private", "reserved")


def holds(name: str, address: str) -> bool:
    return any(prefix.contains(parse_address(address)) for prefix in sets.read(name))


def test_names() -> None:
    assert sets.names() == tuple(sorted([*FILES, "resolvers"]))


@pytest.mark.parametrize("name", FILES)
def test_each_set_says_where_it_comes_from_and_holds_no_prefix_twice(name: str) -> None:
    text = (sets.POLICIES / "sets" / f"{name}.txt").read_text("utf-8")
    header = text[: text.index("\n1") + 1] if name == "google" else text
    assert "Origin: " in header
    assert "Date: " in header
    prefixes = sets.read(name)
    assert len(set(prefixes)) == len(prefixes)
    assert [str(prefix) for prefix, around in nested(prefixes) if around] == []


def test_no_set_holds_the_prefixes_that_are_judged_by_the_address_inside() -> None:
    """Else 64:ff9b::8.8.8.8 would be refused for its own sake, and all IPv4 with ::ffff:0:0/96."""
    for name in FILES:
        for prefix in sets.read(name):
            for address in (
                IPV4_MAPPED | 0x01010101,
                *map(parse_address, ("64:ff9b::1.1.1.1", "2002:101:101::", "::1.1.1.1")),
            ):
                assert not prefix.contains(address), (name, prefix)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        (
            "private",
            ["10.0.0.0", "172.31.255.255", "192.168.0.1", "100.64.0.1", "fc00::", "fdff::1", "fec0::1"],
            ["172.15.255.255", "172.32.0.0", "100.128.0.0", "11.0.0.0", "fe80::1"],
        ),
        ("loopback", ["127.0.0.1", "127.255.255.255", "::1"], ["128.0.0.0", "::2"]),
        ("link-local", ["169.254.169.254", "fe80::1", "febf::1"], ["169.255.0.0", "fec0::"]),
        ("broadcast", ["255.255.255.255"], ["255.255.255.254"]),
        ("multicast", ["224.0.0.1", "239.255.255.250", "ff02::fb"], ["240.0.0.0", "223.255.255.255"]),
        (
            "reserved",
            ["0.0.0.1", "192.0.0.192", "192.0.2.1", "198.51.100.1", "203.0.113.1", "198.19.255.255", "192.88.99.1",
             "240.0.0.1", "2001::1", "2001:10::1", "2001:db8::1", "64:ff9b:1::1", "::ffff:0:1.2.3.4", "100::1",
             "3fff::1", "5f00::1"],
            ["192.0.1.1", "198.20.0.0", "2001:200::1", "2606:2800:220:1::1", "93.184.216.34", "1.1.1.1", "3ffe::1"],
        ),
        (
            "google",
            ["8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844", "142.250.0.0", "142.251.255.255",
             "173.194.0.1", "74.125.0.1", "64.233.160.1", "108.177.0.1", "35.191.0.1", "130.211.0.1"],
            ["199.36.153.4", "34.64.64.1", "35.199.192.1", "169.254.169.254", "93.184.216.34"],
        ),
    ],
)  # fmt: skip
def test_members(name: str, inside: list[str], outside: list[str]) -> None:
    assert [address for address in inside if not holds(name, address)] == []
    assert [address for address in outside if holds(name, address)] == []


def test_google_has_the_published_size() -> None:
    prefixes = sets.read("google")
    ipv4 = [prefix for prefix in prefixes if prefix.address >> 32 == 0xFFFF]
    assert (len(ipv4), len(prefixes) - len(ipv4)) == (304, 97)
    assert sum(1 << (128 - prefix.length) for prefix in ipv4) == 4_995_200


def test_destinations_have_loopback_and_private() -> None:
    assert list(sets.destinations()) == [Destination.LOOPBACK, Destination.PRIVATE]


def test_a_directory_of_sets(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "mine.txt").write_text("# Origin: me\n\n10.0.0.0/8 # ours\n  2001:db8::/32\n")
    assert sets.names(tmp_path) == ("mine", "resolvers")
    assert [str(prefix) for prefix in sets.read("mine", tmp_path)] == ["10.0.0.0/8", "2001:db8::/32"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("10.0.0.1/8", "'10.0.0.1/8' has host bits set"),
        ("::/0 # all IPv6?", "::/0 holds IPv4 as well"),
        ("0.0.0.0", "0.0.0.0 never matches"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "sets").mkdir()
    file = tmp_path / "sets" / "mine.txt"
    file.write_text(f"10.0.0.0/8\n{line}\n")
    with pytest.raises(WeirError, match=f"{file}:2:1: {message}"):
        sets.read("mine", tmp_path)


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeirError, match="the address set mine cannot be read"):
        sets.read("mine", tmp_path)


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("nameserver 10.96.0.10\nnameserver 2001:db8::53\nsearch a.org\n", ["10.96.0.10", "2001:db8::53"]),
        ("# nameserver 1.1.1.1\n  nameserver\t127.0.0.53 # stub\n", ["127.0.0.53"]),
        ("nameserver fe80::1%eth0\n", ["fe80::1"]),
        ("search a.org\nnameserver\n", ["127.0.0.1", "::1"]),
        ("", ["127.0.0.1", "::1"]),
    ],
)
def test_resolvers(tmp_path: Path, text: str, servers: list[str]) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text(text)
    assert [str(prefix) for prefix in sets.resolvers(file)] == servers


def test_resolvers_without_a_file(tmp_path: Path) -> None:
    assert [str(prefix) for prefix in sets.resolvers(tmp_path / "none")] == ["127.0.0.1", "::1"]


def test_a_wrong_resolver_is_named(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver dns.a.org\n")
    with pytest.raises(WeirError, match=f"{file}:1:1: 'dns.a.org' is no IPv4 or IPv6 address"):
        sets.resolvers(file)


def test_a_resolv_conf_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WeirError, match="cannot be read"):
        sets.resolvers(tmp_path)
