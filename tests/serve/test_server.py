"""A real server over a real socket, with an encoder and an index small enough to reason about."""

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from serve_fakes import CARD, DIMENSION, STRANGER, FakeEncoder, FakeSearcher, FakeSource, Running, Start

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.errors import ArtifactError, EncoderMismatch, ServeError
from retrieval_kd.runs import Ranking
from serve.config import ServeConfig
from serve.engine import Engine
from serve.limits import Limits
from serve.server import check, serve
from serve.service import ADMIN_SERVICE, SERVICES

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> rpc.RetrievalServiceStub:
    return rpc.RetrievalServiceStub(channel)


def details(error: grpc.RpcError, kind: type[Message]) -> Message:
    message = kind()
    assert any(detail.Unpack(message) for detail in rpc_status.from_call(error).details)
    return message


def offline(encoder: FakeEncoder, searcher: FakeSearcher, texts: list[str], k: int) -> list[Ranking]:
    return searcher.search(encoder.texts_vectors(texts), k)


def pairs(hits: Iterable[pb.Hit]) -> list[tuple[str, float]]:
    return [(hit.doc_id, hit.score) for hit in hits]


def ranking_pairs(ranking: Ranking) -> list[tuple[str, float]]:
    return list(zip(ranking.doc_ids, ranking.scores.tolist(), strict=True))


def test_a_served_ranking_is_the_offline_one_to_the_bit(
    stub: rpc.RetrievalServiceStub, encoder: FakeEncoder, searcher: FakeSearcher
) -> None:
    """Evaluation is done offline; if serving ranked differently its figures would be about something else."""
    response = stub.Search(pb.SearchRequest(text="red wine", top_k=7))
    (expected,) = offline(encoder, searcher, ["red wine"], 7)
    assert pairs(response.hits) == ranking_pairs(expected)
    assert [hit.rank for hit in response.hits] == list(range(1, 8))
    assert response.index_version == searcher.version
    assert response.query_encoder == CARD.fingerprint


def test_fewer_documents_than_top_k_gives_them_all(stub: rpc.RetrievalServiceStub, searcher: FakeSearcher) -> None:
    """Padding a short ranking would invent documents."""
    assert len(stub.Search(pb.SearchRequest(text="x", top_k=1000)).hits) == searcher.count


def test_a_batch_gives_what_single_searches_give(stub: rpc.RetrievalServiceStub, encoder: FakeEncoder) -> None:
    """Batch and single have to agree, texts and vectors in either encoding mixed, in the callers' order."""
    vectors = encoder.texts_vectors(["b", "d"])
    queries = [
        pb.Query(text="a"),
        pb.Query(vector=pb.Vector(floats=pb.FloatVector(values=vectors[0]))),
        pb.Query(text="c c"),
        pb.Query(vector=pb.Vector(f32_le=vectors[1].astype("<f4").tobytes())),
    ]
    batch = stub.BatchSearch(pb.BatchSearchRequest(queries=queries, top_k=5))
    singles = [stub.Search(pb.SearchRequest(text=text, top_k=5)) for text in ("a", "b", "c c", "d")]
    assert [pairs(result.hits) for result in batch.results] == [pairs(single.hits) for single in singles]


def test_embed_answers_in_the_encoding_asked_for(channel: grpc.Channel, encoder: FakeEncoder) -> None:
    """Bytes in the wrong order or width give vectors that look plausible and find nothing."""
    stub = rpc.EmbeddingServiceStub(channel)
    expected = encoder.texts_vectors(["a", "b"])
    plain = stub.Embed(pb.EmbedRequest(texts=["a", "b"]))
    assert np.array_equal(np.array([v.floats.values for v in plain.vectors], dtype=np.float32), expected)
    packed = stub.Embed(pb.EmbedRequest(texts=["a", "b"], vector_encoding=pb.VECTOR_ENCODING_F32_LE))
    assert b"".join(v.f32_le for v in packed.vectors) == expected.astype("<f4").tobytes()
    assert packed.query_encoder == CARD.fingerprint


def test_sixty_four_callers_get_what_they_asked(
    stub: rpc.RetrievalServiceStub, encoder: FakeEncoder, searcher: FakeSearcher
) -> None:
    """One shared index into a batch, off by one, and callers read each other's results."""
    texts = [f"query {i} {'word ' * (i % 7)}" for i in range(64)]
    expected = offline(encoder, searcher, texts, 3)
    with ThreadPoolExecutor(64) as callers:
        answers = list(callers.map(lambda text: stub.Search(pb.SearchRequest(text=text, top_k=3)), texts * 3))
    for answer, ranking in zip(answers, expected * 3, strict=True):
        assert pairs(answer.hits) == ranking_pairs(ranking)


