"""The live kernel: weir's pinned maps, programs and links, through libbpf. Never imports bcc."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from agent.errors import WeirError
from agent.kernel import abi, libbpf
from agent.kernel.pins import Pins, explained
from agent.kernel.seam import Build, Counters, Enrolment, Event, Refused, RuleName, Version
from agent.kernel.tables import fill
from agent.policy.compile import Tables

ZERO = c.c_uint32(0)


class PinnedKernel:
    """The pins below one directory. Opens maps when they are needed; ``close`` closes them."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._maps: dict[str, int] = {}
        self._ring: libbpf.RingBuffer | None = None
        self._cpus = 0

    def close(self) -> None:
        """Close what is open; everything stays pinned."""
        if self._ring:
            self._ring.close()
        for fd in self._maps.values():
            os.close(fd)
        self._maps.clear()

    def _map(self, name: str) -> int:
        if name not in self._maps:
            with explained(f"open weir's map {name}"):
                self._maps[name] = libbpf.obj_get(self._pins.maps / name)
        return self._maps[name]

    def is_loaded(self) -> bool:
        """Whether a load has been finished here."""
        return self.build() is not None

    def build(self) -> Build | None:
        """What is loaded, None when nothing (or not all) is."""
        pins = [self._pins.maps / "config", *(self._pins.programs / name for name in abi.PROGRAMS)]
        if not all(self._is_there(pin) for pin in pins):
            return None
        config = self._config()
        if not config.build:
            return None
        return Build(config.build, bool(config.has_retval), libbpf.map_info(self._map("cgroups")).max_entries)

    def _is_there(self, pin: Path) -> bool:
        """Not Path.exists: that answers False to those who may not look, in some versions of Python."""
        with explained(f"look into {self._pins.root}"):
            try:
                pin.stat()
            except FileNotFoundError:
                return False
            return True

    def _config(self) -> abi.Config:
        config = abi.Config()
        with explained("read weir's configuration map"):
            libbpf.lookup(self._map("config"), ZERO, config)
        return config

    def begin(self, build: int, has_retval: bool, secret: int) -> None:
        """Record a finished load. The secret and the counters of an earlier one stay."""
        config = self._config()
        config.abi, config.build, config.has_retval = abi.ABI, build, has_retval
        config.secret = config.secret or secret
        config.generation = config.generation or 1
        config.next_policy = config.next_policy or 1
        self._write_config(config)

    def _write_config(self, config: abi.Config) -> None:
        with explained("write weir's configuration map"):
            libbpf.update(self._map("config"), ZERO, config)

    def _next_generation(self) -> None:
        """What sockets remember of their owners is stale from here on."""
        config = self._config()
        config.generation = config.generation % 0xFFFFFFFF + 1
        self._write_config(config)

    def max_capacity(self) -> Mapping[str, tuple[int, int]]:
        """Per map that can fill up: (entries, capacity)."""
        key_types = {"cgroups": c.c_uint64, "refusals": abi.Refusal, "policies": c.c_uint32}
        return {
            name: (sum(1 for _ in libbpf.keys(self._map(name), key)), libbpf.map_info(self._map(name)).max_entries)
            for name, key in key_types.items()
        }

    def attached(self) -> Mapping[int, frozenset[str]]:
        """Per cgroup id with programs attached: their names. A cgroup that is gone is not listed."""
        found = {}
        for directory in self._link_directories():
            names = frozenset(pin.name for pin in directory.iterdir() if self._cgroup_of(pin))
            if names:
                found[int(directory.name)] = names
        return found

    def _link_directories(self) -> list[Path]:
        return [path for path in self._pins.links.iterdir() if path.is_dir()] if self._pins.links.exists() else []

    def _cgroup_of(self, pin: Path) -> int:
        with explained(f"read the link {pin}"), _opened(libbpf.obj_get(pin)) as fd:
            return int(libbpf.link_info(fd).cgroup_id)

    def attach(self, cgroup: Path) -> None:
        """Attach every program to a cgroup; those that are attached stay."""
        with explained(f"attach to {cgroup}"), ExitStack() as stack:
            cgroup_fd = stack.enter_context(_opened(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
            directory = self._pins.links / str(os.fstat(cgroup_fd).st_ino)
            directory.mkdir(mode=0o700, exist_ok=True)
            for name, (_, attach_type) in abi.PROGRAMS.items():
                pin = directory / name
                if pin.exists() and self._cgroup_of(pin):
                    continue
                pin.unlink(missing_ok=True)
                program = stack.enter_context(_opened(libbpf.obj_get(self._pins.programs / name)))
                link = stack.enter_context(_opened(libbpf.link_create(program, cgroup_fd, attach_type)))
                libbpf.obj_pin(link, pin)

    def detach(self, cgroup_id: int) -> None:
        """Remove weir's programs from a cgroup."""
        directory = self._pins.links / str(cgroup_id)
        with explained(f"detach from cgroup {cgroup_id}"):
            for pin in list(directory.iterdir()) if directory.exists() else []:
                pin.unlink()
            if directory.exists():
                directory.rmdir()

    def sweep(self) -> None:
        """Remove the pins of links whose cgroup is gone, and what a killed ``install`` left."""
        alive = self.attached()
        for directory in self._link_directories():
            if int(directory.name) not in alive:
                self.detach(int(directory.name))
        known = self._numbers()
        for name in ("addresses", "clauses", "rules"):
            for key in list(libbpf.keys(self._map(name), c.c_uint32)):
                if key.value not in known:
                    self.retire(key.value)

    def enrolments(self) -> Mapping[int, Enrolment]:
        """Per cgroup id: its entry."""
        fd, found = self._map("cgroups"), {}
        for key in libbpf.keys(fd, c.c_uint64):
            entry = abi.Enrolled()
            if libbpf.lookup(fd, key, entry):
                found[key.value] = Enrolment(entry.slot, entry.policy, abi.Flag(entry.flags))
        return found

    def enrol(self, cgroup_id: int, enrolment: Enrolment) -> None:
        """Write a cgroup's entry: it takes effect for the next call and packet."""
        entry = abi.Enrolled()
        if not libbpf.lookup(self._map("cgroups"), c.c_uint64(cgroup_id), entry):
            entry.since = self._config().generation + 1
        entry.policy, entry.slot, entry.flags = enrolment.policy, enrolment.slot, enrolment.flags
        with explained(f"enrol cgroup {cgroup_id}"):
            libbpf.update(self._map("cgroups"), c.c_uint64(cgroup_id), entry)
        self._next_generation()

    def withdraw(self, cgroup_id: int) -> None:
        """Remove a cgroup's entry."""
        with explained(f"withdraw cgroup {cgroup_id}"):
            libbpf.delete(self._map("cgroups"), c.c_uint64(cgroup_id))
        self._next_generation()

    def _numbers(self) -> set[int]:
        """The numbers of the policy versions, without the names of their rules."""
        return {key.value for key in libbpf.keys(self._map("policies"), c.c_uint32)}

    def versions(self) -> Mapping[int, Version]:
        """The policy versions in the kernel, by number."""
        fd, found = self._map("policies"), {}
        for key in libbpf.keys(fd, c.c_uint32):
            header = abi.Policy()
            if libbpf.lookup(fd, key, header):
                found[key.value] = Version(
                    header.name.decode(),
                    bytes(header.sha256),
                    abi.Flag(header.flags),
                    tuple(self._rules(key, header.rules)),
                )
        return found

    def _rules(self, number: c.c_uint32, count: int) -> Iterator[RuleName]:
        inner = c.c_uint32()
        if not libbpf.lookup(self._map("rules"), number, inner):
            return
        with _opened(libbpf.map_by_id(inner.value)) as fd:
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
                for name, fd in fill(version, tables):
                    with _opened(fd):
                        libbpf.update(self._map(name), key, c.c_uint32(fd))
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
            for name in ("policies", "rules", "clauses", "addresses"):
                libbpf.delete(self._map(name), c.c_uint32(number))

    def counters(self, slot: int) -> Counters:
        """The totals of a slot."""
        values = self._per_cpu()
        with explained(f"read the counters of slot {slot}"):
            libbpf.lookup(self._map("counters"), c.c_uint32(slot), values)

        def total(name: str) -> int:
            return sum(getattr(value, name) for value in values)

        def by_destination(name: str) -> dict[str, int]:
            return {d: sum(getattr(value, name)[i] for value in values) for i, d in enumerate(abi.DESTINATIONS)}

        return Counters(
            by_destination("bytes"),
            by_destination("packets"),
            total("sockets_created"),
            total("sockets_released"),
            total("sockets_adopted"),
            total("events_suppressed"),
            total("events_lost"),
            total("refusals_uncounted"),
        )

    def _per_cpu(self) -> Any:
        self._cpus = self._cpus or libbpf.possible_cpus()
        return (abi.Counters * self._cpus)()

    def refusals(self) -> Mapping[Refused, int]:
        """Every refusal counter."""
        fd, found = self._map("refusals"), {}
        for key in libbpf.keys(fd, abi.Refusal):
            count = c.c_uint64()
            if libbpf.lookup(fd, key, count):
                found[_refused(key)] = count.value
        return found

    def clear(self, slot: int) -> None:
        """Zero a slot's counters and remove its refusal counters, for the next cgroup to use it."""
        with explained(f"clear slot {slot}"):
            libbpf.update(self._map("counters"), c.c_uint32(slot), self._per_cpu())
            for key in [key for key in libbpf.keys(self._map("refusals"), abi.Refusal) if key.slot == slot]:
                libbpf.delete(self._map("refusals"), key)

    def events(self, milliseconds: int) -> Sequence[Event]:
        """The events that are there, waiting at most so long for the first."""
        if self._ring is None:
            with explained("read weir's events"):
                self._ring = libbpf.RingBuffer(self._map("events"))
        return [_event(abi.Event.from_buffer_copy(record)) for record in self._ring.poll(milliseconds)]


@contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _refused(raw: abi.Refusal | abi.Event) -> Refused:
    rule = None if raw.rule == abi.DEFAULT_RULE else raw.rule
    return Refused(raw.slot, raw.policy, abi.Hook(raw.hook), abi.Reason(raw.reason), rule, bool(raw.audited))


def _event(raw: abi.Event) -> Event:
    address = int.from_bytes(bytes(raw.address), "big")
    return Event(
        raw.time, raw.cgroup, raw.pid, raw.comm.decode(errors="replace"), address, raw.port, raw.protocol, _refused(raw)
    )
