"""What an operator sees: metrics, traces, JSON logs, the check before serving, the dashboard, drain and reload."""

import asyncio
import dataclasses
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serve_fakes import CARD, STRANGER, FakeEncoder, FakeSearcher, Running, Start, real_store
from typer.testing import CliRunner

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.cli.main import app
from retrieval_kd.errors import EncoderMismatch, ServeError
from serve import server as server_module
from serve.client import AsyncRetrievalClient, Options, RetrievalClient
from serve.config import ServeConfig
from serve.limits import Limits
from serve.logs import ACCESS, JsonFormatter
from serve.metrics import Metrics, serve_metrics
from serve.readiness import Readiness
from serve.service import SERVICES
from serve.tls import CertificateFiles
from serve.tracing import NoTracer, OtelTracer, open_tracer

ROOT = Path(__file__).resolve().parents[2]
SEARCH = "/dense.retrieval.v1.RetrievalService/Search"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_calls_stages_and_the_served_version_are_counted(start: Start) -> None:
    """Without it an operator learns of an outage from users."""
    port = free_port()
    running = start(metrics_port=port)
    with RetrievalClient(running.target) as client:
        for text in ("a", "b", "c"):
            client.search(text)
        with pytest.raises(ServeError):
            client.search(" ")
    sample = running.metrics.registry.get_sample_value
    assert sample("rkd_requests_total", {"method": SEARCH, "code": "OK"}) == 3
    assert sample("rkd_requests_total", {"method": SEARCH, "code": "INVALID_ARGUMENT"}) == 1
    assert sample("rkd_request_seconds_count", {"method": SEARCH}) == 4
    for stage in ("tokenize", "encode", "search"):
        assert sample("rkd_stage_seconds_count", {"stage": stage}) == 3
    assert sample("rkd_index_version") == 1
    assert sample("rkd_index_documents") == 40
    assert sample("rkd_requests_in_flight") == 0
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        assert f'rkd_requests_total{{code="OK",method="{SEARCH}"}} 3.0' in page.read().decode()


def test_a_call_that_is_cancelled_leaves_no_call_in_flight(start: Start, encoder: FakeEncoder) -> None:
    """Without it the gauge would creep up until the bound on calls refuses everybody."""
    running = start(encoder, limits=Limits(max_concurrent_requests=1))
    with grpc.insecure_channel(running.target) as channel:
        stub = rpc.RetrievalServiceStub(channel)
        encoder.gate.clear()
        encoder.busy.clear()
        call = stub.Search.future(pb.SearchRequest(text="a", top_k=1))
        assert encoder.busy.wait(10)
        call.cancel()
        running.wait_for("rkd_requests_in_flight", 0)
        encoder.gate.set()
        assert len(stub.Search(pb.SearchRequest(text="b", top_k=1)).hits) == 1
    sample = running.metrics.registry.get_sample_value
    assert sample("rkd_requests_in_flight") == 0
    assert sample("rkd_requests_total", {"method": SEARCH, "code": "CANCELLED"}) == 1


def test_a_taken_metrics_port_is_one_line() -> None:
    """Without it the server would run blind, or end in a trace."""
    with serve_metrics(Metrics().registry, "127.0.0.1", 0) as port:
        second = serve_metrics(Metrics().registry, "127.0.0.1", port)
        with pytest.raises(ServeError, match=f"cannot serve metrics on 127.0.0.1:{port}"):
            second.__enter__()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Collect what a server started with ``trace="memory"`` would send."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(server_module, "open_tracer", lambda endpoint: OtelTracer(provider) if endpoint else NoTracer())
    return exporter


def test_a_call_is_a_child_of_its_callers_span_and_says_where_its_time_went(
    start: Start, spans: InMemorySpanExporter
) -> None:
    """Without it a slow page could not be followed into the search behind it."""
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with grpc.insecure_channel(start(trace="memory").target) as channel:
        stub = rpc.RetrievalServiceStub(channel)
        metadata = [("traceparent", f"00-{trace}-{parent}-01")]
        stub.Search(pb.SearchRequest(text="secret words", top_k=1), metadata=metadata)
        with pytest.raises(grpc.RpcError):
            stub.Search(pb.SearchRequest(text=" ", top_k=1))
    searched, refused = spans.get_finished_spans()
    assert searched.name == SEARCH.lstrip("/")
    assert f"{searched.context.trace_id:032x}" == trace
    assert f"{searched.parent.span_id:016x}" == parent
    assert searched.attributes["rpc.method"] == "Search"
    assert searched.attributes["rkd.encode_ns"] > 0
    assert not refused.status.is_ok
    assert "secret" not in str(searched.to_json())


