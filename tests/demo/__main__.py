"""`make demo`: weir at work on real traffic. Exit status 0 only when every row is as the policy says."""

from __future__ import annotations

import json
import signal
import sys
import textwrap
from pathlib import Path
from types import FrameType

from agent.errors import WeirError
from agent.policy.find import load
from agent.policy.model import Policy
from tests import addresses
from tests.demo.attempts import ATTEMPTS, UPLOAD
from tests.demo.expected import BY_NAME, Expected, expected
from tests.demo.measured import POLICY, Ran, Refusal, Seen, program, refusal, under_weir, without_weir
from tests.demo.place import Weir, place
from tests.world import Count

_PHP = Path(__file__).parent
_WIDTHS = (34, 15, 15, 12, 19, 17)  # with a space after each and the last word: 120 columns
_TITLES = ("TRIED", "WITHOUT WEIR", "WITH WEIR", "REFUSED BY", "RULE", "THE POLICY SAYS", "")

NOTES = f"""
Hook and packet rows: layer and rule as weir events reports them. seccomp reports nothing: a row is put down to it when
no hook refused the call and the call went otherwise without weir. No layer: the kernel says the same without weir.
{BY_NAME} Allowed by its DNS name. Names are not in force yet, so the address decides."""


def main() -> int:
    """Run everything, print it, and say whether all of it was as the policy says."""
    signal.signal(signal.SIGTERM, ended)
    policy = load(POLICY)
    with place() as weir:
        good, tried = attempts(weir, policy)
        client = programs(weir)
        uploaded = under_weir(weir, UPLOAD)
    counted = {
        "the table": tried,
        "the PHP HTTP client": client,
        "uploads, TCP and UDP": uploaded,
    }
    good &= client is not None and counts({name: ran for name, ran in counted.items() if ran})
    print(f"\nThe network is tests/world.py, the attempts tests/demo/attempts.py, the policy policies/{POLICY}.yaml.")
    print("Every row is as the policy says." if good else "NOT every row is as the policy says: look for NO.")
    return 0 if good else 1


def ended(number: int, _frame: FrameType | None) -> None:
    """Ended from outside: the namespaces, cgroups and pins go all the same."""
    sys.exit(128 + number)


def attempts(weir: Weir, policy: Policy) -> tuple[bool, Ran]:
    """Print the table of attempts; whether each went as the policy says, and the run."""
    errno_name = json.loads(weir.output("status", "--json"))["errno"]
    flat = [attempt for group in ATTEMPTS.values() for attempt in group]
    bare = without_weir(flat)
    ran = under_weir(weir, flat)
    good = ran.reported
    print(f"A program does the same things twice: without weir, and started by weir run --policy {POLICY}\n")
    print_row(*_TITLES)
    rows = iter(zip(bare, ran.seen, ran.events, strict=True))
    for group, members in ATTEMPTS.items():
        print(f"\n{group}")
        for attempt in members:
            before, seen, events = next(rows)
            by, says = refusal(before, seen, events), expected(policy, attempt, errno_name)
            right = is_right(before, seen, by, says)
            good &= right
            print_row(attempt.text, before.saw, answer(seen), by.layer, by.rule, says.text, "ok" if right else "NO")
    print(NOTES)
    for sentence in ran.summary["not_in_force"]:
        print(textwrap.fill(sentence, 120, subsequent_indent="    "))
    if not ran.reported:
        print("NO: weir counted other refusals than it reported")
    return good, ran


def print_row(*cells: str) -> None:
    """Print cells in columns."""
    print(" ".join([*map(str.ljust, cells, _WIDTHS), cells[-1]]).rstrip())


def is_right(bare: Seen, seen: Seen, by: Refusal, says: Expected) -> bool:
    """True when program and weir saw what the policy says.

    Where the kernel refuses a call without weir too, and with the same errno, seccomp cannot be told from it.
    """
    if seen.saw != says.saw or by.rule != says.rule:
        return False
    return by.layer == says.layer or (says.layer == "seccomp" and bare.saw == seen.saw)


def answer(seen: Seen) -> str:
    """What the program saw, with the bytes that it received."""
    return f"{seen.saw}, {seen.size} B" if seen.size else seen.saw


def programs(weir: Weir) -> Ran | None:
    """Run the two PHP programs; the run of the client, None unless the server was refused and the client worked."""
    server = program(weir, "php", str(_PHP / "echo_server.php"))
    client = program(weir, "php", str(_PHP / "http_client.php"), addresses.PUBLIC)
    refused = server.summary["status"] == 1 and server.output.endswith("socket_bind() failed: Permission denied (13)\n")
    works = client.summary["status"] == 0 and client.output.startswith("HTTP/1.0 200 OK\n")
    print("\nTwo PHP programs under the same policy: a TCP echo server and an HTTP client")
    for name, ran, right in (("echo_server.php", server, refused), ("http_client.php", client, works)):
        print(f"\nphp tests/demo/{name}: exit status {ran.summary['status']}  {'ok' if right else 'NO'}")
        print(*(f"    {line}" for line in ran.output.split("\n") if line.strip()), sep="\n")
    return client if refused and works else None


def counts(runs: dict[str, Ran]) -> bool:
    """Print what weir counted beside what the device counted; true when they are equal."""
    print("\nBytes sent, from the IP header on   weir counted              the peer's device counted")
    equal = True
    for name, ran in runs.items():
        same = ran.counted == ran.device
        print(f"    {name:<32}{count(ran.counted):<26}{count(ran.device):<26}{'equal' if same else 'NO'}")
        equal &= same and ran.counted.bytes > 0
    return equal


def count(one: Count) -> str:
    """Bytes and packets."""
    return f"{one.bytes:,} in {one.packets:,}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WeirError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
