"""api.proto of the agent and of the tests: generated as committed, and numbered as containerd has it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

import agent.cri.api_pb2
import tests.node.api_pb2
from tests import need

_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("proto", ["agent/cri/api.proto", "tests/node/api.proto"])
def test_generated_as_committed(proto: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc_tools") is None:
        need.skip("needs the Python package grpcio-tools")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{_ROOT}", proto]
    subprocess.run([*command, f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"], cwd=_ROOT, check=True)
    for name in (proto.replace(".proto", "_pb2.py"), proto.replace(".proto", "_pb2.pyi")):
        assert (_ROOT / name).read_text() == (tmp_path / name).read_text(), f"{proto} says how to make {name} anew"


@pytest.fixture(scope="module", name="cri")
def _cri() -> dict[str, DescriptorProto]:
    """Every message of the CRI API v1: Go programs carry the descriptors of what they speak, compressed by gzip."""
    program = Path(need.command("containerd")).read_bytes()
    for start in re.finditer(rb"\x1f\x8b\x08", program):
        try:
            data = zlib.decompressobj(wbits=31).decompress(program[start.start() : start.start() + (1 << 20)])
        except zlib.error:
            continue
        if b"\x12\x0aruntime.v1" in data[:40]:  # field 2, package
            return {message.name: message for message in FileDescriptorProto.FromString(data).message_type}
    return need.skip("needs a containerd that carries the CRI's descriptor")


def fields(message: DescriptorProto) -> Iterator[tuple[str, FieldDescriptorProto]]:
    """Path and field of a message and of those nested in it (maps are such messages)."""
    for field in message.field:
        yield f"{message.name}.{field.name}", field
    for nested in message.nested_type:
        yield from fields(nested)


def test_field_numbers(cri: dict[str, DescriptorProto]) -> None:
    seen = 0
    for module in (agent.cri.api_pb2, tests.node.api_pb2):
        file = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        for message in file.message_type:
            theirs = dict(fields(cri[message.name]))
            for path, ours in fields(message):
                their = theirs[path]
                assert (ours.number, ours.type, ours.label) == (their.number, their.type, their.label), path
                seen += 1
    assert seen > 100
