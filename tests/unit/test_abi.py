"""agent/kernel/abi.py against the C compiler: every structure, field and number of bpf/abi.h, in both directions."""

from __future__ import annotations

import ctypes
import inspect
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent.kernel import abi, source
from agent.policy import compile as policy_compile
from tests import need

HEADER = source.directory() / "abi.h"

ENUMS: dict[str, dict[str, int]] = {
    "weir_hook": {f"WEIR_HOOK_{hook.name}": hook for hook in abi.Hook},
    "weir_reason": {f"WEIR_REASON_{reason.name}": reason for reason in abi.Reason},
    "weir_destination": {f"WEIR_{name.upper()}": index for index, name in enumerate(abi.DESTINATIONS)}
    | {"WEIR_DESTINATIONS": len(abi.DESTINATIONS)},
}
"""enum of the header -> its members as Python has them."""

NUMBERS = {
    name: value for name, value in vars(abi).items() if name.isupper() and isinstance(value, int) and name[0] != "_"
}
DEFINES = {f"WEIR_{name}": value for name, value in NUMBERS.items()} | {
    f"WEIR_{flag.name}": int(flag) for flag in abi.Flag
}


def structures() -> dict[str, type[ctypes.Structure]]:
    """Each structure of abi.py under the name that its docstring gives it in C."""
    found = {}
    for _, member in inspect.getmembers(abi, inspect.isclass):
        if issubclass(member, ctypes.Structure):
            match = re.match(r"struct (weir_\w+)", member.__doc__ or "")
            assert match, f"{member.__name__}: its docstring does not begin with the name of its structure in C"
            found[match[1]] = member
    return found


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def names_in_header() -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    """(structure -> its fields, enum -> its members, defines) as the text of the header has them."""
    text = without_comments(HEADER.read_text())
    bodies = re.findall(r"struct (weir_\w+)\s*\{(.*?)\};", text, re.DOTALL)
    fields = {name: re.findall(r"(\w+)\s*(?:\[[^]]*\])?\s*;", body) for name, body in bodies}
    enums = {
        name: re.findall(r"(WEIR_\w+)", body)
        for name, body in re.findall(r"enum (weir_\w+)\s*\{(.*?)\};", text, re.DOTALL)
    }
    defines = re.findall(r"^#define (WEIR_\w+)[ \t]+\S", text, re.MULTILINE)
    return fields, enums, defines


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sizes, offsets and numbers as gcc sees them."""
    gcc = need.command("gcc")
    fields, enums, defines = names_in_header()
    lines = []
    for name, members in fields.items():
        lines.append(f'printf("\\"struct {name}\\": %zu,\\n", sizeof(struct {name}));')
        lines += [
            f'printf("\\"{name}.{member}\\": [%zu, %zu],\\n", offsetof(struct {name}, {member}),'
            f" sizeof(((struct {name} *)0)->{member}));"
            for member in members
        ]
    for name in [*defines, *(member for members in enums.values() for member in members)]:
        lines.append(f'printf("\\"{name}\\": %llu,\\n", (unsigned long long)({name}));')
    folder = tmp_path_factory.mktemp("abi")
    program = folder / "abi.c"
    program.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/types.h>\n"
        f'#include "{HEADER}"\nint main(void)\n{{\nputs("{{");\n' + "\n".join(lines) + '\nputs("\\"\\": 0}");\n}\n'
    )
    subprocess.run([gcc, "-Wall", "-Werror", "-o", folder / "abi", program], check=True)
    answer: dict[str, Any] = json.loads(subprocess.run([folder / "abi"], capture_output=True, check=True).stdout)
    return answer


def test_every_structure_has_a_twin() -> None:
    assert sorted(names_in_header()[0]) == sorted(structures())


def test_every_enum_has_a_twin() -> None:
    assert {name: sorted(members) for name, members in names_in_header()[1].items()} == {
        name: sorted(members) for name, members in ENUMS.items()
    }


def test_every_define_has_a_twin() -> None:
    assert sorted(names_in_header()[2]) == sorted(DEFINES)


def test_the_header_holds_nothing_that_these_tests_overlook() -> None:
    """What is left when comments, structures, enums, defines and the include guard are taken away: nothing."""
    text = without_comments(HEADER.read_text())
    text = re.sub(r"(struct|enum) weir_\w+\s*\{.*?\};", "", text, flags=re.DOTALL)
    text = re.sub(r"^#(ifndef|define) WEIR_ABI_H$|^#define WEIR_\w+[ \t]+.*$|^#endif$", "", text, flags=re.MULTILINE)
    assert not text.strip()


@pytest.mark.parametrize("name", sorted(structures()))
def test_structure(name: str, compiled: dict[str, Any]) -> None:
    twin = structures()[name]
    in_c = {key.split(".")[1]: value for key, value in compiled.items() if key.startswith(f"{name}.")}
    in_python = {field[0]: [getattr(twin, field[0]).offset, getattr(twin, field[0]).size] for field in twin._fields_}
    assert in_python == in_c
    assert ctypes.sizeof(twin) == compiled[f"struct {name}"]


@pytest.mark.parametrize("name", sorted(structures()))
def test_structure_has_no_hole(name: str) -> None:
    """A hole in a key is bytes that nobody sets: two equal keys would differ (the verifier refuses to read them, too)."""
    twin = structures()[name]
    assert sum(getattr(twin, field[0]).size for field in twin._fields_) == ctypes.sizeof(twin)


def test_numbers(compiled: dict[str, Any]) -> None:
    members = {name: int(value) for twins in ENUMS.values() for name, value in twins.items()}
    expected = DEFINES | members
    assert {name: compiled[name] for name in expected} == expected


def test_the_compiler_of_policies_has_the_same_limits() -> None:
    """policy/ may not import kernel/, so it repeats two numbers."""
    assert (policy_compile.MAX_RULES, policy_compile.DEFAULT_RULE) == (abi.MAX_RULES, abi.DEFAULT_RULE)


def test_maps_and_programs_are_those_of_the_text() -> None:
    text = without_comments(source.text(source.directory()))
    tables = re.findall(r'^BPF_(?:F_)?TABLE\("[^"]+", [^,]+, [^,]+, (\w+),', text, re.MULTILINE)
    others = re.findall(r'^BPF_QUEUESTACK\("queue", (\w+),|"maps/ringbuf".*? struct \w+ (\w+)', text, re.MULTILINE)
    assert sorted([*tables, *("".join(names) for names in others)]) == sorted(abi.MAPS)
    assert sorted(re.findall(r"^int weir_(\w+)\(", text, re.MULTILINE)) == sorted(abi.PROGRAMS)


def test_attach_types_are_those_of_the_uapi_header(tmp_path: Path) -> None:
    gcc = need.command("gcc")
    members = {
        "sock_create": "BPF_CGROUP_INET_SOCK_CREATE",
        "sock_release": "BPF_CGROUP_INET_SOCK_RELEASE",
        "connect4": "BPF_CGROUP_INET4_CONNECT",
        "connect6": "BPF_CGROUP_INET6_CONNECT",
        "sendmsg4": "BPF_CGROUP_UDP4_SENDMSG",
        "sendmsg6": "BPF_CGROUP_UDP6_SENDMSG",
        "bind4": "BPF_CGROUP_INET4_BIND",
        "bind6": "BPF_CGROUP_INET6_BIND",
        "egress": "BPF_CGROUP_INET_EGRESS",
        "ingress": "BPF_CGROUP_INET_INGRESS",
    }
    prints = "".join(f'printf("%d\\n", {members[name]});' for name in abi.PROGRAMS)
    program = tmp_path / "types.c"
    program.write_text(f"#include <stdio.h>\n#include <linux/bpf.h>\nint main(void) {{ {prints} }}\n")
    subprocess.run([gcc, "-o", tmp_path / "types", program], check=True)
    answer = subprocess.run([tmp_path / "types"], capture_output=True, check=True, text=True).stdout
    assert [int(line) for line in answer.split()] == [attach_type for _, attach_type in abi.PROGRAMS.values()]
