"""The calls of libbpf that weir makes, through ctypes, and nothing above them.

libbpf is a dependency of BCC, so it is there wherever the programs can be loaded. Each function raises OSError with the
kernel's errno. Sizes are the map's own: the caller passes ctypes structures of bpf/abi.h.
"""

from __future__ import annotations

import ctypes as c
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from agent.errors import WeirError

BPF_ANY = 0
BPF_NOEXIST = 1
BPF_F_NO_PREALLOC = 1
BPF_MAP_TYPE_LPM_TRIE = 11
BPF_MAP_TYPE_ARRAY = 2


class MapInfo(c.Structure):
    """The head of struct bpf_map_info (linux/bpf.h)."""

    _fields_ = [
        ("type", c.c_uint32),
        ("id", c.c_uint32),
        ("key_size", c.c_uint32),
        ("value_size", c.c_uint32),
        ("max_entries", c.c_uint32),
        ("map_flags", c.c_uint32),
    ]


class LinkInfo(c.Structure):
    """The head of struct bpf_link_info, with the cgroup member of its union (linux/bpf.h)."""

    _fields_ = [
        ("type", c.c_uint32),
        ("id", c.c_uint32),
        ("prog_id", c.c_uint32),
        ("pad", c.c_uint32),
        ("cgroup_id", c.c_uint64),
        ("attach_type", c.c_uint32),
    ]


@lru_cache(maxsize=1)
def library() -> c.CDLL:
    """libbpf, loaded once.

    Raises WeirError when it is not installed.
    """
    try:
        lib = c.CDLL("libbpf.so.1", use_errno=True)
    except OSError as e:
        raise WeirError(f"libbpf cannot be loaded: {e}", "Install it: apt-get install libbpf1 python3-bpfcc") from e
    lib.libbpf_set_print(None)
    lib.ring_buffer__new.restype = c.c_void_p
    return lib


def _call(name: str, *args: Any) -> int:
    result: int = getattr(library(), name)(*args)
    if result < 0:
        number = c.get_errno() or -result
        raise OSError(number, os.strerror(number), name)
    return result


def _path(path: str | os.PathLike[str]) -> bytes:
    return os.fsencode(path)


def obj_get(path: str | os.PathLike[str]) -> int:
    """Open a pinned object; returns a descriptor that the caller closes."""
    return _call("bpf_obj_get", _path(path))


def obj_pin(fd: int, path: str | os.PathLike[str]) -> None:
    """Pin an object on bpffs."""
    _call("bpf_obj_pin", fd, _path(path))


def map_info(fd: int) -> MapInfo:
    """What the kernel says of a map."""
    info = MapInfo()
    size = c.c_uint32(c.sizeof(info))
    _call("bpf_obj_get_info_by_fd", fd, c.byref(info), c.byref(size))
    return info


def link_info(fd: int) -> LinkInfo:
    """What the kernel says of a cgroup link; ``cgroup_id`` is 0 when its cgroup is gone."""
    info = LinkInfo()
    size = c.c_uint32(c.sizeof(info))
    _call("bpf_obj_get_info_by_fd", fd, c.byref(info), c.byref(size))
    return info


def map_create(kind: int, name: str, key: int, value: int, entries: int, flags: int = 0) -> int:
    """Make a map; sizes in bytes. Returns a descriptor that the caller closes."""

    class Options(c.Structure):
        """struct bpf_map_create_opts of libbpf 0.7, up to map_flags."""

        _fields_ = [
            ("sz", c.c_size_t),
            ("btf_fd", c.c_uint32),
            ("btf_key_type_id", c.c_uint32),
            ("btf_value_type_id", c.c_uint32),
            ("btf_vmlinux_value_type_id", c.c_uint32),
            ("inner_map_fd", c.c_uint32),
            ("map_flags", c.c_uint32),
        ]

    options = Options(sz=c.sizeof(Options), map_flags=flags)
    return _call("bpf_map_create", kind, name.encode(), key, value, entries, c.byref(options))


def require_privilege() -> None:
    """Raise PermissionError unless this process may make maps that need CAP_BPF, by making one."""
    os.close(map_create(BPF_MAP_TYPE_LPM_TRIE, "privilege", 8, 4, 1, BPF_F_NO_PREALLOC))


def update(fd: int, key: Any, value: Any, flags: int = BPF_ANY) -> None:
    """One element; for a per-CPU map the value is an array, one item per possible CPU."""
    _call("bpf_map_update_elem", fd, c.byref(key), c.byref(value), c.c_uint64(flags))


def lookup(fd: int, key: Any, value: Any) -> bool:
    """Fill ``value``; False when the key is not there."""
    try:
        _call("bpf_map_lookup_elem", fd, c.byref(key), c.byref(value))
    except FileNotFoundError:
        return False
    return True


def map_by_id(number: int) -> int:
    """Open a map by its id (an inner map, as a look-up in the outer one gives it)."""
    return _call("bpf_map_get_fd_by_id", number)


