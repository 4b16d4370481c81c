"""The seccomp filter itself: the only file that imports pyseccomp (libseccomp)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from agent.errors import WeirError
from agent.seccomp.rules import Deny

# Other architectures may reach sockets through socketcall(2), whose arguments lie in memory that a filter cannot read.
_ARCHITECTURES = ("X86_64", "AARCH64")


@lru_cache(maxsize=1)
def library() -> Any:
    """The module pyseccomp, which looks for libseccomp when it is imported: not before a filter is wanted.

    Raises WeirError when either is not installed.
    """
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: its own word for no libseccomp
        raise WeirError(
            f"libseccomp cannot be loaded: {error}.",
            "Install it: apt-get install libseccomp2. `weir attach` needs none.",
        ) from error
    return pyseccomp


class Filter:
    """A filter built from rules, ready to be loaded. It binds whoever loads it, their threads' and children's system calls.

    Calls of another architecture (32-bit, x32) kill the process with SIGSYS: their numbers and arguments mean something else.
    """

    def __init__(self, rules: Sequence[Deny]) -> None:
        """Build the filter; raises WeirError when this machine's libseccomp cannot express the rules."""
        pyseccomp = library()
        if pyseccomp.system_arch() not in [getattr(pyseccomp.Arch, name) for name in _ARCHITECTURES]:
            raise WeirError(
                "The seccomp filter is only known to be complete on x86_64 and arm64.",
                "Run the program on such a machine, or in a cgroup with `weir attach`, which needs no seccomp.",
            )
        try:
            self._filter = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
            self._filter.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
            # CTL_LOG and CTL_OPTIMIZE stay off: measured, see README.md.
            for rule in rules:
                self._filter.add_rule_exactly(
                    pyseccomp.ERRNO(rule.errno),
                    rule.call,
                    *(pyseccomp.Arg(c.argument, pyseccomp.MASKED_EQ, c.mask, c.value) for c in rule.comparisons),
                )
        except OSError as error:
            raise WeirError(
                f"libseccomp cannot build the filter: {error.strerror}.", "Install libseccomp 2.5 or newer."
            ) from error

    def load(self) -> None:
        """Set no_new_privs and put the filter on the calling thread, for good. No privilege is needed.

        Raises WeirError when the kernel refuses.
        """
        try:
            self._filter.load()
        except OSError as error:
            raise WeirError(
                f"The kernel refuses the seccomp filter: {error.strerror}.",
                "It needs CONFIG_SECCOMP_FILTER, and a container around weir must allow seccomp(2).",
            ) from error