def test_tracing_is_off_unless_a_collector_is_named() -> None:
    """Without it every server would try to reach a collector that is not there."""
    assert isinstance(open_tracer(None), NoTracer)
    tracer = open_tracer("127.0.0.1:1")
    assert isinstance(tracer, OtelTracer)
    tracer.close()


def test_json_logs_name_each_call_and_never_its_text(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it private queries would lie in a log store for years, or a call could not be found at all."""
    monkeypatch.setattr(ACCESS, "level", logging.INFO)
    ACCESS.manager._clear_cache()
    with caplog.at_level(logging.INFO), grpc.insecure_channel(start().target) as channel:
        stub = rpc.RetrievalServiceStub(channel)
        stub.Search(pb.SearchRequest(text="secret words", top_k=1), metadata=[("x-request-id", "r-17")])
        with pytest.raises(grpc.RpcError):
            stub.Search(pb.SearchRequest(text="secret words", top_k=0), metadata=[("x-request-id", "bad id")])
    lines = [JsonFormatter().format(record) for record in caplog.records]
    calls = [json.loads(line) for line in lines if '"serve.access"' in line]
    assert [(call["method"], call["code"]) for call in calls] == [(SEARCH, "OK"), (SEARCH, "INVALID_ARGUMENT")]
    assert calls[0]["request_id"] == "r-17"
    assert re.fullmatch(r"[0-9a-f]{32}", calls[1]["request_id"])
    assert calls[0]["ms"] > 0
    assert not any("secret" in line for line in lines)
    monkeypatch.undo()
    ACCESS.manager._clear_cache()


def test_a_logged_failure_keeps_its_trace_on_one_line() -> None:
    """Without it a trace would be cut into lines that a log store takes for twenty messages."""
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("serve", logging.ERROR, "", 0, "request %s failed", ("r",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "request r failed"
    assert "ValueError: broken" in json.loads(line)["trace"]


def test_draining_says_not_serving_before_it_refuses(start: Start, encoder: FakeEncoder) -> None:
    """Without it a load balancer would send calls to a server that already refuses them."""
    running = start(encoder, drain_delay=2.0)
    with grpc.insecure_channel(running.target) as channel, RetrievalClient(running.target) as client:
        health = health_pb2_grpc.HealthStub(channel)
        assert len(client.search("a").hits) == 10
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        running.begin_stop()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert len(client.search("a").hits) == 10
    running.done.result(20)


def test_an_open_watch_ends_with_a_status_and_holds_up_no_stop(start: Start, encoder: FakeEncoder) -> None:
    """Without it every stop behind a balancer that watches takes all of the grace, and the watch ends broken."""
    running = start(encoder, drain_seconds=60.0)
    with grpc.insecure_channel(running.target) as channel:
        watches = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=name))
            for name in ("", SERVICES[0], "nobody")
        ]
        first = [next(watch).status for watch in watches]
        running.begin_stop()
        running.done.result(20)
        last = [[answer.status for answer in watch] for watch in watches]
    answer = health_pb2.HealthCheckResponse
    assert first == [answer.SERVING, answer.SERVING, answer.SERVICE_UNKNOWN]
    assert last == [[answer.NOT_SERVING], [answer.NOT_SERVING], []]
    assert {watch.code() for watch in watches} == {grpc.StatusCode.OK}


def test_a_watcher_who_does_not_read_keeps_the_news_from_nobody() -> None:
    """Without it one silent connection would keep a server that stops from telling its balancer."""

    class Reader:
        def __init__(self, reads: bool) -> None:
            self.seen: list[int] = []
            self.reads = asyncio.Event()
            if reads:
                self.reads.set()

        async def write(self, answer: health_pb2.HealthCheckResponse) -> None:
            await self.reads.wait()
            self.seen.append(answer.status)

    async def main() -> None:
        readiness, deaf, reader = Readiness(["service"]), Reader(reads=False), Reader(reads=True)
        asked = health_pb2.HealthCheckRequest()
        watches = [asyncio.create_task(readiness.Watch(asked, one)) for one in (deaf, reader)]
        await asyncio.sleep(0)
        readiness.announce(health_pb2.HealthCheckResponse.SERVING)
        readiness.announce(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(0)
        readiness.announce(health_pb2.HealthCheckResponse.SERVING)
        readiness.close()
        await asyncio.wait_for(watches[1], 5)
        deaf.reads.set()
        await asyncio.wait_for(watches[0], 5)
        assert reader.seen == [health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING]
        # What it was about to be sent, and then the state as it is.
        assert deaf.seen == reader.seen

    asyncio.run(main())


def dashboard() -> dict[str, object]:
    return json.loads((ROOT / "ops" / "grafana-dashboard.json").read_text())


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    """Without it a renamed metric leaves an empty panel that looks like a quiet service."""
    known = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    known |= {f"{family.name}{end}" for family in Metrics().registry.collect()
              for end in ("", "_total", "_bucket", "_count", "_sum")}  # fmt: skip
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    assert len(expressions) >= 8
    for expression in expressions:
        names = re.findall(r"rkd_\w+", expression)
        assert names, expression
        assert set(names) <= known, expression
    shown = {name for expression in expressions for name in re.findall(r"rkd_\w+", expression)}
    families = {family.name for family in Metrics().registry.collect()}
    assert {
        next(f for f in sorted(families, key=len, reverse=True) if name.startswith(f)) for name in shown
    } == families


def test_the_async_client_does_what_the_other_does(client: RetrievalClient, server: Running) -> None:
    """Without it the two would drift apart, and one of them be wrong."""

    async def main() -> None:
        async with AsyncRetrievalClient(server.target) as own:
            texts = ["a", "b b", "c"]
            together = await asyncio.gather(*(own.search(text, top_k=4) for text in texts))
            assert [result.hits for result in together] == [client.search(text, top_k=4).hits for text in texts]
            options = Options(filter={"eq": {"number": 3}}, fields=["number"])
            assert (await own.search("a", options=options)).hits == client.search("a", options=options).hits
            assert [r.hits for r in await own.batch_search(texts, 2)] == [r.hits for r in client.batch_search(texts, 2)]
            streamed = [result.hits async for result in own.search_stream(texts, 2)]
            assert streamed == [result.hits for result in client.search_stream(texts, 2)]
            assert (await own.embed(texts)).tolist() == client.embed(texts).tolist()
            assert (await own.embed_stream(texts)).tolist() == client.embed(texts).tolist()
            assert (await own.search_sets([["a"]], [["b"]])).hits == client.search_sets([["a"]], [["b"]]).hits
            assert await own.server_info() == client.server_info()
            assert await own.index() == client.index()
            assert await own.indexes() == client.indexes()
            await own.wait_until_ready(5)
            with pytest.raises(ServeError, match="embed_stream: texts has 0 entries; give at least 1"):
                await own.embed_stream([])
            with pytest.raises(ServeError, match=r"search at .*: text: is blank"):
                await own.search(" ")

    asyncio.run(main())


def test_a_batch_larger_than_the_server_takes_is_sent_in_pieces(client: RetrievalClient) -> None:
    """Without it every caller would write that loop, and some would lose the last piece."""
    texts = [f"text {i}" for i in range(300)]
    results = client.batch_search(texts, 2)
    assert len(results) == 300
    assert results[299].hits == client.search(texts[299], top_k=2).hits


def test_check_opens_everything_and_serves_nothing(tmp_path: Path) -> None:
    """Without it a wrong path or a key that does not fit is found out during the rollout."""
    verb = [sys.executable, "-m", "retrieval_kd.cli.main", "serve", tmp_path, "--port", 0, "--check"]
    verb += ["--encoder", tmp_path]
    done = subprocess.run([*map(str, verb)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr


def test_a_wrong_encoder_never_serves_and_says_so(start: Start) -> None:
    """Fault: wrong encoder at load. Without it vectors of another space rank nonsense in good order."""
    with pytest.raises(Exception, match="cannot search documents encoded by 'fake'"):
        start(FakeEncoder(STRANGER), FakeSearcher())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query_prefix": "query: "}, "has query_prefix 'query: ' instead of ''"),
        ({"max_length": 16}, "has max_length 16 instead of 64"),
        ({"dimensions": (8,)}, "gives 8 numbers, documents have 16"),
        ({"space": "another"}, "cannot search documents encoded by 'fake'"),
    ],
)
def test_a_student_with_a_wrong_prefix_or_dimension_never_serves(
    start: Start, tmp_path: Path, wrong: dict[str, object], message: str
) -> None:
    """Fault: wrong encoder, wrong prefix, wrong dimension at load. Without it the right model is asked wrongly."""
    source = real_store(tmp_path, 20)
    student = replace(CARD, space=CARD.space_fingerprint)
    with pytest.raises(EncoderMismatch, match=message):
        start(FakeEncoder(replace(student, **wrong)), source)
    start(FakeEncoder(replace(student, weights_hash="another student", query_prefix="ask: ")), source)


def test_many_callers_share_one_async_connection(server: Running) -> None:
    """Without it a web application would open a connection for each of its users."""

    async def main() -> int:
        async with AsyncRetrievalClient(server.target) as own:
            results = await asyncio.gather(*(own.search(f"text {i}", top_k=1) for i in range(100)))
        return len(results)

    with ThreadPoolExecutor(1) as other:
        assert other.submit(asyncio.run, main()).result(20) == 100


def configured(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> ServeConfig:
    """Return the configuration that ``rkd serve`` would run with."""
    seen = []
    monkeypatch.setattr(server_module, "run_server", lambda config, ready: seen.append(config))
    done = CliRunner().invoke(app, ["serve", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return seen[0]


def test_the_commands_options_reach_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without it an option could be accepted and dropped, such as the one that asks for tokens."""
    run = tmp_path / "run"
    for name in ("index", "encoder", "reranker"):
        (run / name).mkdir(parents=True)
    plain = configured(monkeypatch, run)
    assert (plain.store, plain.encoder, plain.reranker) == (run / "index", run / "encoder", run / "reranker")
    assert (plain.host, plain.insecure, plain.tokens, plain.tls, plain.admin_port) == (
        "127.0.0.1",
        False,
        None,
        None,
        None,
    )
    options = ["--tls-cert", "c.pem", "--tls-key", "k.pem", "--tls-client-ca", "ca.pem", "--tokens", "t"]
    secured = configured(monkeypatch, run / "index", "--encoder", run / "encoder", *options, "--log-format", "json")
    assert secured.tls == CertificateFiles(Path("c.pem"), Path("k.pem"), Path("ca.pem"))
    assert (secured.tokens, secured.json_logs, secured.reranker) == (Path("t"), True, None)
    with pytest.raises(ServeError, match="--tls-cert and --tls-key belong together"):
        configured(monkeypatch, run, "--tls-cert", "c.pem")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["max_topk=3"], r"--limit max_topk=3: no limit 'max_topk', did you mean 'max_top_k'\?"),
        (["max_top_k"], r"--limit max_top_k: give max_top_k=NUMBER, a whole number from 1 to 2\^30 - 1"),
        (["max_top_k=0"], "give max_top_k=NUMBER"),
        (["max_top_k=-1"], "give max_top_k=NUMBER"),
        (["max_message_bytes=1073741824"], "give max_message_bytes=NUMBER"),
        (["max_top_k=٣"], "give max_top_k=NUMBER"),
    ],
)
def test_a_limit_that_is_none_is_refused(settings: list[str], message: str) -> None:
    """Without it a mistyped bound would leave the server open to what it was to keep out."""
    with pytest.raises(ServeError, match=message):
        Limits.of(settings)


def test_a_server_starts_with_every_limit_at_its_most(start: Start) -> None:
    """A limit that is taken and that gRPC cannot hold would end the start in a trace."""
    most = [f"{limit.name}={2**30 - 1}" for limit in dataclasses.fields(Limits)]
    with RetrievalClient(start(limits=Limits.of(most)).target) as client:
        assert len(client.search("a").hits) == 10


def test_limits_of_the_command_line_are_those_of_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without it an operator could bound nothing without writing Python, or bound it in vain."""
    from typer.testing import CliRunner

    from retrieval_kd.cli.main import app

    seen: list[ServeConfig] = []
    monkeypatch.setattr("serve.workers.run_workers", lambda config, _: seen.append(config))
    before = signal.getsignal(signal.SIGHUP)
    command = ["serve", str(tmp_path), "--encoder", str(tmp_path), "--workers", "2", "--drain-seconds", "3"]
    try:
        done = CliRunner().invoke(app, [*command, "--limit", "max_top_k=7", "--limit", "max_id_bytes=9"])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.exit_code == 0, done.output
    config = ServeConfig.from_json(seen[0].to_json())
    assert config.limits == Limits(max_top_k=7, max_id_bytes=9)
    assert config.drain_seconds == 3