def delete(fd: int, key: Any) -> None:
    """Remove one element; one that is not there is no error."""
    with suppress(FileNotFoundError):
        _call("bpf_map_delete_elem", fd, c.byref(key))


def keys(fd: int, key_type: Any) -> Iterator[Any]:
    """Every key of a hash map, each a fresh structure.

    The kernel starts again at the first key when the last one given was deleted meanwhile, so a key can come twice.
    """
    last = None
    while True:
        following = key_type()
        try:
            _call("bpf_map_get_next_key", fd, None if last is None else c.byref(last), c.byref(following))
        except FileNotFoundError:
            return
        yield following
        last = following


BATCH = 512


class _BatchOptions(c.Structure):
    """struct bpf_map_batch_opts."""

    _fields_ = [("sz", c.c_size_t), ("elem_flags", c.c_uint64), ("flags", c.c_uint64)]


def batches(fd: int, key_type: Any, value_type: Any) -> Iterator[tuple[Any, Any]]:
    """Every element of a map: pairs of ctypes arrays, keys and values; one by one where the map has no batches.

    The items of an array of one of ctypes' numbers are Python's ints. An element that is written meanwhile may be missed or come with its old value, as in any walk of a hash map.
    """
    options = _BatchOptions(sz=c.sizeof(_BatchOptions))
    size, position, more = BATCH, None, True
    while more:
        keys_, values, count = (key_type * size)(), (value_type * size)(), c.c_uint32(size)
        following = c.create_string_buffer(max(c.sizeof(key_type), 4))
        try:
            _call("bpf_map_lookup_batch", fd, position, following, keys_, values, c.byref(count), c.byref(options))
        except FileNotFoundError:
            more = False  # the last batch: what there is of it is there
        except OSError as e:
            if e.errno == errno.ENOSPC:  # one bucket of a hash holds more than a batch
                size *= 2
                continue
            if position is not None:
                raise
            yield from _one_by_one(fd, key_type, value_type)
            return
        position = following
        if count.value:
            yield (key_type * count.value).from_buffer(keys_), (value_type * count.value).from_buffer(values)


def _one_by_one(fd: int, key_type: Any, value_type: Any) -> Iterator[tuple[Any, Any]]:
    for key in keys(fd, key_type):
        values = (value_type * 1)()
        if lookup(fd, key, values):
            yield (key_type * 1).from_buffer(key), values


def push(fd: int, value: Any) -> None:
    """One element into a queue."""
    _call("bpf_map_update_elem", fd, None, c.byref(value), c.c_uint64(BPF_ANY))


def pop(fd: int, value: Any) -> bool:
    """Take the oldest element of a queue; False when it is empty."""
    try:
        _call("bpf_map_lookup_and_delete_elem", fd, None, c.byref(value))
    except FileNotFoundError:
        return False
    return True


def update_batch(fd: int, keys_: Any, values: Any) -> None:
    """Many elements: two ctypes arrays of the same length. One by one where the map type has no batches."""
    count = c.c_uint32(len(keys_))

    options = _BatchOptions(sz=c.sizeof(_BatchOptions))
    try:
        _call("bpf_map_update_batch", fd, keys_, values, c.byref(count), c.byref(options))
    except OSError:
        for key, value in zip(keys_, values, strict=True):
            update(fd, key, value)


def link_create(program: int, cgroup: int, attach_type: int) -> int:
    """Attach a program to a cgroup; returns the link's descriptor. Until it is pinned, closing it detaches."""
    return _call("bpf_link_create", program, cgroup, attach_type, None)


def link_update(link: int, program: int) -> None:
    """Put another program in the place of the link's, in one step."""
    _call("bpf_link_update", link, program, None)


def possible_cpus() -> int:
    """How many values a per-CPU element has."""
    return _call("libbpf_num_possible_cpus")


class RingBuffer:
    """A consumer of a ring buffer. Only one may read at a time: the position is the ring's own."""

    def __init__(self, fd: int) -> None:
        self._records: list[bytes] = []
        prototype = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_void_p, c.c_size_t)
        self._callback = prototype(self._take)
        pointer = library().ring_buffer__new(fd, self._callback, None, None)
        if not pointer:
            number = c.get_errno()
            raise OSError(number, os.strerror(number), "ring_buffer__new")
        self._ring = c.c_void_p(pointer)

    def _take(self, _context: int, data: int, size: int) -> int:
        self._records.append(c.string_at(data, size))
        return 0

    def poll(self, milliseconds: int) -> Sequence[bytes]:
        """The records that are there, waiting at most so long for the first."""
        with suppress(InterruptedError):
            _call("ring_buffer__poll", self._ring, milliseconds)
        taken, self._records = self._records, []
        return taken

    def close(self) -> None:
        """Free the mapping."""
        library().ring_buffer__free(self._ring)
