"""Compiles, loads and pins the programs: a short-lived process of its own, and the only importer of bcc.

BCC keeps some 120 MB after a compile and prints the verifier's log on standard error; both end with this process.
``load`` (in load.py) starts it and reads its answer, one JSON object on standard output.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.errors import WeirError
from agent.kernel import abi, libbpf, source
from agent.kernel.pinned import PinnedKernel
from agent.kernel.pins import Pins, explained


def main() -> int:
    """Read the order on standard input: {"pins": DIR, "capacity": N}."""
    order = json.load(sys.stdin)
    try:
        pins = Pins(Path(order["pins"]))
        with pins.loading():
            answer = load(pins, int(order["capacity"]))
    except WeirError as e:
        answer = {"error": e.message, "hint": e.hint}
    json.dump(answer, sys.stdout)
    return 0


def load(pins: Pins, capacity: int) -> dict[str, Any]:
    """Load every program, then put each in its place, then record the build.

    Killed before the record is written, a load has changed nothing (no program was replaced) or has replaced some
    programs by newer ones of the same ABI; the next load does all of it again.
    """
    folder = source.directory()
    program = source.text(folder)
    try:
        has_retval = True
        descriptors = compile_and_load(pins, folder, program, compiler_flags(capacity, has_retval=True))
    except WeirError:
        # Before Linux 5.18 there is no bpf_set_retval: try, never compare versions. What fails again has another cause.
        has_retval = False
        descriptors = compile_and_load(pins, folder, program, compiler_flags(capacity, has_retval=False))
    with explained("pin the programs"):
        for name, fd in descriptors.items():
            replace_everywhere(pins, name, fd)
    kernel = PinnedKernel(pins)
    kernel.begin(source.build_number(program, (str(capacity),)), has_retval, secrets.randbits(64))
    kernel.close()
    return {"has_retval": has_retval}


def compiler_flags(capacity: int, *, has_retval: bool) -> tuple[str, ...]:
    """The constants of this load."""
    flags = ("-Wno-macro-redefined", f"-DWEIR_MAX_CONTAINERS={capacity}")
    return (*flags, "-DWEIR_SET_RETVAL") if has_retval else flags


def compile_and_load(pins: Pins, folder: Path, program: str, flags: tuple[str, ...]) -> Mapping[str, int]:
    """Program name → descriptor of a loaded program. It uses the pinned maps; those that were missing are pinned at the end.

    Raises WeirError with the last lines of the compiler's or verifier's log.
    """
    with source.header_tree(folder) as tree:
        os.environ["BCC_KERNEL_SOURCE"] = str(tree)
        BPF = binding().BPF
        with captured_stderr() as log:
            try:
                module = BPF(text=program, cflags=list(flags))
            except Exception as e:  # BCC raises no narrower type
                raise WeirError(f"BCC cannot compile the programs\n{log.tail()}", "See: weir probe") from e
            fresh = put_pinned_maps(pins, module)
            descriptors = {}
            for name, (kind, attach_type) in abi.PROGRAMS.items():
                try:
                    function = module.load_func(f"weir_{name}", getattr(BPF, kind), attach_type=attach_type)
                except Exception as e:
                    raise WeirError(
                        f"the kernel refuses the program {name}\n{log.tail()}",
                        "See what this kernel offers: weir probe",
                    ) from e
                descriptors[name] = function.fd
    with explained("pin the maps"):
        for name, fd in fresh.items():
            libbpf.obj_pin(fd, pins.maps / name)
    keep.append(module)
    return descriptors


def put_pinned_maps(pins: Pins, module: Any) -> Mapping[str, int]:
    """Put each pinned map in the place of the one that BCC has just made; returns the maps without a pin: name → descriptor.

    BCC can open pins, too, but by the ids of maps, which takes CAP_SYS_ADMIN. Programs name maps by descriptor, and none is loaded
    yet.
    """
    fresh = {}
    with explained("open the pinned maps"):
        for name in abi.MAPS:
            fd = binding().lib.bpf_table_fd(module.module, name.encode())
            if (pins.maps / name).exists():
                pinned = libbpf.obj_get(pins.maps / name)
                os.dup2(pinned, fd, inheritable=False)
                os.close(pinned)
            else:
                fresh[name] = fd
    return fresh


def binding() -> Any:
    """The module bcc.

    Raises WeirError when it, or the library below it, is not installed, or is another of the same name.
    """
    try:
        import bcc
    except (ImportError, OSError) as e:
        raise WeirError(
            f"BCC's Python binding cannot be imported: {e}",
            "Install Debian's: apt-get install python3-bpfcc (never the package bcc of PyPI, another library)",
        ) from e
    if not hasattr(bcc, "BPF"):
        raise WeirError(
            f"the module bcc at {bcc.__file__} is not the BPF Compiler Collection",
            "Remove it, and install Debian's: apt-get install python3-bpfcc",
        )
    return bcc


keep: list[Any] = []
"""BCC closes the programs when its object goes away: it stays until the process ends."""


@contextmanager
def captured_stderr() -> Iterator[Log]:
    """BCC and LLVM write their logs to descriptor 2, not to sys.stderr: collect them in memory."""
    saved = os.dup(2)
    file = os.memfd_create("weir-log")
    os.dup2(file, 2)
    try:
        yield Log(file)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(file)


@dataclass(frozen=True)
class Log:
    """What was written to descriptor 2."""

    file: int

    def tail(self, lines: int = 12) -> str:
        """The last lines of the log, and how many were left out."""
        size = os.lseek(self.file, 0, os.SEEK_END)
        log = os.pread(self.file, size, 0).decode(errors="replace").rstrip().splitlines()
        log = [line for line in log if "warning:" not in line]
        omitted = len(log) - lines
        shown = [f"    {line}" for line in log[-lines:]]
        return "\n".join([f"    … {omitted} lines before", *shown] if omitted > 0 else shown)


def replace_everywhere(pins: Pins, name: str, program: int) -> None:
    """Swap a program in place in every link of weir's, then in its pin; no moment without a program."""
    for directory in pins.links.iterdir():
        link_pin = directory / name
        if not link_pin.exists():
            continue
        link = libbpf.obj_get(link_pin)
        try:
            if libbpf.link_info(link).cgroup_id:
                libbpf.link_update(link, program)
        finally:
            os.close(link)
    fresh = pins.programs / f"{name}-new"
    fresh.unlink(missing_ok=True)
    libbpf.obj_pin(program, fresh)
    fresh.rename(pins.programs / name)


if __name__ == "__main__":
    sys.exit(main())
