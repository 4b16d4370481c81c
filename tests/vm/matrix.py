"""The kernel tests on Debian's kernels, one after another: `.venv/bin/python -m tests.vm.matrix --help`."""

from __future__ import annotations

import datetime
import signal
import sys
from pathlib import Path

import click

from agent.errors import WeirError
from tests.vm import guest, kernels, results

_CACHE = guest.REPOSITORY / ".cache" / "vm"
_JUNIT = "junit.xml"
# These try weir's own processes more than the kernel, and load the programs again and again: a minute each time here.
_ABOUT_WEIR = (
    "bench",
    "cli",
    "crash",
    "door",
    "faults",
    "limits",
    "probe",
    "run",
    "seccomp_runtimes",
    "top",
    "upgrade",
)
# pytest's own cache is off: the guest's copy of the repository is gone after the run.
_KERNEL_TESTS = (
    ".venv/bin/pytest",
    "tests/kernel",
    "-v",
    "-p",
    "no:cacheprovider",
    f"--junitxml={guest.SHARED}/{_JUNIT}",
)
_SHORT = tuple(f"--ignore=tests/kernel/test_{name}.py" for name in _ABOUT_WEIR)


def _record(kernel: kernels.Kernel, ran: guest.Ran, junit: Path) -> None:
    """Put the kernel tests' result into README.md."""
    report = results.read_junit(junit)
    today = datetime.date.today().isoformat()
    line = results.row(kernel.series, kernel.release, today, report, ran.boot_seconds, ran.seconds)
    results.README.write_text(results.with_row(results.README.read_text(), line))


def _try(series: str, site: str, command: tuple[str, ...], timeout: float, *, whole: bool) -> bool:
    """Fetch, boot and run; True when the command ended well. Raises WeirError as kernels.fetch and guest.run do."""
    kernel = kernels.fetch(series, _CACHE, site)
    click.echo(f"[{series}] booting {kernel.release}")
    shared = _CACHE / "results" / series
    (shared / _JUNIT).unlink(missing_ok=True)
    ran = guest.run(
        kernel,
        command or (_KERNEL_TESTS if whole else _KERNEL_TESTS + _SHORT),
        shared,
        timeout,
        say=lambda line: click.echo(f"[{series}] {line}"),
    )
    click.echo(f"[{series}] exit status {ran.status}; booted in {ran.boot_seconds:.0f} s, {ran.seconds:.0f} s in all")
    if not command and (shared / _JUNIT).exists():
        _record(kernel, ran, shared / _JUNIT)
    return ran.status == 0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--kernel", "series", multiple=True, type=click.Choice(list(kernels.SUITES)), help="Only this series.")
@click.option("--timeout", default=3600.0, show_default=True, help="Seconds for one kernel, boot included.")
@click.option("--whole", is_flag=True, help="Every kernel test, those about weir's own processes too: hours.")
@click.option("--mirror", help="URI of a Debian archive; default: the one this machine's apt uses.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def main(series: tuple[str, ...], timeout: float, whole: bool, mirror: str | None, command: tuple[str, ...]) -> None:
    """Run the kernel tests, or COMMAND, under each of Debian's kernels.

    Results of the kernel tests go into tests/vm/README.md. Example: python -m tests.vm.matrix --kernel 5.10 -- uname -a
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the guest must not outlive this process
    failed = []
    for one in series or kernels.SUITES:
        try:
            if not _try(one, mirror or kernels.mirror(), command, timeout, whole=whole):
                failed.append(one)
        except WeirError as error:
            click.echo(f"[{one}] {error}", err=True)
            failed.append(one)
    if failed:
        click.echo(f"failed on {', '.join(failed)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
