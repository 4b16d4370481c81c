"""Policy versions in the pinned maps: written whole before anybody uses them, never changed, retired when nobody does."""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator, Mapping

from agent.errors import WeirError
from agent.kernel import abi, libbpf
from agent.kernel.links import opened
from agent.kernel.maps import Maps
from agent.kernel.pins import Pins, explained
from agent.kernel.seam import RuleName, Version
from agent.kernel.tables import fill, rules
from agent.policy.compile import Tables


class PolicyVersions(Maps):
    """The part of the seam that is about policy versions."""

    def __init__(self, pins: Pins) -> None:
        super().__init__(pins)
        self._versions: dict[int, Version] = {}  # they never change, and their numbers are never used again

    def close(self) -> None:
        """Close what is open; everything stays pinned."""
        super().close()
        self._versions.clear()

    def _numbers(self) -> set[int]:
        """The numbers of the policy versions, without the names of their rules."""
        return {key.value for key in libbpf.keys(self._map("policies"), c.c_uint32)}

    def versions(self) -> Mapping[int, Version]:
        """The policy versions in the kernel, by number."""
        numbers = self._numbers()
        for number in numbers - self._versions.keys():
            header, key = abi.Policy(), c.c_uint32(number)
            if libbpf.lookup(self._map("policies"), key, header):
                self._versions[number] = Version(
                    header.name.decode(),
                    bytes(header.sha256),
                    abi.Flag(header.flags),
                    tuple(self._rules(number, header.rules)),
                )
        return {number: version for number, version in self._versions.items() if number in numbers}

    def _rules(self, number: int, count: int) -> Iterator[RuleName]:
        pin = self._pins.rules / str(number)
        with explained(f"read {pin}"):
            try:
                fd = libbpf.obj_get(pin)
            except FileNotFoundError:  # also a moment after the version was seen: who reads holds no lock
                return
            with opened(fd):
                for index in range(count):
                    rule = abi.Rule()
                    libbpf.lookup(fd, c.c_uint32(index), rule)
                    yield RuleName(rule.name.decode(), rule.line, bool(rule.deny))

    def install(self, version: Version, tables: Tables) -> int:
        """Write a new policy version; returns its number. Nobody uses it yet."""
        config = self._config()
        number = config.next_policy
        config.next_policy += 1
        self._write_config(config)
        key = c.c_uint32(number)
        header = abi.Policy(name=version.name.encode(), flags=version.flags, rules=len(version.rules))
        header.sha256[:] = version.sha256
        with explained(f"write the policy {version.name}"):
            if len(self._numbers()) >= abi.MAX_POLICIES:
                raise WeirError(
                    f"the kernel already holds {abi.MAX_POLICIES} policy versions",
                    "Detach cgroups that are no longer needed, or give several the same policy (`weir status`).",
                )
            try:
                for name, fd in fill(tables):
                    with opened(fd):
                        libbpf.update(self._map(name), key, c.c_uint32(fd))
                with opened(rules(version)) as fd:
                    libbpf.obj_pin(fd, self._pins.rules / str(number))
                libbpf.update(self._map("policies"), key, header)
            except BaseException:
                self.retire(number)
                raise
        return int(number)

    def retire(self, number: int) -> None:
        """Remove a policy version that no cgroup uses.

        A program may have read the number a moment ago. The kernel waits for running programs when an element of a map
        of maps is deleted (maybe_wait_bpf_programs, Linux 5.0): so the rules' names go first, which no program reads.
        """
        with explained(f"retire policy version {number}"):
            libbpf.delete(self._map("policies"), c.c_uint32(number))
            (self._pins.rules / str(number)).unlink(missing_ok=True)
            for name in ("clauses", "addresses"):
                libbpf.delete(self._map(name), c.c_uint32(number))

    def sweep_versions(self) -> None:
        """Remove what a killed ``install`` left."""
        known = self._numbers()
        left = {int(pin.name) for pin in self._pins.rules.iterdir()}
        for name in ("addresses", "clauses"):
            left |= {key.value for key in libbpf.keys(self._map(name), c.c_uint32)}
        for number in left - known:
            self.retire(number)