def test_nothing_heavy_runs_on_the_event_loop(
    stub: rpc.RetrievalServiceStub, encoder: FakeEncoder, searcher: FakeSearcher
) -> None:
    """A model on the loop freezes health checks and every other caller for as long as it runs."""
    stub.Search(pb.SearchRequest(text="a", top_k=1))
    assert {name.split("_")[0] for name in encoder.threads} == {"search", "encoder"}
    assert {name.split("_")[0] for name in searcher.threads} == {"search"}


def test_timings_add_up(server: Running, stub: rpc.RetrievalServiceStub, encoder: FakeEncoder) -> None:
    """Parts that exceed the whole, or a wait counted as work, send people to tune the wrong thing."""
    encoder.gate.clear()
    encoder.busy.clear()
    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(stub.Search, pb.SearchRequest(text="a", top_k=1))
        assert encoder.busy.wait(10)
        second = callers.submit(stub.Search, pb.SearchRequest(text="b", top_k=1))
        server.wait_for("rkd_queued", 1, unit="texts")
        time.sleep(0.1)
        encoder.gate.set()
        held, queued = first.result().timings, second.result().timings
    for times in (held, queued):
        parts = times.tokenize_ns + times.queue_ns + times.encode_ns + times.search_ns
        assert 0 < parts <= times.total_ns
        assert times.search_ns > 0
        assert times.tokenize_ns > 0
    # No machine sleeps shorter than it was told.
    assert held.encode_ns >= 100e6
    assert queued.queue_ns >= 100e6


def test_every_violation_is_in_the_details(stub: rpc.RetrievalServiceStub) -> None:
    """Programs read BadRequest, people read the message: both must have all of it."""
    with pytest.raises(grpc.RpcError) as refused:
        stub.Search(pb.SearchRequest(text=" ", top_k=0))
    error = refused.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    fields = [violation.field for violation in details(error, error_details_pb2.BadRequest).field_violations]
    assert fields == ["text", "top_k"]
    assert details(error, error_details_pb2.ErrorInfo).reason == "INVALID_REQUEST"


def test_a_batch_full_of_faults_is_still_answered_readably(stub: rpc.RetrievalServiceStub) -> None:
    """Two hundred violations must not turn into a transport error about metadata."""
    queries = [pb.Query(vector=pb.Vector(floats=pb.FloatVector(values=[float("nan")] * DIMENSION)))] * 256
    with pytest.raises(grpc.RpcError) as refused:
        stub.BatchSearch(pb.BatchSearchRequest(queries=queries, top_k=3))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "NaN" in refused.value.details()


def test_a_response_beyond_the_message_limit_is_refused_with_its_cause(start: Start) -> None:
    """Ids may be long: the transport's own error would name neither cause nor remedy."""
    running = start(FakeEncoder(), FakeSearcher(id_format="d" * 900 + "{}"), Limits(max_message_bytes=32 * 1024))
    with grpc.insecure_channel(running.target) as channel:
        stub = rpc.RetrievalServiceStub(channel)
        assert len(stub.BatchSearch(pb.BatchSearchRequest(queries=[pb.Query(text="a")], top_k=30)).results) == 1
        with pytest.raises(grpc.RpcError) as refused:
            stub.BatchSearch(pb.BatchSearchRequest(queries=[pb.Query(text="a")] * 2, top_k=30))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "top_k: makes a response of" in refused.value.details()


