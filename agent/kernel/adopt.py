"""Taking over what an older ABI of weir has pinned: the same maps and links, pinned once more where this ABI looks.

No value is copied, so no count is lost and no rule is away for a moment: the loader then swaps the programs in place in
the links. Killed at any step, it is done again by the next load. What this cannot do is carry a map whose layout has
changed: such a map needs a new name, or a conversion here.
"""

from __future__ import annotations

import ctypes as c
import os
from contextlib import suppress
from pathlib import Path

from agent.errors import WeirError
from agent.kernel import abi, libbpf
from agent.kernel.pins import Pins, explained

ADOPTED = ("abi-1",)
"""ABI 1 has all maps but `spare`, `slots` and `labels`, and means the same by what it has. The names of rules are in a map of
maps there, `rules`."""


def refuse_unknown(pins: Pins) -> None:
    """Raise WeirError when there are pins of a version that this one knows nothing of: its rules may be in force."""
    unknown = [name for name in pins.foreign() if name not in ADOPTED]
    if unknown:
        raise WeirError(
            f"{pins.root} holds the pins of another version of weir ({', '.join(unknown)}), which this one cannot take over",
            "Use that version, or remove them when nothing depends on them: weir unload --force",
        )


def adopt(pins: Pins) -> int | None:
    """Pin an older ABI's maps and links here as well; returns how many containers its tables hold, None without one.

    Raises WeirError, having changed nothing, when a map of it has another layout.
    """
    for name in pins.foreign():
        capacity = _capacity(pins.root / name)
        if capacity:
            _share(pins, pins.root / name)
            return capacity
    return None


def forget(pins: Pins) -> None:
    """Remove the pins of older ABIs: what this one has taken over stays, by its own pins."""
    for name in pins.foreign():
        pins.remove_base(pins.root / name)


def _capacity(old: Path) -> int | None:
    """How many containers a finished load of that ABI was for; None when nothing whole is there."""
    config = abi.Config()
    if not (old / "maps/config").exists() or not (old / "maps/cgroups").exists():
        return None
    with explained(f"read {old}"):
        fd = libbpf.obj_get(old / "maps/config")
        try:
            libbpf.lookup(fd, c.c_uint32(0), config)
        finally:
            os.close(fd)
        fd = libbpf.obj_get(old / "maps/cgroups")
        try:
            return libbpf.map_info(fd).max_entries if config.build else None
        finally:
            os.close(fd)


def _share(pins: Pins, old: Path) -> None:
    for name in abi.MAPS:
        if (old / "maps" / name).exists():
            _require_layout(old / "maps" / name)
    for name in abi.MAPS:
        _pin_again(old / "maps" / name, pins.maps / name)
    _pin_rules(old / "maps/rules", pins)
    for directory in (old / "links").iterdir():
        for name in abi.PROGRAMS:
            (pins.links / directory.name).mkdir(mode=0o700, exist_ok=True)
            _pin_again(directory / name, pins.links / directory.name / name)


def _pin_rules(old: Path, pins: Pins) -> None:
    """Pin the inner maps of ABI 1's map of rules. Without CAP_SYS_ADMIN old refusals lose the names of their rules."""
    if not old.exists():
        return
    outer, inner = libbpf.obj_get(old), c.c_uint32()
    try:
        for key in libbpf.keys(outer, c.c_uint32):
            pin = pins.rules / str(key.value)
            if pin.exists() or not libbpf.lookup(outer, key, inner):
                continue
            with suppress(PermissionError):
                fd = libbpf.map_by_id(inner.value)
                try:
                    libbpf.obj_pin(fd, pin)
                finally:
                    os.close(fd)
    finally:
        os.close(outer)


def _require_layout(pin: Path) -> None:
    """The loader takes a pinned map as it finds it, whatever its layout."""
    key, value = abi.MAPS[pin.name]
    with explained(f"read {pin}"):
        fd = libbpf.obj_get(pin)
        try:
            info = libbpf.map_info(fd)
        finally:
            os.close(fd)
    if (info.key_size, info.value_size) != (c.sizeof(key) if key else 0, c.sizeof(value) if value else 0):
        raise WeirError(
            f"the map {pin} has another layout than this weir's",
            "Use the version that made it, or remove it when nothing depends on it: weir unload --force",
        )


def _pin_again(old: Path, new: Path) -> None:
    if not old.exists() or new.exists():
        return
    with explained(f"take over {old}"):
        fd = libbpf.obj_get(old)
        try:
            libbpf.obj_pin(fd, new)
        finally:
            os.close(fd)
