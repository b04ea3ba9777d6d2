"""Overload and endurance: quick refusals, steady goodput, no overshoot, and memory that does not grow."""

import asyncio
import contextlib
import ctypes
import gc
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
from serve_fakes import DIMENSION, FakeEncoder, FakeReranker, FakeSearcher, FakeSource, Start

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.runs import Ranking
from serve.client import RetrievalClient
from serve.limits import Limits
from serve.messages import retry_seconds

SECONDS_PER_BATCH = 0.25
SECONDS_PER_PAIR = 0.01


class SlowEncoder(FakeEncoder):
    """Takes as long for a batch as a real encoder, whatever the machine."""

    def run(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Encode slowly."""
        self.runs.append(rows)
        time.sleep(SECONDS_PER_BATCH)
        return np.stack([self.vector(row) for row in rows])


class Outcomes:
    """How calls ended, and after how many seconds each."""

    def __init__(self) -> None:
        self.answered, self.refused, self.late, self.other, self.advice = [], [], [], [], []

    async def note(self, call: Awaitable[object]) -> None:
        """Wait for a call's end."""
        began = time.monotonic()
        try:
            await call
            self.answered.append(time.monotonic() - began)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.refused.append(time.monotonic() - began)
                self.advice.append(retry_seconds(error))
            elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self.late.append(error)
            else:
                self.other.append(error)


def offered(
    target: str, rate: float, seconds: float, call: Callable[[grpc.aio.Channel, int], Awaitable[object]]
) -> Outcomes:
    """Make so many calls a second, whether or not the ones before are answered."""
    outcomes = Outcomes()

    async def main() -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            # Until a connection stands gRPC refuses more than a hundred calls by itself.
            await channel.channel_ready()
            calls, began = [], time.monotonic()
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
                calls.append(asyncio.create_task(outcomes.note(call(channel, number))))
            await asyncio.gather(*calls)

    asyncio.run(main())
    return outcomes


def test_overload_is_refused_quickly_and_goodput_holds(start: Start) -> None:
    """Fault: four times what the encoder can do. Without it everybody's answer would come after their deadline."""
    encoder = SlowEncoder()
    running = start(encoder, limits=Limits(max_queued_texts=10_000))

    def call(channel: grpc.aio.Channel, number: int) -> Awaitable[object]:
        return rpc.RetrievalServiceStub(channel).Search(pb.SearchRequest(text=f"text {number}", top_k=1), timeout=2.0)

    # Eight texts a batch: the encoder can do 32 a second, which leaves even a busy machine time to send and to read.
    seen = offered(running.target, 4 * 8 / SECONDS_PER_BATCH, 2.5, call)
    assert seen.other == []
    assert seen.late == [], "who is admitted is answered in time"
    assert all(seconds is not None and seconds > 0 for seconds in seen.advice)
    assert len(seen.refused) > len(seen.answered) / 4
    assert np.median(seen.refused) < np.median(seen.answered), "a refusal that comes late helps nobody"
    # In the encoder's own measure, whatever the machine does beside it: texts share batches, hardly one for nothing.
    encoded = sum(map(len, encoder.runs))
    assert encoded > 3 * len(encoder.runs), "goodput under overload"
    assert len(seen.answered) > 0.8 * encoded, "work that is admitted is done in time"
    with RetrievalClient(running.target) as client:
        assert len(client.search("after the storm").hits) == 10


class SlowReranker(FakeReranker):
    """Takes as long for a pair as a real cross-encoder, whatever the machine; ``queries`` records whose turn it was."""

    def __init__(self) -> None:
        self.queries = []

    def score(self, query: str, texts: Sequence[str]) -> Vectors:
        """Score slowly."""
        self.queries.append(query)
        time.sleep(SECONDS_PER_PAIR * len(texts))
        return super().score(query, texts)


@pytest.mark.parametrize("how", ["rerank", "search"])
def test_an_overloaded_reranker_answers_some_in_time_and_refuses_the_rest_at_once(start: Start, how: str) -> None:
    """Fault: three times what the reranker can do. Without it callers take turns until all of them are too late."""
    reranker = SlowReranker()
    running = start(reranker=reranker)
    documents = [pb.RerankDocument(doc_id=f"doc-{i}", text=f"text {i}") for i in range(20)]

    def call(channel: grpc.aio.Channel, number: int) -> Awaitable[object]:
        if how == "rerank":
            request = pb.RerankRequest(query=f"query {number}", documents=documents)
            return rpc.RerankServiceStub(channel).Rerank(request, timeout=1.5)
        options = pb.SearchOptions(rerank_depth=20)
        search = pb.SearchRequest(text=f"query {number}", top_k=1, options=options)
        return rpc.RetrievalServiceStub(channel).Search(search, timeout=1.5)

    seen = offered(running.target, 3 / (20 * SECONDS_PER_PAIR), 4, call)
    assert seen.other == []
    assert seen.late == [], "who is admitted is answered in time"
    assert len(seen.answered) > 5
    assert len(seen.refused) > len(seen.answered)
    assert all(seconds is not None and seconds > 0 for seconds in seen.advice)
    assert np.median(seen.refused) < np.median(seen.answered) / 2, "a refusal that comes late helps nobody"
    turns = [query for query in reranker.queries if query != "warm up"]
    changes = sum(one != other for one, other in itertools.pairwise(turns))
    assert changes + 1 == len(set(turns)), "a request that has begun is finished before the next one begins"


def test_a_caller_who_leaves_the_rerankers_queue_costs_it_nothing(start: Start) -> None:
    """Without it the reranker would score for callers who left, and refuse others for their sake."""
    reranker = SlowReranker()
    running = start(reranker=reranker)
    with grpc.insecure_channel(running.target) as channel:
        stub = rpc.RerankServiceStub(channel)
        documents = [pb.RerankDocument(doc_id=f"doc-{i}", text=f"text {i}") for i in range(50)]
        first = stub.Rerank.future(pb.RerankRequest(query="first", documents=documents))
        while "first" not in reranker.queries:
            time.sleep(0.005)
        leaving = stub.Rerank.future(pb.RerankRequest(query="leaving", documents=documents))
        running.wait_for("rkd_requests_in_flight", 2)
        leaving.cancel()
        running.wait_for("rkd_requests_in_flight", 1)
        assert len(first.result(10).hits) == 50
        assert len(stub.Rerank(pb.RerankRequest(query="last", documents=documents)).hits) == 50
    assert "leaving" not in reranker.queries


class SlowSearcher(FakeSearcher):
    """Takes its time for each query."""

    def search(self, vectors: Vectors, *arguments: object, **options: object) -> list[Ranking]:
        """Search slowly."""
        time.sleep(0.1 * len(vectors))
        return super().search(vectors, *arguments, **options)


def test_an_overloaded_index_refuses_vector_queries_at_once(start: Start) -> None:
    """Fault: overload by queries that need no encoder. Without it all of them wait until their deadline is over."""
    running = start(searcher=FakeSource(SlowSearcher()))
    vector = pb.Vector(floats=pb.FloatVector(values=[1.0] * DIMENSION))

    def call(channel: grpc.aio.Channel, number: int) -> Awaitable[object]:
        return rpc.RetrievalServiceStub(channel).Search(pb.SearchRequest(vector=vector, top_k=1), timeout=1.5)

    # Two threads search.
    seen = offered(running.target, 3 * 2 / 0.1, 3, call)
    assert seen.other == []
    assert seen.late == [], "who is admitted is answered in time"
    assert len(seen.answered) > 20
    assert len(seen.refused) > len(seen.answered)
    assert all(seconds is not None and seconds > 0 for seconds in seen.advice)
    assert np.median(seen.refused) < np.median(seen.answered) / 2, "a refusal that comes late helps nobody"


def test_batches_that_nobody_waits_for_any_more_leave_the_index(start: Start) -> None:
    """Fault: batches too large for their deadlines. Without it others are refused long after they have failed."""
    running = start(searcher=FakeSource(SlowSearcher()))
    vector = pb.Vector(floats=pb.FloatVector(values=[1.0] * DIMENSION))
    batch = pb.BatchSearchRequest(queries=[pb.Query(vector=vector)] * 200, top_k=1)
    with grpc.insecure_channel(running.target) as channel:
        stub = rpc.RetrievalServiceStub(channel)
        # Two threads search, each for twenty seconds.
        late = stub.BatchSearch.future(batch, timeout=0.5)
        leaving = stub.BatchSearch.future(batch, timeout=30)
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        leaving.cancel()
        running.wait_for("rkd_requests_in_flight", 0)
        began = time.monotonic()
        singles = [stub.Search.future(pb.SearchRequest(vector=vector, top_k=1), timeout=10) for _ in range(2)]
        assert all(len(single.result().hits) == 1 for single in singles)
        assert time.monotonic() - began < 5


def test_clients_wait_as_they_are_told_and_then_succeed(start: Start) -> None:
    """Without it a client would give up where a pause of a moment is all it takes, or hammer the server."""
    encoder = FakeEncoder()
    running = start(encoder, limits=Limits(max_concurrent_requests=1))
    with RetrievalClient(running.target, retries=99) as client, RetrievalClient(running.target, retries=0) as hasty:
        encoder.gate.clear()
        encoder.busy.clear()
        first = threading.Thread(target=client.search, args=("a",))
        first.start()
        assert encoder.busy.wait(10)
        with pytest.raises(Exception, match="requests are being answered"):
            hasty.search("b")
        began = time.monotonic()
        threading.Timer(0.15, encoder.gate.set).start()
        assert len(client.search("b").hits) == 10
        took = time.monotonic() - began
        first.join(10)
    labels = {"method": "/dense.retrieval.v1.RetrievalService/Search", "code": "RESOURCE_EXHAUSTED"}
    refusals = running.metrics.registry.get_sample_value("rkd_requests_total", labels)
    assert 2 <= refusals <= 2 + took / 0.1, "it waited each time at least as long as it was told"


class Forgotten(list[object]):
    """What a fake notes of each call would grow with the calls."""

    def append(self, _: object) -> None:
        """Note nothing."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_memory_does_not_grow_with_calls_cancelled_late_and_answered(start: Start) -> None:
    """Fault: endurance. grpc.aio has leaked on cancelled calls (grpc#43360); a kilobyte a call is a crash."""
    encoder, searcher = FakeEncoder(), FakeSearcher()
    encoder.runs, searcher.efforts = Forgotten(), Forgotten()
    running = start(encoder, searcher=FakeSource(searcher))
    trim = ctypes.CDLL(None).malloc_trim

    async def one(stub: rpc.RetrievalServiceStub, number: int) -> None:
        request = pb.SearchRequest(text=f"text {number % 50}", top_k=5)
        call = stub.Search(request, timeout=0.0005 if number % 20 == 7 else 5)
        if number % 5 == 3:
            await asyncio.sleep(0.001 * (number % 3))
            call.cancel()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await call

    async def main(rounds: int) -> list[int]:
        sizes = []
        async with grpc.aio.insecure_channel(running.target) as channel:
            stub = rpc.RetrievalServiceStub(channel)
            for _ in range(rounds):
                for start in range(0, 400, 25):
                    await asyncio.gather(*(one(stub, start + i) for i in range(25)))
                gc.collect()
                # Freed blocks that the allocator keeps are no leak, and it keeps more of them the longer it runs.
                trim(0)
                sizes.append(resident_bytes())
        return sizes

    sizes = asyncio.run(main(11))
    settled = np.array(sizes[4:], dtype=np.float64)
    slope = np.polyfit(np.arange(len(settled)) * 400, settled, 1)[0]
    # Client and server are one process here, and some 200 bytes a call are gRPC's own at this length.
    assert slope < 400, f"{slope:.0f} bytes a call; sizes {sizes}"
