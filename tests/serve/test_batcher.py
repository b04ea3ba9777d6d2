"""The micro-batcher alone: bounds, order, dropping, failing, stopping."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from retrieval_kd.encoders.base import Vectors
from serve.batcher import QUERY_BATCHES, Encoded, MicroBatcher, Tokens
from serve.errors import NotReadyError, OverloadedError
from serve.limits import Limits
from serve.metrics import Metrics

Scenario = Callable[..., Awaitable[None]]


class Recorder:
    """Encodes a row to its first token; ``gate`` holds it, ``batches`` says what came together."""

    def __init__(self) -> None:
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()
        self.busy = threading.Event()
        self.error = None
        self.seconds = 0.0

    def __call__(self, rows: Sequence[Tokens]) -> Vectors:
        """Encode, once the gate is open."""
        self.batches.append([row[0] for row in rows])
        self.busy.set()
        assert self.gate.wait(10)
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        return np.array([[row[0]] for row in rows], dtype=np.float32)


def row(name: int, length: int = 2) -> list[int]:
    return [name] * length


async def hold(batcher: MicroBatcher, recorder: Recorder) -> asyncio.Task[Encoded]:
    """Occupy the encoder with one text, so that what follows has to queue."""
    recorder.gate.clear()
    recorder.busy.clear()
    first = asyncio.create_task(batcher.encode([row(0)]))
    await asyncio.to_thread(recorder.busy.wait, 10)
    return first


async def queue(batcher: MicroBatcher, *requests: list[list[int]]) -> list[asyncio.Task[Encoded]]:
    tasks = [asyncio.create_task(batcher.encode(rows)) for rows in requests]
    await asyncio.sleep(0)
    return tasks


def values(encoded: Encoded) -> list[float]:
    return encoded.vectors[:, 0].tolist()


def run(scenario: Scenario, limits: Limits | None = None, **options: int) -> None:
    async def main() -> None:
        recorder = Recorder()
        async with MicroBatcher(recorder, limits or Limits(), **options) as batcher:
            try:
                await asyncio.wait_for(scenario(batcher, recorder), 20)
            finally:
                recorder.gate.set()

    asyncio.run(main())


def test_a_lone_text_is_encoded_at_once() -> None:
    """An artificial wait would be paid by every query of a quiet server."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        encoded = await batcher.encode([row(5)])
        assert values(encoded) == [5]
        assert encoded.queue_ns >= 0
        assert encoded.encode_ns > 0

    run(scenario)


def test_what_waits_is_encoded_together_and_everyone_gets_their_own() -> None:
    """Cross-talk between callers is the worst failure a batcher can have."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        first = await hold(batcher, recorder)
        tasks = await queue(batcher, [row(1)], [row(2), row(3)], [row(4)])
        recorder.gate.set()
        assert [values(await task) for task in (first, *tasks)] == [[0], [1], [2, 3], [4]]
        assert recorder.batches == [[0], [1, 2, 3, 4]]

    run(scenario)


def test_a_batch_holds_one_length_and_begins_with_the_oldest() -> None:
    """The encoder runs each length by itself: a mixed batch would make a short query wait for a long one."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        first = await hold(batcher, recorder)
        lengths = [20, 4, 4, 20, 4, 4, 30, 20, 20]
        tasks = await queue(batcher, *[[row(name, length)] for name, length in enumerate(lengths, start=1)])
        recorder.gate.set()
        await asyncio.gather(first, *tasks)
        assert recorder.batches == [[0], [1, 4], [2, 3, 5], [6], [7], [8, 9]]

    run(scenario, batch_texts=3, batch_tokens=40)


def test_a_text_longer_than_the_batch_is_encoded_alone() -> None:
    """Waiting for room that never comes would hang its caller and all behind it."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        assert values(await batcher.encode([row(1, 100)])) == [1]

    run(scenario, batch_tokens=10)


@pytest.mark.parametrize("limits", [Limits(max_queued_texts=3), Limits(max_queued_tokens=6)], ids=["texts", "tokens"])
def test_a_full_queue_refuses_at_once_and_all_or_nothing(limits: Limits) -> None:
    """A queue without bound answers everybody too late; half a batch admitted is work thrown away."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        first = await hold(batcher, recorder)
        waiting = await queue(batcher, [row(1), row(2)])
        with pytest.raises(OverloadedError, match="2 texts already wait") as refused:
            await batcher.encode([row(3), row(4)])
        assert refused.value.retry_after > 0
        last = await queue(batcher, [row(5)])
        recorder.gate.set()
        await asyncio.gather(first, *waiting, *last)
        assert recorder.batches == [[0], [1, 2, 5]]

    run(scenario, limits)