def test_a_batch_that_cannot_fit_is_refused_before_it_is_searched(start: Start, searcher: FakeSearcher) -> None:
    """Without it a server would search and build megabytes for seconds, only to throw them away."""
    running = start(searcher=searcher, limits=Limits(max_message_bytes=32 * 1024))
    before = len(searcher.efforts)
    request = pb.BatchSearchRequest(queries=[pb.Query(text="a")] * 10, top_k=1000)
    with grpc.insecure_channel(running.target) as channel, pytest.raises(grpc.RpcError) as refused:
        rpc.RetrievalServiceStub(channel).BatchSearch(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "top_k: makes a response of" in refused.value.details()
    assert len(searcher.efforts) == before


def test_a_message_of_seven_mebibytes_passes(stub: rpc.RetrievalServiceStub) -> None:
    """The 4 MB default of gRPC on either side is the most reported surprise of such services."""
    queries = [pb.Query(text="word " * 6000)] * 256
    request = pb.BatchSearchRequest(queries=queries, top_k=1)
    assert request.ByteSize() > 7 * 2**20
    with pytest.raises(grpc.RpcError) as refused:
        stub.BatchSearch(pb.BatchSearchRequest(queries=queries, top_k=0))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_cancelled_call_is_never_encoded(
    server: Running, stub: rpc.RetrievalServiceStub, encoder: FakeEncoder
) -> None:
    """Work for callers who left is how an overloaded server stays overloaded."""
    encoder.gate.clear()
    encoder.busy.clear()
    first = stub.Search.future(pb.SearchRequest(text="first", top_k=1))
    assert encoder.busy.wait(10)
    leaving = stub.Search.future(pb.SearchRequest(text="leaving", top_k=1))
    server.wait_for("rkd_queued", 1, unit="texts")
    leaving.cancel()
    server.wait_for("rkd_requests_in_flight", 1)
    encoder.gate.set()
    assert len(first.result(10).hits) == 1
    assert len(stub.Search(pb.SearchRequest(text="last", top_k=1)).hits) == 1
    (row,) = encoder.tokenize(["leaving"], "query")
    assert all(tuple(row) not in batch for batch in encoder.runs)


def test_an_expired_call_is_never_encoded(
    server: Running, stub: rpc.RetrievalServiceStub, encoder: FakeEncoder
) -> None:
    """A deadline that passed in the queue must cost the encoder nothing."""
    encoder.gate.clear()
    encoder.busy.clear()
    first = stub.Search.future(pb.SearchRequest(text="first", top_k=1))
    assert encoder.busy.wait(10)
    with pytest.raises(grpc.RpcError) as late:
        stub.Search(pb.SearchRequest(text="late", top_k=1), timeout=0.2)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    server.wait_for("rkd_requests_in_flight", 1)
    encoder.gate.set()
    first.result(10)
    stub.Search(pb.SearchRequest(text="last", top_k=1))
    (row,) = encoder.tokenize(["late"], "query")
    assert all(tuple(row) not in batch for batch in encoder.runs)


@pytest.mark.parametrize(
    ("limits", "timeout"),
    [(Limits(default_deadline_ms=200), None), (Limits(max_deadline_ms=200), 20)],
    ids=["none given", "too late"],
)
def test_the_server_sets_a_deadline_of_its_own(
    start: Start, encoder: FakeEncoder, limits: Limits, timeout: float | None
) -> None:
    """A call without a deadline, or with one of a year, would hold its place for ever."""
    running = start(encoder, limits=limits)
    encoder.gate.clear()
    with grpc.insecure_channel(running.target) as channel, pytest.raises(grpc.RpcError) as late:
        rpc.RetrievalServiceStub(channel).Search(pb.SearchRequest(text="a", top_k=1), timeout=timeout)
    # The caller's own deadline would come without details, and the encoder's gate opens for nobody.
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details(late.value, error_details_pb2.ErrorInfo).reason == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize(
    "limits",
    [Limits(max_queued_texts=2), Limits(max_queued_tokens=2), Limits(max_concurrent_requests=3)],
    ids=["texts", "tokens", "requests"],
)
def test_overload_is_refused_at_once_and_ends_with_the_load(start: Start, encoder: FakeEncoder, limits: Limits) -> None:
    """A queue without bound answers everybody too late; a refusal that outlives its cause answers nobody."""
    running = start(encoder, limits=limits)
    with grpc.insecure_channel(running.target) as channel:
        stub = rpc.RetrievalServiceStub(channel)
        encoder.gate.clear()
        encoder.busy.clear()
        accepted = [stub.Search.future(pb.SearchRequest(text="a", top_k=1))]
        assert encoder.busy.wait(10)
        accepted += [stub.Search.future(pb.SearchRequest(text=text, top_k=1)) for text in "bc"]
        running.wait_for("rkd_queued", 2, unit="texts")
        with pytest.raises(grpc.RpcError) as refused:
            stub.Search(pb.SearchRequest(text="d", top_k=1), timeout=10)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not any(call.done() for call in accepted), "it waited for what was there before it"
        assert details(refused.value, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        encoder.gate.set()
        assert [len(call.result(10).hits) for call in accepted] == [1, 1, 1]
        assert len(stub.Search(pb.SearchRequest(text="d", top_k=1)).hits) == 1


def test_vector_queries_do_not_wait_for_the_encoder(stub: rpc.RetrievalServiceStub, encoder: FakeEncoder) -> None:
    """A caller who brings a vector must be answered even while the encoder is stuck."""
    encoder.gate.clear()
    encoder.busy.clear()
    stuck = stub.Search.future(pb.SearchRequest(text="a", top_k=1))
    assert encoder.busy.wait(10)
    vector = pb.Vector(floats=pb.FloatVector(values=[1.0] * DIMENSION))
    response = stub.Search(pb.SearchRequest(vector=vector, top_k=2), timeout=5)
    assert len(response.hits) == 2
    assert response.timings.encode_ns == response.timings.queue_ns == response.timings.tokenize_ns == 0
    encoder.gate.set()
    stuck.result(10)


def test_a_broken_encoder_is_an_internal_error_without_its_cause(
    stub: rpc.RetrievalServiceStub, encoder: FakeEncoder
) -> None:
    """Causes hold paths and texts; and one broken batch must not take the server down."""
    encoder.error = RuntimeError("secret path")
    with pytest.raises(grpc.RpcError) as broken:
        stub.Search(pb.SearchRequest(text="a", top_k=1))
    assert broken.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in broken.value.details()
    encoder.error = None
    assert len(stub.Search(pb.SearchRequest(text="a", top_k=1)).hits) == 1


def test_index_and_server_describe_themselves(channel: grpc.Channel, server: Running, searcher: FakeSearcher) -> None:
    """Clients size their batches by what is said here; it has to be what is enforced."""
    index = rpc.IndexServiceStub(channel).GetIndex(pb.GetIndexRequest())
    assert (index.index_version, index.kind, index.document_count, index.dimension) == (
        searcher.version,
        "exact",
        searcher.count,
        DIMENSION,
    )
    assert index.document_encoder.fingerprint == CARD.fingerprint
    info = rpc.ServerInfoServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest())
    assert info.query_encoder.space_fingerprint == CARD.space_fingerprint
    sent = {field.name: getattr(info.limits, field.name) for field in pb.Limits.DESCRIPTOR.fields}
    assert Limits(**sent) == server.limits


def test_health_knows_every_service_and_refuses_unknown_ones(channel: grpc.Channel) -> None:
    """Load balancers ask by service name; a name that is always healthy tells them nothing."""
    stub = health_pb2_grpc.HealthStub(channel)
    for full in ("", *SERVICES):
        assert stub.Check(health_pb2.HealthCheckRequest(service=full)).status == SERVING
    # The longest would not fit into an error's metadata, were it quoted.
    for stranger in ("nobody", "n" * 20_000, "語" * 3_000):
        with pytest.raises(grpc.RpcError) as unknown:
            stub.Check(health_pb2.HealthCheckRequest(service=stranger))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_knows_the_administration_only_where_it_is_offered(
    server: Running, start: Start, tmp_path: Path
) -> None:
    """Without it a balancer would be told of a healthy service whose every call is UNIMPLEMENTED."""
    (tmp_path / "tokens").write_text("admin 0123456789abcdef-admin\n")
    asked = health_pb2.HealthCheckRequest(service=ADMIN_SERVICE)
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as unknown:
        health_pb2_grpc.HealthStub(channel).Check(asked)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    with grpc.insecure_channel(start(tokens=tmp_path / "tokens").target) as channel:
        assert health_pb2_grpc.HealthStub(channel).Check(asked).status == SERVING


def test_each_port_reports_the_health_of_what_it_offers(start: Start) -> None:
    """Without it the main port would call the administration healthy that only the other port has, and the reverse."""
    port = free_port()
    with (
        grpc.insecure_channel(start(admin_port=port).target) as main,
        grpc.insecure_channel(f"127.0.0.1:{port}") as admin,
    ):
        asked = {name: health_pb2.HealthCheckRequest(service=name) for name in ("", SERVICES[0], ADMIN_SERVICE)}
        for channel, known, unknown in ((main, SERVICES[0], ADMIN_SERVICE), (admin, ADMIN_SERVICE, SERVICES[0])):
            stub = health_pb2_grpc.HealthStub(channel)
            assert stub.Check(asked[""]).status == stub.Check(asked[known]).status == SERVING
            with pytest.raises(grpc.RpcError) as refused:
                stub.Check(asked[unknown])
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_check_finds_that_tracing_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a check passes, and the server then dies of the missing extra in the middle of the rollout."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    config = ServeConfig(tmp_path, tmp_path, port=0, trace="127.0.0.1:4317")
    with pytest.raises(ServeError, match=r"tracing needs .*; pip install 'retrieval-kd\[otel\]'"):
        asyncio.run(check(config))


@pytest.mark.parametrize("option", ["port", "admin_port", "metrics_port"])
def test_a_check_finds_a_taken_port_before_the_start_does(tmp_path: Path, option: str) -> None:
    """Without it a check passes, and the server then dies of the port in the middle of the rollout."""
    config = ServeConfig(tmp_path, tmp_path, port=0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = replace(config, **{option: other.getsockname()[1]})
        with pytest.raises(ServeError, match=rf"--{option.replace('_', '-')}: cannot listen on 127.0.0.1:\d+ \(Addr"):
            asyncio.run(check(taken))
    with pytest.raises(ArtifactError):  # the ports are free now, and the store is the next thing wrong
        asyncio.run(check(taken))


def test_a_check_blames_the_host_for_a_host_that_is_none(tmp_path: Path) -> None:
    """Another port, which the message would otherwise ask for, never helps."""
    config = ServeConfig(tmp_path, tmp_path, host="no such host", port=0, insecure=True)
    with pytest.raises(ServeError, match=r"--host: cannot listen on no such host \(.*\); give an address"):
        asyncio.run(check(config))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("port", "admin_port"), "--admin-port: {} is --port's already"),
        (("port", "metrics_port"), "--metrics-port: {} is --port's already"),
        (("admin_port", "metrics_port"), "--metrics-port: {} is --admin-port's already"),
    ],
)
def test_a_check_finds_a_port_given_twice(tmp_path: Path, given: tuple[str, str], message: str) -> None:
    """Without it each port is free by itself, the check passes, and the server then dies of its own port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ServeConfig(tmp_path, tmp_path, port=0, metrics_port=0)
    with pytest.raises(ServeError, match=message.format(port)):
        asyncio.run(check(replace(config, **dict.fromkeys(given, port))))
    with pytest.raises(ArtifactError):  # 0 may come twice, and the store is the next thing wrong
        asyncio.run(check(replace(config, admin_port=port)))


def test_reflection_lists_the_services_and_finds_their_file(channel: grpc.Channel) -> None:
    """Without reflection grpcurl needs the .proto at hand, which nobody has during an incident."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="dense.retrieval.v1.RetrievalService"),
    ]
    listed, found = stub.ServerReflectionInfo(iter(requests))
    names = {service.name for service in listed.list_services_response.service}
    assert names >= set(SERVICES)
    assert "grpc.health.v1.Health" in names
    assert found.file_descriptor_response.file_descriptor_proto


