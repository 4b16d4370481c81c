"""Run one command under another kernel: QEMU without hardware virtualization, with the machine's own files shared in.

virtme-ng boots the kernel with the root directory of this machine read-only, and the repository under an overlay, so the
command may write and nothing of it stays. The command's output, exit status and result files come back through one
directory that is shared both ways.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import WeirError
from tests.vm.kernels import Kernel

SHARED = Path("/mnt")  # where the guest sees the results directory; every Debian has it, and nothing there
REPOSITORY = Path(__file__).resolve().parents[2]

_CPUS = 2  # per-CPU maps and swaps in place need more than one
_MEMORY = "2G"
_SCALE = (
    "0.05"  # of the random tests and of the steps to be killed at: one load takes half a minute here, not one second
)

# The kernel starts modprobe for every socket of an unknown family or protocol: 1.5 s each here, and the tests try hundreds.
# So what the tests can use is loaded first (5.10 has nft_counter as a module of its own), and then nothing any more.
_MODULES = (
    "veth dummy nf_tables nft_tproxy nft_counter nft_objref nft_numgen nft_ct nft_chain_nat nft_nat nft_redir inet_diag tcp_diag udp_diag "
    "sctp dccp_ipv4 dccp_ipv6 l2tp_ip l2tp_ip6 vsock_loopback"
)

# virtme-ng's init mounts proc, sys, tracefs and, on /sys/fs/cgroup, cgroup2; the rest is a real machine's systemd's work.
_SCRIPT = """\
exec >{shared}/output 2>&1
mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
ip link set lo up
for module in {modules}; do modprobe -q $module; done
echo >/proc/sys/kernel/modprobe
cd {repository} || exit
uname -r >{shared}/booted
env PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 {variables} {command}
echo $? >{shared}/status
"""


@dataclass(frozen=True)
class Ran:
    """A command's exit status in the guest, and the seconds until it started and until the guest was off."""

    status: int
    boot_seconds: float
    seconds: float


def _virtme_ng() -> Path:
    vng = Path(sys.executable).with_name("vng")
    if not vng.exists():
        raise WeirError("virtme-ng is not installed", f"{sys.executable} -m pip install -e .[vm]")
    return vng


def _script(command: Sequence[str]) -> str:
    """The guest's shell script; WEIR_ variables of this process are handed on."""
    own = {key: value for key, value in os.environ.items() if key.startswith("WEIR_")}
    variables = [f"{key}={value}" for key, value in ({"WEIR_TEST_SCALE": _SCALE} | own).items()]
    return _SCRIPT.format(
        shared=SHARED,
        repository=shlex.quote(str(REPOSITORY)),
        modules=_MODULES,
        variables=shlex.join(variables),
        command=shlex.join(command),
    )


def run(kernel: Kernel, command: Sequence[str], results: Path, timeout: float, say: Callable[[str], None]) -> Ran:
    """Boot the kernel, run the command in the repository, and shut down.

    `results` is a directory of the host that the guest sees as SHARED; files of an earlier run there are deleted. Each
    line of the command's output goes to `say` as it comes. `timeout` is in seconds, boot included. Raises WeirError when
    the guest does not boot, or does not end in time.
    """
    vng = _virtme_ng()
    results.mkdir(parents=True, exist_ok=True)
    for name in ("output", "booted", "status", "console"):
        (results / name).unlink(missing_ok=True)
    (results / "script").write_text(_script(command))
    # No KVM: the matrix must run inside virtual machines too. No microvm: it needs KVM. 9p: virtiofs needs a daemon.
    arguments = f"--disable-kvm --disable-microvm --force-9p --user root --cpus {_CPUS} --memory {_MEMORY} --verbose"
    # The kernel mistrusts the emulated TSC and falls back to the HPET: every look at a clock would leave the guest.
    arguments += f" --append tsc=reliable --overlay-rwdir={REPOSITORY} --rwdir={SHARED}={results}"
    started = time.monotonic()
    with open(results / "console", "wb") as console:
        guest = subprocess.Popen(
            [vng, "--run", kernel.image, *arguments.split(), "--exec", f"sh {SHARED}/script"],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
            env={**os.environ, "PATH": f"{vng.parent}:{os.environ['PATH']}"},  # it runs its own helpers by name
        )
    boot_seconds = 0.0
    read = 0
    try:
        while True:
            ended = guest.poll() is not None
            if not boot_seconds and (results / "booted").exists():
                boot_seconds = time.monotonic() - started
            read += _say_new_lines(results / "output", read, say, everything=ended)
            if ended:
                break
            if time.monotonic() - started > timeout:
                raise WeirError(
                    f"{kernel.release} was not done in {timeout:.0f} s", f"see {results}/output and console"
                )
            time.sleep(0.5)
    finally:
        if guest.poll() is None:
            os.killpg(guest.pid, signal.SIGKILL)  # its own session: vng, its helpers and QEMU
            guest.wait()
    if not (results / "status").exists():
        raise WeirError(f"{kernel.release} did not run the command to its end", f"see {results}/console")
    return Ran(int((results / "status").read_text()), boot_seconds, time.monotonic() - started)


def _say_new_lines(output: Path, start: int, say: Callable[[str], None], everything: bool) -> int:
    """Hand on the complete lines after byte `start` (an incomplete last one too with `everything`); bytes consumed."""
    if not output.exists():
        return 0
    with open(output, "rb") as file:
        file.seek(start)
        new = file.read()
    if not everything:
        new = new[: new.rfind(b"\n") + 1]
    for line in new.decode(errors="replace").splitlines():
        say(line)
    return len(new)
