"""What the protocol offers beside plain search: streams, filters, fields, sets, effort, reranking, encodings."""

import itertools
import queue
import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from serve_fakes import CARD, DIMENSION, FakeEncoder, FakeReranker, FakeSearcher, Running, Start
from test_server import details

from index.kinds import Effort
from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.errors import ServeError
from serve import server as server_module
from serve.client import Options, RetrievalClient
from serve.limits import Limits
from serve.vectors import from_message, to_message


@pytest.fixture
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


def test_a_stream_answers_in_order_what_single_searches_answer(client: RetrievalClient) -> None:
    """Without it answers that overtake each other would be credited to the wrong query."""
    texts = [f"text {i} {'word ' * (i % 5)}" for i in range(60)]
    streamed = list(client.search_stream(texts, top_k=4))
    assert [result.hits for result in streamed] == [client.search(text, top_k=4).hits for text in texts]


def test_one_bad_query_of_a_stream_fails_alone(channel: grpc.Channel) -> None:
    """Without it one blank line would end an import of a million."""
    stub = rpc.RetrievalServiceStub(channel)
    requests = [
        pb.StreamSearchRequest(tag=tag, search=pb.SearchRequest(text=text, top_k=2))
        for tag, text in ((7, "a"), (8, " "), (9, "b"))
    ]
    answers = list(stub.StreamSearch(iter(requests)))
    assert [answer.tag for answer in answers] == [7, 8, 9]
    assert [answer.WhichOneof("outcome") for answer in answers] == ["response", "error", "response"]
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in answers[1].error.details)
    assert bad.field_violations[0].field == "text"


def test_a_stream_is_held_back_and_not_refused(start: Start, encoder: FakeEncoder) -> None:
    """Without it a client that sends as fast as it can would be refused most of its queries, or fill the memory."""
    limits = Limits(max_stream_in_flight=4, max_queued_texts=1)
    running = start(encoder, limits=limits)
    sent = []

    def requests() -> Iterator[pb.StreamSearchRequest]:
        for tag in range(80):
            sent.append(tag)
            yield pb.StreamSearchRequest(tag=tag, search=pb.SearchRequest(text=f"text {tag}", top_k=1))

    with grpc.insecure_channel(running.target) as channel:
        encoder.gate.clear()
        answers = rpc.RetrievalServiceStub(channel).StreamSearch(requests())
        time.sleep(0.3)
        in_encoder_and_queue = len(encoder.runs)
        assert in_encoder_and_queue <= 5
        encoder.gate.set()
        got = list(answers)
    assert [answer.tag for answer in got] == list(range(80))
    assert {answer.WhichOneof("outcome") for answer in got} == {"response"}


@pytest.mark.parametrize("deadline", [None, 3600])
def test_a_stream_that_falls_silent_gives_its_place_back_and_one_that_goes_on_keeps_it(
    start: Start, encoder: FakeEncoder, deadline: int | None
) -> None:
    """Without it callers who open streams and say nothing would hold every place, and nobody else be answered."""
    running = start(encoder, limits=Limits(max_concurrent_requests=2, max_stream_idle_ms=1500))
    silent_may_end = threading.Event()

    def silent() -> Iterator[pb.StreamSearchRequest]:
        silent_may_end.wait(60)
        yield from ()

    def slowly() -> Iterator[pb.StreamSearchRequest]:
        for tag in range(5):
            yield pb.StreamSearchRequest(tag=tag, search=pb.SearchRequest(text=f"text {tag}", top_k=1))
            time.sleep(0.5)

    with grpc.insecure_channel(running.target) as channel:
        stub = rpc.RetrievalServiceStub(channel)
        left = stub.StreamSearch(silent(), timeout=deadline)
        going = stub.StreamSearch(slowly(), timeout=deadline)
        assert [answer.tag for answer in going] == list(range(5))
        with pytest.raises(grpc.RpcError) as ended:
            next(left)
        silent_may_end.set()
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert details(ended.value, error_details_pb2.ErrorInfo).reason == "DEADLINE_EXCEEDED"
        running.wait_for("rkd_requests_in_flight", 0)
        assert len(stub.Search(pb.SearchRequest(text="a", top_k=1)).hits) == 1