def test_an_empty_queue_takes_a_request_larger_than_itself() -> None:
    """Otherwise a legal request would be told to retry for ever."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        assert values(await batcher.encode([row(i, 5) for i in range(10)])) == list(range(10))

    run(scenario, Limits(max_queued_texts=3, max_queued_tokens=6))


def test_abandoned_texts_are_never_encoded_and_free_their_room() -> None:
    """Encoding for callers who left is how an overloaded server stays overloaded (infinity#546)."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        first = await hold(batcher, recorder)
        cancelled, expired = await queue(batcher, [row(1)], [row(2)])
        cancelled.cancel()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(expired, 0.01)
        kept = await queue(batcher, [row(3), row(4)])
        recorder.gate.set()
        await asyncio.gather(first, *kept)
        assert recorder.batches == [[0], [3, 4]]
        assert cancelled.cancelled()

    run(scenario, Limits(max_queued_texts=2))


def test_a_failing_batch_fails_its_callers_and_nobody_else() -> None:
    """A dead worker would leave every later caller waiting for its deadline."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        first = await hold(batcher, recorder)
        tasks = await queue(batcher, [row(1), row(2)], [row(3)])
        recorder.error = ValueError("broken")
        recorder.gate.set()
        outcomes = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["broken"] * 3
        recorder.error = None
        assert values(await batcher.encode([row(4)])) == [4]

    run(scenario)


def test_a_caller_cancelled_during_its_batch_does_not_disturb_the_others() -> None:
    """Setting the result of a cancelled future raises; the worker must not die of it."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        first = await hold(batcher, recorder)
        first.cancel()
        (second,) = await queue(batcher, [row(1)])
        recorder.gate.set()
        assert values(await second) == [1]

    run(scenario)


def test_stopping_tells_those_who_wait() -> None:
    """A future that is never resolved is a caller who never returns."""

    async def main() -> None:
        recorder = Recorder()
        async with MicroBatcher(recorder, Limits()) as batcher:
            first = await hold(batcher, recorder)
            (waiting,) = await queue(batcher, [row(1)])
            threading.Timer(0.05, recorder.gate.set).start()
        with pytest.raises(NotReadyError, match="stopping"):
            await waiting
        assert values(await first) == [0]
        with pytest.raises(NotReadyError, match="stopping"):
            await batcher.encode([row(2)])

    asyncio.run(asyncio.wait_for(main(), 20))


async def queue_documents(batcher: MicroBatcher, *requests: list[list[int]]) -> list[asyncio.Task[Encoded]]:
    tasks = [asyncio.create_task(batcher.encode(rows, "document")) for rows in requests]
    await asyncio.sleep(0)
    return tasks


def test_queries_go_before_documents_that_came_first() -> None:
    """Without it a bulk upload would make every search wait behind it."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        first = await hold(batcher, recorder)
        documents = await queue_documents(batcher, [row(i) for i in range(10, 14)])
        queries = await queue(batcher, [row(1)], [row(2)])
        recorder.gate.set()
        await asyncio.gather(first, *documents, *queries)
        assert recorder.batches == [[0], [1, 2], [10, 11], [12, 13]]

    run(scenario, batch_texts=2)


def test_documents_get_their_turn_among_endless_queries() -> None:
    """Without it an upload would never end on a server that is never idle."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        first = await hold(batcher, recorder)
        documents = await queue_documents(batcher, [row(100)])
        queries = await queue(batcher, *[[row(i)] for i in range(1, 13)])
        recorder.gate.set()
        await asyncio.gather(first, *documents, *queries)
        place = recorder.batches.index([100])
        assert place == QUERY_BATCHES  # the batch that was running is the first of them

    run(scenario, batch_texts=1)


def test_what_would_be_late_is_refused_on_arrival() -> None:
    """Without it an overloaded server would spend its time on answers that nobody waits for any more."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        recorder.seconds = 0.05
        await batcher.encode([row(1, 10)])  # 5 ms a token
        first = await hold(batcher, recorder)
        waiting = await queue(batcher, [row(2, 10)], [row(3, 10)])
        with pytest.raises(OverloadedError, match="longer than the request may take") as refused:
            await batcher.encode([row(4, 10)], seconds=0.05)
        assert 0.05 <= refused.value.retry_after < 1
        patient = asyncio.create_task(batcher.encode([row(5, 10)], seconds=10))
        await asyncio.sleep(0)
        recorder.gate.set()
        await asyncio.gather(first, *waiting, patient)
        assert all(4 not in batch for batch in recorder.batches)

    run(scenario, batch_texts=1)


def test_an_idle_encoder_takes_even_what_seems_too_slow() -> None:
    """Without it one slow batch, such as the first, would have the server refuse everything for ever."""

    async def scenario(batcher: MicroBatcher, recorder: Recorder) -> None:
        recorder.seconds = 0.2
        await batcher.encode([row(1)])
        recorder.seconds = 0.0
        assert values(await batcher.encode([row(2)], seconds=0.001)) == [2]

    run(scenario)


def test_what_is_dropped_and_batched_is_counted() -> None:
    """Without it an operator could not tell a full queue from callers who give up."""
    metrics = Metrics()

    async def main() -> None:
        recorder = Recorder()
        async with MicroBatcher(recorder, Limits(max_queued_texts=2), metrics) as batcher:
            first = await hold(batcher, recorder)
            (left,) = await queue(batcher, [row(1)])
            left.cancel()
            await asyncio.sleep(0)
            kept = await queue(batcher, [row(2), row(3)])
            with pytest.raises(OverloadedError):
                await batcher.encode([row(4)])
            recorder.gate.set()
            await asyncio.gather(first, *kept)

    asyncio.run(asyncio.wait_for(main(), 20))
    sample = metrics.registry.get_sample_value
    assert sample("rkd_dropped_texts_total", {"reason": "abandoned"}) == 1
    assert sample("rkd_dropped_texts_total", {"reason": "full"}) == 1
    assert sample("rkd_batch_texts_sum") == 3
    assert sample("rkd_queued", {"unit": "texts"}) == 0
