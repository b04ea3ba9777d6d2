"""The protocol's style rules and its generated modules."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc_tools
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import MethodDescriptor

from protos.dense.retrieval.v1 import retrieval_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
PROTO = Path("protos/dense/retrieval/v1/retrieval.proto")
FILE = pb.DESCRIPTOR


def methods() -> list[MethodDescriptor]:
    return [method for service in FILE.services_by_name.values() for method in service.methods]


def protoc(out: Path, *extra: str) -> None:
    plugins = [
        f"--plugin={name}={Path(sys.executable).parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    kinds = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    include = Path(grpc_tools.__file__).parent / "_proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", "-I", str(include), *plugins, *kinds, *extra]
    subprocess.run([*command, str(PROTO)], cwd=ROOT, check=True, capture_output=True)


def test_generated_modules_are_those_of_the_proto(tmp_path: Path) -> None:
    """Without it someone edits the .proto, forgets `make proto`, and client and documentation drift apart."""
    if shutil.which("protoc-gen-mypy", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("mypy-protobuf is not installed")
    protoc(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    assert [path.name for path in made] == [
        "retrieval_pb2.py",
        "retrieval_pb2.pyi",
        "retrieval_pb2_grpc.py",
        "retrieval_pb2_grpc.pyi",
    ]
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"{path}: run make proto"


def test_package_matches_its_folder_and_has_a_version() -> None:
    """Buf PACKAGE_DIRECTORY_MATCH and PACKAGE_VERSION_SUFFIX: importers find files by package."""
    assert FILE.package == "dense.retrieval.v1"
    assert PROTO.parent.as_posix().endswith(FILE.package.replace(".", "/"))


def test_services_are_named_service_and_offer_what_the_issue_names() -> None:
    """A renamed method breaks every client that was generated from the old file."""
    offered = {name: [m.name for m in service.methods] for name, service in FILE.services_by_name.items()}
    assert offered == {
        "RetrievalService": ["Search", "BatchSearch"],
        "EmbeddingService": ["Embed"],
        "IndexService": ["GetIndex"],
        "ServerInfoService": ["GetServerInfo"],
    }


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_each_method_has_its_own_request_and_response(method: MethodDescriptor) -> None:
    """A shared message cannot gain a field for one method alone."""
    assert method.input_type.name == f"{method.name}Request"
    assert method.output_type.name == f"{method.name}Response"


def test_enum_values_are_prefixed_and_zero_is_unspecified() -> None:
    """Proto3 cannot tell a zero that was sent from one that was not, so zero must mean nothing."""
    assert FILE.enum_types_by_name
    for name, enum in FILE.enum_types_by_name.items():
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(f"{prefix}_") for value in enum.values)


def test_names_follow_the_style_guide() -> None:
    """Mixed styles give generated code mixed styles, in every language."""
    for message in FILE.message_types_by_name.values():
        assert re.fullmatch(r"[A-Z][A-Za-z0-9]*", message.name)
        for field in message.fields:
            assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name), f"{message.name}.{field.name}"


def test_everything_is_commented_and_times_name_their_unit(tmp_path: Path) -> None:
    """A field whose unit has to be guessed will be guessed wrong."""
    protoc(tmp_path, f"--descriptor_set_out={tmp_path / 'set.bin'}", "--include_source_info")
    files = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set.bin").read_bytes()).file
    proto = next(file for file in files if file.name == str(PROTO))
    comments = {tuple(place.path): place.leading_comments.strip() for place in proto.source_code_info.location}

    def elements() -> Iterator[tuple[tuple[int, ...], str]]:
        for m, message in enumerate(proto.message_type):
            yield (4, m), message.name
            yield from (((4, m, 2, f), f"{message.name}.{field.name}") for f, field in enumerate(message.field))
            yield from (((4, m, 8, o), f"{message.name}.{one.name}") for o, one in enumerate(message.oneof_decl))
        for e, enum in enumerate(proto.enum_type):
            yield (5, e), enum.name
            yield from (((5, e, 2, v), value.name) for v, value in enumerate(enum.value))
        for s, service in enumerate(proto.service):
            yield (6, s), service.name
            yield from (((6, s, 2, m), f"{service.name}.{method.name}") for m, method in enumerate(service.method))

    assert [name for path, name in elements() if not comments.get(path)] == []
    for path, name in elements():
        if name.endswith("_ns"):
            assert "nanoseconds" in comments[path], name
        if name.endswith("_ms"):
            assert "milliseconds" in comments[path], name
        if name.endswith("_bytes"):
            assert "bytes" in comments[path], name
