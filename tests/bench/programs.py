"""What is attached to a cgroup while the client runs in it: weir, or programs that do nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from agent.controller import Controller, compiled
from agent.errors import WeirError
from agent.kernel import abi, libbpf, source
from agent.kernel.abi import Flag
from agent.kernel.load import CAPACITY, load
from agent.kernel.pinned import PinnedKernel
from agent.place import Place
from agent.policy.model import Policy

HERE = Path(__file__).resolve().parent


class Weir:
    """weir's programs on one cgroup, and policies for the cgroups below it."""

    def __init__(self, place: Place, checkout: Path | None = None) -> None:
        """``checkout``: another copy of the repository, whose programs to load; its layouts must be the same."""
        self._place = place
        place.pins.make()
        if checkout is None:
            load(place.pins)
        else:
            order = json.dumps({"pins": str(place.pins.root), "capacity": CAPACITY})
            command = [sys.executable, "-m", "agent.kernel.loader"]
            answer = json.loads(subprocess.check_output(command, input=order, text=True, cwd=checkout))
            if "error" in answer:
                raise WeirError(f"{checkout}: {answer['error']}", answer["hint"])
        self.kernel = PinnedKernel(place.pins)
        self._controller = Controller(self.kernel, place.root)
        place.slice.mkdir(exist_ok=True)
        self._id = place.slice.stat().st_ino

    def attach(self) -> None:
        """Attach every program to the slice."""
        self.kernel.attach(self._place.slice)

    def detach(self) -> None:
        """Take them off; the policies stay."""
        self.kernel.detach(self._id)

    def enrol(self, name: str, policy: Policy) -> Path:
        """Make a cgroup below the slice, under a policy."""
        path = self._place.slice / name
        path.mkdir()
        self._controller.enrol(path, compiled(policy), Flag.BORN)
        return path

    def close(self) -> None:
        """Remove pins and cgroups."""
        self.kernel.close()
        self._place.pins.remove()
        for path in (*self._place.slice.iterdir(), self._place.slice):
            if path.is_dir():
                path.rmdir()


class Empty:
    """Programs that do nothing on weir's hooks, attached as weir's are: by links."""

    def __init__(self, cgroup: Path) -> None:
        cgroup.mkdir()
        self._cgroup = cgroup
        self._links: list[int] = []
        self._module, self._programs = compiled_empty()

    def attach(self) -> None:
        """Attach every program."""
        fd = os.open(self._cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for name, program in self._programs.items():
            self._links.append(libbpf.link_create(program, fd, abi.PROGRAMS[name][1]))
        os.close(fd)

    def detach(self) -> None:
        """Take them off: the links are not pinned."""
        for link in self._links:
            os.close(link)
        self._links.clear()

    def close(self) -> None:
        """Remove the cgroup."""
        self.detach()
        self._cgroup.rmdir()


def compiled_empty() -> tuple[Any, dict[str, int]]:
    """BCC's module, which must outlive the programs, and the descriptor of each program."""
    with source.header_tree(source.directory()) as tree:
        os.environ["BCC_KERNEL_SOURCE"] = str(tree)
        from bcc import BPF

        module = BPF(text=(HERE / "empty.c").read_text(), cflags=["-Wno-macro-redefined"])
        return module, {
            name: module.load_func(f"weir_{name}", getattr(BPF, kind), attach_type=attach_type).fd
            for name, (kind, attach_type) in abi.PROGRAMS.items()
        }
