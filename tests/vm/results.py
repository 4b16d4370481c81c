"""What pytest reported in a guest, and the table of it in README.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

README = Path(__file__).with_name("README.md")
_BEGIN = "<!-- results: written by tests.vm.matrix -->"
_END = "<!-- end of results -->"
_HEAD = "| series | kernel | date | passed | failed | skipped | why skipped; what failed | boot | in all |\n"
_RULE = "|---|---|---|---|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Report:
    """Counts of tests; each skip's reason with its number of tests; the names of those that failed."""

    passed: int
    skipped: tuple[tuple[str, int], ...]
    failed: tuple[str, ...]

    @property
    def notes(self) -> str:
        reasons = [f"{reason} ({number})" for reason, number in self.skipped]
        return "; ".join([*reasons, *(f"failed: `{name}`" for name in self.failed)]).replace("|", "\\|")


def read_junit(file: Path) -> Report:
    """The report in a file of pytest's --junitxml."""
    passed = 0
    skipped: Counter[str] = Counter()
    failed = []
    for case in ElementTree.parse(file).iter("testcase"):
        if (skip := case.find("skipped")) is not None:
            skipped[skip.get("message", "")] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            passed += 1
    return Report(passed, tuple(skipped.most_common()), tuple(failed))


def row(series: str, release: str, date: str, report: Report, boot_seconds: float, seconds: float) -> str:
    """One line of the table."""
    counts = f"{report.passed} | {len(report.failed)} | {sum(number for _, number in report.skipped)}"
    return f"| {series} | {release} | {date} | {counts} | {report.notes} | {boot_seconds:.0f} s | {seconds:.0f} s |\n"


def with_row(readme: str, new: str) -> str:
    """The README's text with the row in its table, in place of the same series' old row if there is one."""
    before, _, rest = readme.partition(_BEGIN)
    table, _, after = rest.partition(_END)
    rows = {line.split("|")[1].strip(): line for line in table.strip().splitlines(keepends=True)[2:]}
    rows[new.split("|")[1].strip()] = new
    ordered = sorted(rows.items(), key=lambda item: [int(part) for part in item[0].split(".")])
    lines = "".join(f"{line.rstrip()}\n" for _, line in ordered)
    return f"{before}{_BEGIN}\n{_HEAD}{_RULE}{lines}{_END}{after}"
