"""Overload and endurance: quick refusals, steady goodput, no overshoot, and memory that does not grow."""

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
from serve_fakes import FakeEncoder, FakeSearcher, FakeSource, Start

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.encoders.base import Vectors
from serve.client import RetrievalClient
from serve.limits import Limits
from serve.messages import retry_seconds

SECONDS_PER_BATCH = 0.25


class SlowEncoder(FakeEncoder):
    """Takes as long for a batch as a real encoder, whatever the machine."""

    def run(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Encode slowly."""
        self.runs.append(rows)
        time.sleep(SECONDS_PER_BATCH)
        return np.stack([self.vector(row) for row in rows])


def test_overload_is_refused_quickly_and_goodput_holds(start: Start) -> None:
    """Fault: four times what the encoder can do. Without it everybody's answer would come after their deadline."""
    encoder = SlowEncoder()
    running = start(encoder, limits=Limits(max_queued_texts=10_000))
    deadline = 2.0
    refused, answered, overshoot, other, advice = [], [], [], [], []

    async def call(stub: rpc.RetrievalServiceStub, number: int) -> None:
        began = time.monotonic()
        try:
            await stub.Search(pb.SearchRequest(text=f"text {number}", top_k=1), timeout=deadline)
            answered.append(time.monotonic() - began)
        except grpc.aio.AioRpcError as error:
            took = time.monotonic() - began
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                refused.append(took)
                advice.append(retry_seconds(error))
            elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                overshoot.append(took)
            else:
                other.append(error)

    async def main(rate: float, seconds: float) -> None:
        async with grpc.aio.insecure_channel(running.target) as channel:
            stub = rpc.RetrievalServiceStub(channel)
            # Until a connection stands gRPC refuses more than a hundred calls by itself.
            await channel.channel_ready()
            calls, began = [], time.monotonic()
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
                calls.append(asyncio.create_task(call(stub, number)))
            await asyncio.gather(*calls)

    # Eight texts a batch: the encoder can do 32 a second, which leaves even a busy machine time to send and to read.
    asyncio.run(main(4 * 8 / SECONDS_PER_BATCH, 2.5))
    total = len(answered) + len(refused) + len(overshoot)
    assert other == []
    assert all(seconds is not None and seconds > 0 for seconds in advice)
    assert len(refused) > total / 5
    assert np.median(refused) < np.median(answered), "a refusal that comes late helps nobody"
    # In the encoder's own measure, whatever the machine does beside it: full batches, and hardly one for nothing.
    encoded = sum(map(len, encoder.runs))
    assert encoded > 0.5 * 8 * len(encoder.runs), "goodput under overload"
    assert len(answered) > 0.8 * encoded, "work that is admitted is done in time"
    assert len(overshoot) < len(answered) / 5
    with RetrievalClient(running.target) as client:
        assert len(client.search("after the storm").hits) == 10


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


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_memory_does_not_grow_with_calls_cancelled_late_and_answered(start: Start) -> None:
    """Fault: endurance. grpc.aio has leaked on cancelled calls (grpc#43360); a kilobyte a call is a crash."""
    running = start(searcher=FakeSource(FakeSearcher()))

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
                sizes.append(resident_bytes())
        return sizes

    sizes = asyncio.run(main(11))
    settled = np.array(sizes[4:], dtype=np.float64)
    slope = np.polyfit(np.arange(len(settled)) * 400, settled, 1)[0]
    assert slope < 400, f"{slope:.0f} bytes a call; sizes {sizes}"
