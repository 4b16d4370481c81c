"""Named address sets: the files of policies/sets, and the host's own DNS servers.

A set file has one address or CIDR prefix a line; `#` begins a comment, and that at the top gives origin and date.
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from agent.errors import WeirError
from agent.policy.model import Destination, Prefix, read_destination

POLICIES = Path(os.environ.get("WEIR_POLICIES") or Path(__file__).resolve().parents[2] / "policies")
"""The directory of the shipped policies and, under sets/, of the sets; WEIR_POLICIES names another."""

RESOLVERS = "resolvers"
"""The one set without a file: it is the host's, so it differs from host to host."""

RESOLV_CONF = Path("/etc/resolv.conf")

CLASSES: Mapping[Destination, tuple[str, ...]] = {
    Destination.LOOPBACK: ("loopback",),
    Destination.PRIVATE: ("private", "link-local", "multicast", "broadcast", "reserved"),
}
"""The sets behind each destination class; an address in none of them is public, one in both is loopback."""


def names(policies: Path = POLICIES) -> tuple[str, ...]:
    """Return every name that `{set: NAME}` may use, sorted."""
    return tuple(sorted([*(file.stem for file in (policies / "sets").glob("*.txt")), RESOLVERS]))


@lru_cache(maxsize=64)
def read(name: str, policies: Path = POLICIES) -> tuple[Prefix, ...]:
    """Return the prefixes of a set that has a file, in the file's order, read once per process.

    Raises WeirError when the file is missing or a line in it is no prefix that a rule may list.
    """
    file = policies / "sets" / f"{name}.txt"
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeirError(
            f"the address set {name} cannot be read from {file}: {error}",
            "Reinstall weir, or point WEIR_POLICIES at a directory that has sets/ in it.",
        ) from error
    prefixes = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                prefixes.append(read_destination(text))
            except ValueError as error:
                raise WeirError(f"{file}:{number}:1: {error}", "Correct the line, or take it out.") from error
    return tuple(prefixes)


def resolvers(resolv_conf: Path = RESOLV_CONF) -> tuple[Prefix, ...]:
    """Return the host's DNS servers: the nameserver lines of its resolv.conf, never of a file in a container.

    Without such a line, or without the file, the C library asks the local machine (resolv.conf(5)): so does weir.
    Raises WeirError when the file is there and cannot be read, or a nameserver is no address.
    """
    try:
        lines = resolv_conf.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise WeirError(
            f"the host's DNS servers cannot be read from {resolv_conf}: {error}", "Make the file readable."
        ) from error
    servers = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            try:
                servers.append(Prefix.parse(words[1].partition("%")[0]))  # fe80::1%eth0: the scope is no part of it
            except ValueError as error:
                raise WeirError(f"{resolv_conf}:{number}:1: {error}", "Correct the nameserver line.") from error
    return tuple(servers) or (Prefix.parse("127.0.0.1"), Prefix.parse("::1"))


@lru_cache(maxsize=1)
def destinations() -> Mapping[Destination, tuple[Prefix, ...]]:
    """Return the prefixes of each destination class but PUBLIC, loopback first.

    Raises WeirError when a set cannot be read.
    """
    return {kind: tuple(prefix for name in sets for prefix in read(name)) for kind, sets in CLASSES.items()}
