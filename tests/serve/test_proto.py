"""The protocol's style rules and its generated modules."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grpc_tools
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import status_pb2

from protos.dense.retrieval.v1 import retrieval_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
STORED = Path(__file__).with_name("protocols")
PROTO = Path("protos/dense/retrieval/v1/retrieval.proto")
FILE = pb.DESCRIPTOR


def methods() -> list[MethodDescriptor]:
    return [method for service in FILE.services_by_name.values() for method in service.methods]


def protoc(out: Path, *extra: str) -> None:
    plugins = [
        f"--plugin={name}={Path(sys.executable).parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    kinds = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    includes = [".", str(Path(grpc_tools.__file__).parent / "_proto"), str(Path(status_pb2.__file__).parents[2])]
    paths = [word for include in includes for word in ("-I", include)]
    command = [sys.executable, "-m", "grpc_tools.protoc", *paths, *plugins, *kinds, *extra]
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


def breaks(old: descriptor_pb2.FileDescriptorProto, new: descriptor_pb2.FileDescriptorProto) -> list[str]:
    """Return what a client made from the old file would miss or misread in the new one: buf's breaking rules FILE."""
    found = []

    def by(items: Iterable, key: str) -> dict:
        return {getattr(item, key): item for item in items}

    def same(where: str, one: object, other: object, *names: str) -> None:
        found.extend(f"{where}: {name} changed" for name in names if getattr(one, name) != getattr(other, name))

    def pairs(where: str, kind: str, olds: Iterable, news: Iterable, key: str) -> Iterator[tuple[str, object, object]]:
        now = by(news, key)
        for name, one in by(olds, key).items():
            place = f"{where}{kind} {name}"
            if name in now:
                yield place, one, now[name]
            else:
                found.append(f"{place}: gone")

    same("file", old, new, "package")
    for place, one, other in pairs("", "message", old.message_type, new.message_type, "name"):
        for spot, field, after in pairs(f"{place}, ", "field", one.field, other.field, "number"):
            same(spot, field, after, "name", "type", "type_name", "label", "proto3_optional")
            groups = [
                message.oneof_decl[which.oneof_index].name if which.HasField("oneof_index") else ""
                for message, which in ((one, field), (other, after))
            ]
            if groups[0] != groups[1]:
                found.append(f"{spot}: moved from oneof {groups[0]!r} to {groups[1]!r}")
    for place, one, other in pairs("", "enum", old.enum_type, new.enum_type, "name"):
        for spot, value, after in pairs(f"{place}, ", "value", one.value, other.value, "number"):
            same(spot, value, after, "name")
    for place, one, other in pairs("", "service", old.service, new.service, "name"):
        for spot, method, after in pairs(f"{place}, ", "method", one.method, other.method, "name"):
            same(spot, method, after, "input_type", "output_type", "client_streaming", "server_streaming")
    return found


def current() -> descriptor_pb2.FileDescriptorProto:
    proto = descriptor_pb2.FileDescriptorProto()
    FILE.CopyToProto(proto)
    return proto


def stored(path: Path) -> descriptor_pb2.FileDescriptorProto:
    files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
    return next(file for file in files if file.package == FILE.package)


@pytest.mark.parametrize("path", sorted(STORED.glob("*.binpb")), ids=lambda path: path.stem)
def test_clients_of_every_stored_protocol_still_work(path: Path) -> None:
    """Without it a renumbered field would be read as another one by every client in the field.

    Each released revision is stored with: protoc --descriptor_set_out=tests/serve/protocols/v1-N.binpb
    """
    assert breaks(stored(path), current()) == []


def test_the_newest_stored_protocol_has_all_there_is() -> None:
    """A field that no stored revision has could be renumbered after clients have begun to read it."""
    newest = max(STORED.glob("*.binpb"), key=lambda path: int(path.stem.removeprefix("v1-")))
    assert breaks(current(), stored(newest)) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda file: file.message_type[0].field[0].__setattr__("number", 900), "message .*, field 1: gone"),
        (lambda file: file.message_type[0].field[0].__setattr__("name", "other"), "name changed"),
        (lambda file: file.message_type[0].field[0].__setattr__("type", 9), "type changed"),
        (lambda file: file.message_type[1].field[0].ClearField("oneof_index"), "moved from oneof"),
        (lambda file: file.enum_type[0].value.pop(), "enum .*, value 3: gone"),
        (lambda file: file.service[0].method.pop(), "method StreamSearch: gone"),
        (lambda file: file.service[0].method[2].__setattr__("client_streaming", False), "client_streaming changed"),
    ],
)
def test_every_kind_of_break_is_seen(
    change: Callable[[descriptor_pb2.FileDescriptorProto], object], complaint: str
) -> None:
    """Without it the comparison could pass everything, and would be trusted."""
    broken = current()
    change(broken)
    found = breaks(current(), broken)
    assert found
    assert re.search(complaint, found[0]), found


def test_services_are_named_service_and_offer_what_the_issue_names() -> None:
    """A renamed method breaks every client that was generated from the old file."""
    offered = {name: [m.name for m in service.methods] for name, service in FILE.services_by_name.items()}
    assert offered == {
        "RetrievalService": ["Search", "BatchSearch", "StreamSearch"],
        "RerankService": ["Rerank"],
        "EmbeddingService": ["Embed", "StreamEmbed"],
        "IndexService": ["ListIndexes", "GetIndex"],
        "IndexAdminService": ["PublishIndex", "RollbackIndex", "UpsertDocuments", "DeleteDocuments"],
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
            assert not field.is_required
    for service in FILE.services_by_name.values():
        assert re.fullmatch(r"([A-Z][a-z0-9]+)+Service", service.name)
        assert all(re.fullmatch(r"([A-Z][a-z0-9]+)+", method.name) for method in service.methods)
    used = [message for method in methods() for message in (method.input_type.name, method.output_type.name)]
    assert len(used) == len(set(used)), "RPC_REQUEST_RESPONSE_UNIQUE"


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
            for o, one in enumerate(message.oneof_decl):
                if not one.name.startswith("_"):  # what proto3 makes of an optional field
                    yield (4, m, 8, o), f"{message.name}.{one.name}"
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
