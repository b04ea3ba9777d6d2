"""Hostile requests on every call: whatever comes in, only statuses that the protocol documents go out."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from google.protobuf import struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fakes import DIMENSION, FakeReranker, Start, real_store
from test_hot_swap import TOKEN

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from serve import service

DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
CODES = {code.value[0]: code for code in grpc.StatusCode}
EXAMPLES = 60
METHODS = [method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods]
METHODS_BY_NAME = {method.name: method for method in METHODS}
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


def codes_of(call: Callable[[], Sequence[Message]]) -> list[grpc.StatusCode]:
    """Return how a call ended, and before it what became of each request of a stream."""
    try:
        answers = call()
    except grpc.RpcError as error:
        ended = error
    else:
        failed = [answer.error for answer in answers if "error" in answer.DESCRIPTOR.fields_by_name]
        return [*(code_of(status) for status in failed if status.code), grpc.StatusCode.OK]
    status = rpc_status.from_call(ended)
    assert status is not None, f"without details: {ended}"
    return [code_of(status)]


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """Return a status' code; every status says by whom and why."""
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details), status
    assert info.domain == "dense.retrieval"
    return CODES[status.code]


def serialized(message: Message) -> bytes:
    return message.SerializeToString()


def calls(channel: grpc.Channel, method: MethodDescriptor) -> Callable[[Message], list[Message]]:
    """Return what sends a request to a method, to one of streams twice, and reads all of its answers."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    reader = GetMessageClass(method.output_type).FromString
    metadata = [("authorization", f"Bearer {TOKEN}")]
    if method.client_streaming:
        call = channel.stream_stream(path, request_serializer=serialized, response_deserializer=reader)
        return lambda request: list(call(iter([request, request]), timeout=10, metadata=metadata))
    call = channel.unary_unary(path, request_serializer=serialized, response_deserializer=reader)
    return lambda request: [call(request, timeout=10, metadata=metadata)]


@pytest.fixture
def channel(start: Start, tmp_path: Path) -> Iterator[grpc.Channel]:
    """A server with everything: two versions of a real index, a reranker, and the admin role."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    source = real_store(tmp_path / "store", 30, 40)
    running = start(searcher=source, reranker=FakeReranker(), tokens=tmp_path / "tokens")
    with grpc.insecure_channel(running.target) as channel:
        yield channel


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_any_request_is_answered_by_a_documented_status(channel: grpc.Channel, method: MethodDescriptor) -> None:
    """Fault: fuzzed requests. Without it one odd message could crash a worker, or show a trace to a stranger."""
    call = calls(channel, method)
    seen = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
    @given(messages(method.input_type))
    def examine(request: Message) -> None:
        seen.update(codes_of(lambda: call(request)))

    examine()
    assert set(seen) <= DOCUMENTED, seen
    health = calls(channel, METHODS_BY_NAME["GetServerInfo"])
    assert codes_of(lambda: health(pb.GetServerInfoRequest())) == [grpc.StatusCode.OK]


@pytest.mark.parametrize(
    ("method", "servicer", "step", "request_"),
    [
        ("StreamSearch", service.Retrieval, "_search", pb.StreamSearchRequest()),
        ("StreamEmbed", service.Embedding, "_embed", pb.StreamEmbedRequest()),
        ("Search", service.Retrieval, "_search", pb.SearchRequest()),
    ],
)
def test_a_fault_in_the_server_would_be_seen(
    channel: grpc.Channel,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    servicer: type,
    step: str,
    request_: Message,
) -> None:
    """Without it whoever reads the answers could overlook every error, and the tests here pass whatever happens."""

    async def fails(*_: object) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(servicer, step, fails)
    call = calls(channel, METHODS_BY_NAME[method])
    assert not set(codes_of(lambda: call(request_))) <= DOCUMENTED


def test_wild_numbers_in_vectors_of_the_right_width_are_answered(channel: grpc.Channel) -> None:
    """Without it a NaN or an overflow could reach the index, where it ranks nothing or everything."""
    call = calls(channel, METHODS_BY_NAME["Search"])
    seen = Counter()

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(vectors(), st.integers(1, 50))
    def examine(vector: pb.Vector, k: int) -> None:
        seen.update(codes_of(lambda: call(pb.SearchRequest(vector=vector, top_k=k))))

    examine()
    assert set(seen) == {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}


def test_bytes_that_are_no_message_are_refused(channel: grpc.Channel) -> None:
    """Without it a broken client could take a handler down before validation sees anything."""
    raw = channel.unary_unary("/dense.retrieval.v1.RetrievalService/Search")
    for garbage in (b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"\x1a\x03abc", bytes(range(256))):
        with pytest.raises(grpc.RpcError) as refused:
            raw(garbage, timeout=5, metadata=[("authorization", f"Bearer {TOKEN}")])
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    search = calls(channel, METHODS_BY_NAME["Search"])
    assert len(search(pb.SearchRequest(text="a", top_k=3))[0].hits) == 3