def test_a_stream_whose_reader_is_slow_ends_with_a_status(start: Start) -> None:
    """Its time runs out while gRPC sends: without a status the caller would wait for the next answer for ever."""
    running = start(limits=Limits(max_stream_idle_ms=1000))

    def endless() -> Iterator[pb.StreamSearchRequest]:
        for tag in itertools.count():
            yield pb.StreamSearchRequest(tag=tag, search=pb.SearchRequest(text=f"text {tag % 7}", top_k=40))

    with grpc.insecure_channel(running.target) as channel:
        answers = rpc.RetrievalServiceStub(channel).StreamSearch(endless())
        running.wait_for("rkd_requests_in_flight", 1)
        # Nothing is read until its place has been given back.
        running.wait_for("rkd_requests_in_flight", 0)
        codes: queue.SimpleQueue[grpc.StatusCode] = queue.SimpleQueue()

        def read() -> None:
            with pytest.raises(grpc.RpcError) as ended:
                for _ in answers:
                    pass
            codes.put(ended.value.code())

        threading.Thread(target=read, daemon=True).start()
        assert codes.get(timeout=20) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_stream_outlives_the_age_at_which_its_connection_takes_no_more_calls(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it an import of more than half an hour would die of the balancing of connections."""
    hasty = [(name, max(1, value // 1800)) for name, value in server_module._CONNECTION_OPTIONS]
    assert ("grpc.max_connection_age_ms", 1000) in hasty
    monkeypatch.setattr(server_module, "_CONNECTION_OPTIONS", hasty)
    running = start()

    def slowly() -> Iterator[pb.StreamSearchRequest]:
        for tag in range(10):
            yield pb.StreamSearchRequest(tag=tag, search=pb.SearchRequest(text=f"text {tag}", top_k=1))
            time.sleep(0.3)

    answered = []
    with grpc.insecure_channel(running.target) as channel:
        stub = rpc.RetrievalServiceStub(channel)
        for answer in stub.StreamSearch(slowly()):
            assert answer.WhichOneof("outcome") == "response"
            assert len(stub.Search(pb.SearchRequest(text="a", top_k=1)).hits) == 1
            answered.append(answer.tag)
    assert answered == list(range(10))


def test_a_stream_that_is_left_stops_its_work(start: Start, encoder: FakeEncoder) -> None:
    """Without it the queries of callers who left would be encoded to the last."""
    running = start(encoder)
    with grpc.insecure_channel(running.target) as channel:
        encoder.gate.clear()
        encoder.busy.clear()
        requests = (
            pb.StreamSearchRequest(tag=i, search=pb.SearchRequest(text=f"w{i} " * (i + 1), top_k=1)) for i in range(50)
        )
        call = rpc.RetrievalServiceStub(channel).StreamSearch(requests)
        assert encoder.busy.wait(10)
        time.sleep(0.1)
        call.cancel()
        time.sleep(0.2)
        encoder.gate.set()
        before = len(encoder.runs)
        assert len(rpc.RetrievalServiceStub(channel).Search(pb.SearchRequest(text="a", top_k=1)).hits) == 1
        assert len(encoder.runs) - before <= 2


def test_embedding_streams_give_way_to_queries(start: Start, encoder: FakeEncoder) -> None:
    """Without it whoever embeds a corpus through the service would stop everybody's search."""
    running = start(encoder, limits=Limits(max_stream_in_flight=8))
    bulk = [f"bulk {i} {'w ' * (i % 3)}" for i in range(256)]
    with RetrievalClient(running.target, timeout=20) as client:
        assert np.array_equal(client.embed_stream(bulk), encoder.texts_vectors(bulk))
        encoder.gate.clear()
        encoder.busy.clear()
        thread = threading.Thread(target=client.embed_stream, args=(bulk,))
        thread.start()
        assert encoder.busy.wait(10)
        time.sleep(0.2)
        search = threading.Thread(target=client.search, args=("urgent one two three four five",))
        search.start()
        time.sleep(0.2)
        before = len(encoder.runs)
        encoder.gate.set()
        search.join(10)
        thread.join(20)
    (row,) = encoder.tokenize(["urgent one two three four five"], "query")
    place = next(i for i, batch in enumerate(encoder.runs) if tuple(row) in batch)
    assert place - before <= 1


def test_documents_are_embedded_as_documents(start: Start, client: RetrievalClient) -> None:
    """Without it a document would get the query's prefix, which costs ten points of nDCG in silence."""
    sides = []
    encoder = FakeEncoder()
    tokenize = encoder.tokenize
    encoder.tokenize = lambda texts, side: sides.append(side) or tokenize(texts, side)
    running = start(encoder)
    with RetrievalClient(running.target) as own:
        own.embed(["a"], documents=True)
        own.embed(["a"])
    assert sides == ["query", "document", "query"]  # the first is the warm-up


def test_filters_fields_and_effort_reach_the_index(
    client: RetrievalClient, searcher: FakeSearcher, encoder: FakeEncoder
) -> None:
    """Without it a filter could be accepted and ignored, which shows one tenant's documents to another."""
    only = client.search("a", top_k=5, options=Options(filter={"eq": {"number": 7}}, fields=["title", "number"]))
    assert [(hit.doc_id, hit.fields) for hit in only.hits] == [("doc-7", {"title": "title 7", "number": 7})]
    everything = client.search("a", top_k=1, options=Options(fields=["*"])).hits[0].fields
    assert set(everything) == {"title", "text", "number"}
    assert client.search("a", top_k=1).hits[0].fields == {}
    client.search("a", options=Options(exact=True, oversample=99))
    assert searcher.efforts[-1] == (True, Effort(64, 8, 99))
    client.search("a")
    assert searcher.efforts[-1] == (False, None)
    batch = client.batch_search(["a", "b"], 2, options=Options(filter={"eq": {"number": 3}}))
    assert [[hit.doc_id for hit in result.hits] for result in batch] == [["doc-3"], ["doc-3"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(filter={"eq": {"colour": "red"}}), r"options.filter: no field 'colour' is stored"),
        (Options(fields=["colour"]), r"options.fields: no field 'colour' is stored"),
        (Options(fields=["a"] * 33), r"options.fields: has 33 names; the limit is 32"),
        (Options(filter={"in": {"number": list(range(257))}}), "more than 256 comparisons"),
        (Options(ef_search=0), r"options.effort.ef_search: is 0; give 1 to 4096"),
        (Options(probes=5000), r"options.effort.probes: is 5000"),
        (Options(rerank_depth=10), "this server has no reranker"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_its_place(
    client: RetrievalClient, options: Options, message: str
) -> None:
    """Without it the caller would have to guess which of many options is meant."""
    with pytest.raises(ServeError, match=message):
        client.search("a", options=options)


def test_a_filter_that_is_not_set_or_too_deep_is_refused(channel: grpc.Channel) -> None:
    """Without it an empty filter would match everything, and a deep one would exhaust the stack."""
    stub = rpc.RetrievalServiceStub(channel)
    deep = pb.Filter(equals=pb.FilterEquals(field="number", value=pb.FilterValue(integer=1)))
    for _ in range(40):
        deep = pb.Filter(negated=deep)
    for wanted, message in ((pb.Filter(), "filter"), (deep, "more than 32 levels deep")):
        with pytest.raises(grpc.RpcError, match=message) as refused:
            stub.Search(pb.SearchRequest(text="a", top_k=1, options=pb.SearchOptions(filter=wanted)))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def mean(encoder: FakeEncoder, texts: list[str]) -> np.ndarray:
    return encoder.texts_vectors(texts).astype(np.float64).mean(axis=0)


def test_sets_are_one_search_with_the_signed_sum_of_means(
    client: RetrievalClient, encoder: FakeEncoder, searcher: FakeSearcher
) -> None:
    """SetCSE's own definition: sums of mean similarities. Without it "unlike B" would mean something else."""
    like, other, unlike = ["a", "b b", "c"], ["d"], ["e", "f"]
    expected = [
        float(np.mean([document @ v for v in encoder.texts_vectors(like)]))
        + float(np.mean([document @ v for v in encoder.texts_vectors(other)]))
        - float(np.mean([document @ v for v in encoder.texts_vectors(unlike)]))
        for document in searcher.vectors.astype(np.float64)
    ]
    result = client.search_sets([like, other], [unlike], top_k=40)
    best = np.argsort(expected)[::-1]
    assert [hit.doc_id for hit in result.hits] == [f"doc-{i}" for i in best]
    assert np.allclose([hit.score for hit in result.hits], np.array(expected)[best], atol=1e-5)
    shuffled = client.search_sets([like[::-1], other], [unlike[::-1]], top_k=40)
    assert [hit.doc_id for hit in shuffled.hits] == [hit.doc_id for hit in result.hits]
    assert client.search_sets([["a"]], top_k=9).hits == client.search("a", top_k=9).hits


def test_sets_that_cancel_each_other_out_are_refused(client: RetrievalClient) -> None:
    """Without it the ranking would be one of rounding errors."""
    with pytest.raises(ServeError, match="its terms cancel each other out"):
        client.search_sets([["a", "b"]], [["b", "a"]])
    with pytest.raises(ServeError, match="sets: has 0 members; give 1 to 64"):
        client.search_sets([])
    with pytest.raises(ServeError, match=r"sets.terms\[0\].members: is empty"):
        client.search_sets([[], ["a"]])


def test_the_reranker_orders_texts_and_stored_documents(start: Start) -> None:
    """Without it the second stage could score one text and return another's id."""
    running = start(reranker=FakeReranker())
    with RetrievalClient(running.target) as client:
        result = client.rerank("red", {"x": "blue", "y": "redder", "z": "red"})
        assert [hit.doc_id for hit in result.hits] == ["z", "y", "x"]
        assert result.query_encoder == client.server_info().reranker == "reranked"
        assert result.timings.rescore_ns > 0
        stored = client.rerank("title 7", ["doc-3", "doc-7"], top_k=1)
        assert [hit.doc_id for hit in stored.hits] == ["doc-7"]
        with pytest.raises(ServeError, match=r"documents\[1\].doc_id: must have 1 to 512 bytes"):
            client.rerank("red", {"x": "blue", "": "red"})
        deep = client.search("title 7", top_k=2, options=Options(rerank_depth=40))
        assert deep.hits[0].doc_id == "doc-7"
        assert deep.timings.rescore_ns > 0
        with pytest.raises(ServeError, match=r"options.rerank_depth: is 2; give top_k \(5\) to 100"):
            client.search("a", top_k=5, options=Options(rerank_depth=2))
        with pytest.raises(ServeError, match="needs queries of text"):
            client.search(vector=np.ones(DIMENSION), options=Options(rerank_depth=20))


def test_a_batch_to_be_reranked_is_bounded_and_the_client_keeps_to_it(start: Start) -> None:
    """Without it one call could keep the reranker busy for minutes, past its own deadline and that of all others."""
    running = start(reranker=FakeReranker())
    options = Options(rerank_depth=40)
    request = pb.BatchSearchRequest(queries=[pb.Query(text="a")] * 26, top_k=2, options=options.to_message())
    with grpc.insecure_channel(running.target) as channel, pytest.raises(grpc.RpcError) as refused:
        rpc.RetrievalServiceStub(channel).BatchSearch(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "rerank_depth: makes 1040 pairs of query and document, the limit is 1000" in refused.value.details()
    with RetrievalClient(running.target, timeout=20) as client:
        texts = [f"title {i}" for i in range(26)]
        results = client.batch_search(texts, 2, options=options)
        assert results[7].hits == client.search(texts[7], top_k=2, options=options).hits
        nothing = Options(rerank_depth=40, filter={"eq": {"number": 99}})
        assert client.search("a", top_k=2, options=nothing).hits == ()


def test_without_a_reranker_the_call_says_what_is_lacking(channel: grpc.Channel) -> None:
    """Without it a client could not tell a server without the model from a wrong request."""
    with pytest.raises(grpc.RpcError) as refused:
        rpc.RerankServiceStub(channel).Rerank(pb.RerankRequest(query="a", documents=[pb.RerankDocument(doc_id="x")]))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(refused.value, error_details_pb2.PreconditionFailure).violations[0].subject == "reranker"


def test_sixteen_bits_travel_both_ways(channel: grpc.Channel, encoder: FakeEncoder) -> None:
    """Without it half of the bandwidth would cost more than three digits, or a large number would turn infinite."""
    vector = encoder.texts_vectors(["a"])[0]
    stub = rpc.EmbeddingServiceStub(channel)
    answer = stub.Embed(pb.EmbedRequest(texts=["a"], vector_encoding=pb.VECTOR_ENCODING_F16_LE))
    assert answer.vectors[0].f16_le == vector.astype("<f2").tobytes()
    assert answer.index_version == "0000000001-cafe"
    half = rpc.RetrievalServiceStub(channel).Search(pb.SearchRequest(vector=answer.vectors[0], top_k=3))
    full = rpc.RetrievalServiceStub(channel).Search(pb.SearchRequest(text="a", top_k=3))
    assert [hit.doc_id for hit in half.hits] == [hit.doc_id for hit in full.hits]
    large = np.array([1e6, -1e6, 1.0], dtype=np.float32)
    back = from_message(to_message(large, pb.VECTOR_ENCODING_F16_LE))
    assert back.tolist() == [65504.0, -65504.0, 1.0]


def test_every_reply_names_version_and_encoder(client: RetrievalClient) -> None:
    """Without it a stored result could not be told from one of another index or model."""
    result = client.search("a")
    assert (result.index_version, result.query_encoder) == ("0000000001-cafe", CARD.fingerprint)
    assert client.server_info().index_version == client.index().index_version == "0000000001-cafe"
