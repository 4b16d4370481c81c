"""Recompute the set `google` from the two lists that Google publishes: goog.json minus cloud.json."""

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.errors import WeirError
from agent.policy.model import IPV4_MAPPED, Prefix

MAX_BYTES = 20_000_000  # the published files have under 200 kB
HINT = "Download https://www.gstatic.com/ipranges/goog.json and https://www.gstatic.com/ipranges/cloud.json again."

Span = tuple[int, int]
"""Addresses from the first to the last, both included."""


@dataclass(frozen=True)
class Published:
    """One published list: when it was made (as the file says it) and its prefixes."""

    created: str
    prefixes: tuple[Prefix, ...]


@dataclass(frozen=True)
class Refreshed:
    """A recomputed set: its file's text, its prefixes, and what is new and gone against the old ones."""

    text: str
    prefixes: tuple[Prefix, ...]
    added: tuple[Prefix, ...]
    removed: tuple[Prefix, ...]


def refresh(goog: Path, cloud: Path, old: Iterable[Prefix]) -> Refreshed:
    """Return Google's own addresses: those of ``goog`` that are not in ``cloud``, in as few prefixes as possible.

    Raises WeirError for a file that is not one of the published lists, or when nothing is left.
    """
    whole = read(goog, customers=False)
    held = read(cloud, customers=True)
    prefixes = difference(whole.prefixes, held.prefixes)
    if not prefixes:
        raise WeirError(f"nothing is left of {goog} without {cloud}", HINT)
    header = (
        "# Google's own addresses without those that customers of Google Cloud hold (goog.json minus cloud.json).\n"
        "# Origin: https://www.gstatic.com/ipranges/goog.json, https://www.gstatic.com/ipranges/cloud.json.\n"
        f"# Date: goog.json of {whole.created}, cloud.json of {held.created}.\n"
        "# Written by `weir policy refresh-set google goog.json cloud.json`; run it again with newer files.\n"
    )
    before = tuple(old)
    return Refreshed(
        text=header + "".join(f"{prefix}\n" for prefix in prefixes),
        prefixes=prefixes,
        added=difference(prefixes, before),
        removed=difference(before, prefixes),
    )


def read(file: Path, *, customers: bool) -> Published:
    """Read goog.json, or with ``customers`` cloud.json. Raises WeirError for anything else."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise WeirError(f"{file} cannot be read: {error.strerror}", HINT) from error
    if len(data) > MAX_BYTES:
        raise WeirError(f"{file} is over {MAX_BYTES:,} bytes, so it is no list of address ranges", HINT)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WeirError(f"{file} is not JSON: {error}", HINT) from error
    entries = content.get("prefixes") if isinstance(content, dict) else None
    created = content.get("creationTime") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not isinstance(created, str) or not created.isprintable():
        raise WeirError(f"{file} has no creationTime or no prefixes, so it is not a list that Google publishes", HINT)
    prefixes = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or ("service" in entry) is not customers:
            wanted, other = ("cloud.json", "goog.json") if customers else ("goog.json", "cloud.json")
            raise WeirError(f"{file}: prefixes[{index}] is none of {wanted}'s", f"goog.json is first. Is it {other}?")
        prefixes.append(read_entry(file, index, entry))
    return Published(created, tuple(prefixes))


def read_entry(file: Path, index: int, entry: dict[str, object]) -> Prefix:
    """Return the prefix of one entry. Raises WeirError when it has not exactly one, or a wrong one."""
    written = [entry[key] for key in ("ipv4Prefix", "ipv6Prefix") if key in entry]
    if len(written) != 1 or not isinstance(written[0], str):
        raise WeirError(f"{file}: prefixes[{index}] has not exactly one of ipv4Prefix and ipv6Prefix", HINT)
    try:
        return Prefix.parse(written[0])
    except ValueError as error:
        raise WeirError(f"{file}: prefixes[{index}]: {error}", HINT) from error


def write(file: Path, text: str) -> None:
    """Replace a file in one step, so that no reader sees half of it. Raises WeirError when it cannot be written."""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as stream:
            temporary = Path(stream.name)
            try:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
                temporary.chmod(0o644)
                temporary.replace(file)
            except BaseException:
                temporary.unlink()
                raise
    except OSError as error:
        raise WeirError(f"{file} cannot be written: {error.strerror}", "Name another file with --output.") from error


def difference(minuend: Iterable[Prefix], subtrahend: Iterable[Prefix]) -> tuple[Prefix, ...]:
    """Return the fewest prefixes, sorted, that hold the addresses of the first and none of the second."""
    gone = iter([*spans(subtrahend), (1 << 128, 1 << 128)])
    first_gone, last_gone = next(gone)
    result: list[Prefix] = []
    for first, last in spans(minuend):
        start = first
        while start <= last:
            while last_gone < start:
                first_gone, last_gone = next(gone)
            end = min(last, first_gone - 1)
            if end >= start:
                result += prefixes_of(start, end)
            start = max(end, min(last, last_gone)) + 1
    return tuple(result)


def spans(prefixes: Iterable[Prefix]) -> list[Span]:
    """Return the addresses of the prefixes as spans, sorted, those that touch joined."""
    joined: list[Span] = []
    for prefix in sorted(prefixes):
        last = prefix.address | ((1 << (128 - prefix.length)) - 1)
        if joined and prefix.address <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((prefix.address, last))
    return joined


def prefixes_of(first: int, last: int) -> list[Prefix]:
    """Return the fewest prefixes that hold exactly the addresses from first to last."""
    result = []
    while first <= last:
        aligned = (first & -first).bit_length() - 1 if first else 128
        bits = min(aligned, (last - first + 1).bit_length() - 1)
        result.append(Prefix(first, 128 - bits))
        first += 1 << bits
    return result


def ipv4_addresses(prefixes: Iterable[Prefix]) -> int:
    """Return how many IPv4 addresses the prefixes hold; they must not overlap."""
    return sum(1 << (128 - prefix.length) for prefix in prefixes if prefix.address >> 32 == IPV4_MAPPED >> 32)
