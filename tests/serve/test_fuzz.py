"""Hostile requests on every call: whatever comes in, only statuses that the protocol documents go out."""

import threading
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from google.protobuf import struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from serve_fakes import DIMENSION, FakeReranker, FakeSource, Running, Start
from test_hot_swap import TOKEN, versions

from protos.dense.retrieval.v1 import retrieval_pb2 as pb

DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
METHODS = [method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods]
TEXTS = st.one_of(
    st.sampled_from(["", " ", "a", "doc-1", "red wine", "\x00", "number", "*", "0000000001-cafe", "x" * 600]),
    st.text(max_size=12).filter(lambda text: text.isprintable()),
)
NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1e-45, float("nan"), float("inf"), float("-inf")]),
    st.floats(width=32),
)
SCALARS = {
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: st.one_of(
        st.binary(max_size=9), st.just(b"\x00\x3c" * DIMENSION), st.just(b"\xff" * 4 * DIMENSION)
    ),
    FieldDescriptor.TYPE_FLOAT: NUMBERS,
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_UINT32: st.one_of(st.integers(0, 50), st.sampled_from([1000, 1001, 2**31, 2**32 - 1])),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_ENUM: st.one_of(st.integers(0, 3), st.sampled_from([99, -1])),
}
STRUCTS = st.dictionaries(
    st.sampled_from(["number", "title", "other"]), st.one_of(st.none(), st.booleans(), st.floats(), TEXTS), max_size=3
)


def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
    """Return messages of a type: any subset of its fields, any values, nested to some depth."""
    if descriptor.full_name == "google.protobuf.Struct":
        return STRUCTS.map(struct)
    fields = {}
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if depth >= 6:
                continue
            value = st.deferred(lambda field=field: messages(field.message_type, depth + 1))
        else:
            value = SCALARS[field.type]
        fields[field.name] = st.lists(value, max_size=4) if field.is_repeated else value
    kind = GetMessageClass(descriptor)
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


def struct(values: dict[str, object]) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update(values)
    return made


def vectors() -> st.SearchStrategy[pb.Vector]:
    """Return vectors of the right width, which random messages almost never have."""
    return st.lists(NUMBERS, min_size=DIMENSION, max_size=DIMENSION).map(
        lambda numbers: pb.Vector(floats=pb.FloatVector(values=numbers))
    )


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    """One server for all examples, in a loop of its own."""
    import asyncio
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from serve.config import ServeConfig
    from serve.engine import Engine
    from serve.limits import Limits
    from serve.metrics import Metrics
    from serve_fakes import FakeEncoder

    raise NotImplementedError


def code_of(call: object) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        status = rpc_status.from_call(error)
        assert status is not None, f"without details: {error}"
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in status.details), error
        assert info.domain == "dense.retrieval"
        return error.code()
    return grpc.StatusCode.OK
