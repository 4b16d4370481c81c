"""The programs' text: the files of bpf/ joined into one, and the stub tree that BCC takes for kernel headers.

BCC rewrites map accesses and registers functions only in the main text, so the files are joined, not included, with
#line so that the compiler's errors name the right file.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from agent.errors import WeirError

FILES = (
    "uapi.c",
    "abi.h",
    "maps.c",
    "identity.c",
    "verdict.c",
    "refuse.c",
    "destination.c",
    "socket.c",
    "bind.c",
    "packet.c",
    "traffic.c",
)


def directory() -> Path:
    """Where bpf/ is: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parents[1]
    return next(path for path in (here.parent / "bpf", here / "bpf") if path.is_dir())


def text(folder: Path) -> str:
    """The whole program."""
    return "".join(f'#line 1 "bpf/{name}"\n{(folder / name).read_text()}\n' for name in FILES)


def build_number(program: str, flags: tuple[str, ...]) -> int:
    """Names a build: 8 bytes of the SHA-256 of the text and the compiler's flags; never 0."""
    digest = hashlib.sha256("\0".join((program, *flags)).encode()).digest()
    return int.from_bytes(digest[:8], "big") | 1


@contextmanager
def header_tree(folder: Path) -> Iterator[Path]:
    """A tree that BCC takes for kernel headers: weir's stubs, and the system's UAPI headers under include/uapi.

    Raises WeirError when the UAPI headers are not installed.
    """
    machine = f"{platform.machine()}-linux-gnu"
    uapi = {
        "linux": Path("/usr/include/linux"),
        "asm-generic": Path("/usr/include/asm-generic"),
        "asm": next(
            (p for p in (Path("/usr/include") / machine / "asm", Path("/usr/include/asm")) if p.exists()), None
        ),
    }
    missing = [name for name, path in uapi.items() if path is None or not path.exists()]
    if missing:
        raise WeirError(
            f"the kernel's UAPI headers are not installed ({', '.join(missing)})",
            "Install them: apt-get install linux-libc-dev",
        )
    with TemporaryDirectory(prefix="weir-headers-") as name:
        tree = Path(name)
        for stub in (folder / "kernel-stub").rglob("*.h"):
            place = tree / stub.relative_to(folder / "kernel-stub")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(stub.read_text())
        (tree / "include/uapi").mkdir(parents=True, exist_ok=True)
        for part, path in uapi.items():
            os.symlink(str(path), tree / "include/uapi" / part)
        yield tree