def config_of(port: int) -> ServeConfig:
    return ServeConfig(Path("store"), Path("encoder"), port=port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_while_loading_the_port_is_open_and_says_not_serving(loop: asyncio.AbstractEventLoop) -> None:
    """A server that cannot be reached while it loads looks dead, and is killed by whoever watches it."""
    port, may_load, stop, limits = free_port(), threading.Event(), asyncio.Event(), Limits()

    def load() -> Engine:
        assert may_load.wait(20)
        return Engine(FakeEncoder(), FakeSource(FakeSearcher()), limits, 1)

    done = asyncio.run_coroutine_threadsafe(serve(load, stop, config_of(port)), loop)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=20)
            assert next(watch).status == NOT_SERVING
            with pytest.raises(grpc.RpcError) as early:
                rpc.RetrievalServiceStub(channel).Search(pb.SearchRequest(text="a", top_k=1))
            assert early.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "still loading" in early.value.details()
            may_load.set()
            assert next(watch).status == SERVING
            loop.call_soon_threadsafe(stop.set)
            assert next(watch).status == NOT_SERVING
    finally:
        may_load.set()
        loop.call_soon_threadsafe(stop.set)
        done.result(20)


@pytest.mark.parametrize("step", ["load", "open", "warm up"])
def test_a_stop_while_loading_ends_the_server_without_its_ever_serving(
    loop: asyncio.AbstractEventLoop, step: str
) -> None:
    """Without it SIGTERM is deaf for as long as a large index loads, and traffic then comes to a server that leaves."""
    stop, reached, may_go_on, ready = asyncio.Event(), threading.Event(), threading.Event(), []
    encoder, searcher = FakeEncoder(), FakeSearcher()

    def hold() -> None:
        reached.set()
        assert may_go_on.wait(20)

    def load() -> Engine:
        if step == "load":
            hold()
        return Engine(encoder, FakeSource(searcher), Limits(), 1)

    if step == "open":
        searcher.self_test = hold
    elif step == "warm up":
        encoder.busy, encoder.gate = reached, may_go_on
    done = asyncio.run_coroutine_threadsafe(serve(load, stop, config_of(0), on_ready=ready.append), loop)
    try:
        assert reached.wait(20)
        loop.call_soon_threadsafe(stop.set)
        if step != "warm up":  # there the batcher waits for the batch that its thread is in
            done.result(5)
    finally:
        may_go_on.set()
        done.result(20)
    assert ready == []
    if step == "open":
        give_up = time.monotonic() + 10
        while not searcher.closed:
            assert time.monotonic() < give_up, "what was opened for nobody must be let go"
            time.sleep(0.01)


