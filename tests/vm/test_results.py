"""The table of results: written from pytest's own report, one row for each series, old rows kept."""

from __future__ import annotations

from pathlib import Path

from tests.vm.results import README, Report, read_junit, row, with_row

_JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" tests="5">
  <testcase classname="tests.kernel.test_a" name="test_one"/>
  <testcase classname="tests.kernel.test_a" name="test_two"><skipped message="needs BPF LSM">…</skipped></testcase>
  <testcase classname="tests.kernel.test_a" name="test_three"><skipped message="needs BPF LSM">…</skipped></testcase>
  <testcase classname="tests.kernel.test_b" name="test_four[x]"><failure message="assert 1 == 2">…</failure></testcase>
  <testcase classname="tests.kernel.test_b" name="test_five"><error message="no fixture">…</error></testcase>
</testsuite></testsuites>
"""


def test_report_counts_and_names(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    file.write_text(_JUNIT)
    failed = ("tests.kernel.test_b::test_four[x]", "tests.kernel.test_b::test_five")
    assert read_junit(file) == Report(1, (("needs BPF LSM", 2),), failed)


def test_a_new_row_replaces_the_old_one_of_its_series_only() -> None:
    green = Report(9, (), ())
    text = README.read_text()
    for series, date in (("6.12", "2026-01-01"), ("6.1", "2026-01-02"), ("5.10", "2026-01-03"), ("6.1", "2026-01-04")):
        text = with_row(text, row(series, f"{series}.0", date, green, 10.0, 60.0))
    rows = [line for line in text.splitlines() if "2026-01-0" in line]
    assert rows == [
        "| 5.10 | 5.10.0 | 2026-01-03 | 9 | 0 | 0 |  | 10 s | 60 s |",
        "| 6.1 | 6.1.0 | 2026-01-04 | 9 | 0 | 0 |  | 10 s | 60 s |",
        "| 6.12 | 6.12.0 | 2026-01-01 | 9 | 0 | 0 |  | 10 s | 60 s |",
    ]
    assert text.startswith("# Other kernels\n")


def test_notes_say_why_and_what() -> None:
    report = Report(0, (("needs a | b", 2),), ("tests.kernel.test_b::test_five",))
    assert report.notes == "needs a \\| b (2); failed: `tests.kernel.test_b::test_five`"