def test_stopping_finishes_the_calls_in_flight(start: Start, encoder: FakeEncoder) -> None:
    """A deployment that drops answers already being computed is seen by users as an outage."""
    running = start(encoder)
    with grpc.insecure_channel(running.target) as channel:
        stub = rpc.RetrievalServiceStub(channel)
        encoder.gate.clear()
        encoder.busy.clear()
        calls = [stub.Search.future(pb.SearchRequest(text=text, top_k=1)) for text in "ab"]
        running.wait_for("rkd_requests_in_flight", 2)
        assert encoder.busy.wait(10)
        running.begin_stop()
        time.sleep(0.2)
        assert not running.done.done()
        encoder.gate.set()
        assert [len(call.result(10).hits) for call in calls] == [1, 1]
        running.done.result(20)


def test_a_wrong_query_encoder_never_serves(start: Start) -> None:
    """Vectors of another space give plausible rankings of nothing."""
    with pytest.raises(EncoderMismatch, match="query encoder 'stranger'"):
        start(FakeEncoder(STRANGER))


def test_a_taken_port_is_one_clear_error(server: Running, loop: asyncio.AbstractEventLoop) -> None:
    """Two servers on one port share its calls in silence, and half of them go to the old index."""

    def load() -> Engine:
        raise AssertionError("must not load when the port is taken")

    second = asyncio.run_coroutine_threadsafe(serve(load, asyncio.Event(), config_of(server.port)), loop)
    with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1:{server.port}: the port is taken"):
        second.result(20)


def search_threads() -> int:
    return sum(thread.name.startswith("search_") for thread in threading.enumerate())


def test_the_search_threads_are_there_before_the_first_request() -> None:
    """A thread that the pool cannot start when a request comes leaves work behind that is done on unmapped files."""

    async def entered() -> int:
        async with Engine(FakeEncoder(), FakeSource(FakeSearcher()), Limits(), 3):
            return search_threads() - before

    before = search_threads()
    assert asyncio.run(entered()) == 3
    assert search_threads() == before


def test_a_machine_that_starts_no_more_threads_is_said_so_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were started would wait for the others for ever, and the server with them."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "search_2":
            raise RuntimeError("can't start new thread")
        start(thread)

    async def entered() -> None:
        async with Engine(FakeEncoder(), FakeSource(FakeSearcher()), Limits(), 3):
            pytest.fail("the engine has a thread too few")

    meetings: list[threading.Barrier] = []
    rescued = threading.Event()

    class Meeting(threading.Barrier):
        def __init__(self, parties: int) -> None:
            super().__init__(parties)
            meetings.append(self)

    def rescue() -> None:
        rescued.set()
        for meeting in meetings:
            meeting.abort()

    before, watch = search_threads(), threading.Timer(10, rescue)
    watch.start()
    monkeypatch.setattr(threading, "Barrier", Meeting)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ServeError, match=r"cannot start 3 threads \(can't start new thread\); lower --threads"):
        asyncio.run(entered())
    watch.cancel()
    assert not rescued.is_set(), "the threads that were started waited for the others"
    assert search_threads() == before
