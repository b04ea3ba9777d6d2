"""Searches that arrive together: one call of the index, and nobody's trouble is anybody else's."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serve_fakes import DIMENSION, FakeSearcher

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.runs import Ranking
from serve import searches as searches_module
from serve.errors import OverloadedError
from serve.indexes import DocumentSearcher, IndexHandle
from serve.searches import Searches

QUERIES = np.random.default_rng(3).standard_normal((40, DIMENSION)).astype(np.float32)


class Recorder(FakeSearcher):
    """Notes how many queries each call has; refuses company that has a query which is not finite."""

    def __init__(self, version: str = "0000000001-cafe") -> None:
        super().__init__(version=version)
        self.calls: list[tuple[int, int]] = []

    def search(self, vectors: Vectors, k: int, **options: object) -> list[Ranking]:
        self.calls.append((len(vectors), k))
        if not np.isfinite(vectors).all():
            raise ValueError("not finite")
        return super().search(vectors, k)


Found = tuple[tuple[str, ...], list[float]]


def first(_: DocumentSearcher, rankings: Sequence[Ranking], _found: int = 0) -> Found:
    (ranking,) = rankings
    return ranking.doc_ids, ranking.scores.tolist()


def alone(number: int, k: int, version: str = "0000000001-cafe") -> Found:
    searcher = FakeSearcher(version=version)
    return first(searcher, searcher.search(query(number), k))


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no thread be too slow for company; what that does is a test of its own."""
    monkeypatch.setattr(searches_module, "_SECONDS_TOGETHER", 60.0)


def run(threads: int, scenario: Callable[[Searches], Awaitable[None]]) -> None:
    """Run a scenario on searches that know how long one takes; nobody may be left waiting, counted or held."""

    async def main() -> None:
        with ThreadPoolExecutor(threads) as pool:
            searches, handle = Searches(pool, threads), IndexHandle(FakeSearcher())
            await searches.search(handle, query(0), 1, first)
            await asyncio.wait_for(scenario(searches), 20)
            await asyncio.sleep(0.01)
            assert not searches._queues
            assert searches._backlog._jobs == searches._backlog._units == 0
            assert handle._users == 1

    asyncio.run(main())


def taught(searches: Searches, seconds: float) -> None:
    """Have it believe that a search takes so long, whatever it has seen."""
    for _ in range(60):
        searches._backlog.learn(1, seconds)


async def occupied(searches: Searches, count: int = 1) -> tuple[threading.Event, list[asyncio.Future[None]]]:
    """Keep all threads busy until the event is set."""
    go_on, begun, handle = threading.Event(), threading.Semaphore(0), IndexHandle(FakeSearcher())

    def work(_: DocumentSearcher) -> None:
        begun.release()
        assert go_on.wait(20)

    jobs = [asyncio.ensure_future(searches.run(handle, work)) for _ in range(count)]
    for _ in jobs:
        assert await asyncio.to_thread(begun.acquire, timeout=20)
    return go_on, jobs


def query(number: int) -> Vectors:
    return QUERIES[number : number + 1]


@pytest.mark.parametrize(
    ("threads", "count", "sizes"), [(1, 5, [5]), (2, 5, [2, 3]), (8, 3, [1, 1, 1]), (1, 40, [8, 16, 16])]
)
def test_what_arrives_together_is_one_search_for_each_thread(threads: int, count: int, sizes: list[int]) -> None:
    """One call each costs half as much again; one for all leaves threads idle, and the first waiting for the last."""
    searcher = Recorder()

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(searcher)
        found = await asyncio.gather(*(searches.search(handle, query(i), 4, first) for i in range(count)))
        assert found == [alone(i, 4) for i in range(count)]

    run(threads, scenario)
    assert sorted(size for size, _ in searcher.calls) == sizes


def test_only_what_is_alike_goes_together() -> None:
    """Another depth or version in the same call would answer one request with what another has asked."""
    searchers = [Recorder(), Recorder("0000000002-cafe")]

    async def scenario(searches: Searches) -> None:
        handles = [IndexHandle(searcher) for searcher in searchers]
        asked = [(handle, k) for handle in handles for k in (3, 5)]
        found = await asyncio.gather(*(searches.search(handle, query(0), k, first) for handle, k in asked))
        assert found == [alone(0, k, handle.searcher.version) for handle, k in asked]

    run(1, scenario)
    assert all(sorted(searcher.calls) == [(1, 3), (1, 5)] for searcher in searchers)


def test_what_waits_for_a_thread_goes_together() -> None:
    """Searches that came one after the other while the threads were busy are no less alike."""
    searcher = Recorder()

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(searcher)
        go_on, jobs = await occupied(searches)
        tasks = []
        for i in range(5):
            tasks.append(asyncio.ensure_future(searches.search(handle, query(i), 3, first)))
            await asyncio.sleep(0.001)
        go_on.set()
        assert await asyncio.gather(*tasks) == [alone(i, 3) for i in range(5)]
        await asyncio.gather(*jobs)

    run(1, scenario)
    assert searcher.calls == [(5, 3)]


def test_a_slow_index_is_searched_for_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second for each of sixteen would be a second and a half for all of them."""
    monkeypatch.setattr(searches_module, "_SECONDS_TOGETHER", 0.0)
    searcher = Recorder()

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(searcher)
        found = await asyncio.gather(*(searches.search(handle, query(i), 3, first) for i in range(6)))
        assert found == [alone(i, 3) for i in range(6)]

    run(1, scenario)
    assert searcher.calls == [(1, 3)] * 6


def test_those_who_arrive_together_see_one_another_in_the_backlog() -> None:
    """Sixteen of one pass that each think themselves alone are all taken, and all but the first answered too late."""

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(Recorder())
        taught(searches, 0.02)
        found = await asyncio.gather(
            *(searches.search(handle, query(i), 3, first, seconds=0.15) for i in range(16)), return_exceptions=True
        )
        refused = [one for one in found if isinstance(one, OverloadedError)]
        # .8 of 150 ms is six searches of 20 ms, the caller's own included.
        assert len(refused) == 10
        assert found[:6] == [alone(i, 3) for i in range(6)]

    run(1, scenario)


def test_a_query_that_cannot_be_searched_fails_alone() -> None:
    """Otherwise one bad vector is answered with an error to all who happened to ask in the same millisecond."""
    searcher = Recorder()

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(searcher)
        vectors = [query(0), np.full((1, DIMENSION), np.nan, np.float32), query(2)]
        found = await asyncio.gather(
            *(searches.search(handle, vector, 3, first) for vector in vectors), return_exceptions=True
        )
        assert isinstance(found[1], ValueError)
        assert [found[0], found[2]] == [alone(0, 3), alone(2, 3)]

    run(1, scenario)


@pytest.mark.parametrize("busy", [False, True])
def test_who_left_is_not_searched_for(busy: bool) -> None:
    """A caller that gave up while it waited would cost the others its time, and have them refused for it."""
    searcher = Recorder()

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(searcher)
        go_on, jobs = await occupied(searches, int(busy))
        tasks = [asyncio.ensure_future(searches.search(handle, query(i), 3, first)) for i in range(4)]
        await asyncio.sleep(0)
        if busy:
            await asyncio.sleep(0.01)
        tasks[1].cancel()
        tasks[2].cancel()
        await asyncio.sleep(0)
        assert searches._backlog._units <= 2
        go_on.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in found] == [False, True, True, False]
        await asyncio.gather(*jobs)

    run(1, scenario)
    assert searcher.calls == [(2, 3)]


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_nobody_is_left_of_those_who_waited(passes: int) -> None:
    """A queue that all have left, before a job was sent or before a thread came, must not keep its version open."""
    searcher = Recorder()

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(searcher)
        go_on, jobs = await occupied(searches)
        tasks = [asyncio.ensure_future(searches.search(handle, query(i), 3, first)) for i in range(4)]
        for _ in range(passes):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        handle.release()
        assert searcher.closed
        go_on.set()
        await asyncio.gather(*jobs)

    run(1, scenario)
    assert searcher.calls == []


@pytest.mark.parametrize("error", [KeyError("field"), StopIteration(), SystemExit(3), asyncio.CancelledError()])
def test_whatever_goes_wrong_reaches_its_caller(error: BaseException) -> None:
    """An error that a future refuses, or that no handler names, leaves its caller waiting until the deadline."""

    def fails(_: DocumentSearcher, _rankings: Sequence[Ranking], _found: int) -> Found:
        raise error

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(Recorder())
        found = await asyncio.gather(
            *(searches.search(handle, query(i), 3, finish) for i, finish in enumerate([fails, first, fails])),
            return_exceptions=True,
        )
        expected = KeyError if isinstance(error, KeyError) else RuntimeError
        assert [type(found[0]), type(found[2])] == [expected, expected]
        assert found[1] == alone(1, 3)

    run(1, scenario)


def test_too_few_rankings_are_an_error_to_all() -> None:
    """An index that loses a query of a batch answers those behind it with one another's documents."""

    class Losing(Recorder):
        def search(self, vectors: Vectors, k: int, **options: object) -> list[Ranking]:
            return super().search(vectors, k)[1:]

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(Losing())
        found = await asyncio.gather(
            *(searches.search(handle, query(i), 3, first) for i in range(3)), return_exceptions=True
        )
        assert all(isinstance(one, ValueError) for one in found)

    run(1, scenario)


def test_a_pool_that_takes_no_more_work_says_so() -> None:
    """During a stop, or without memory for a thread, callers would otherwise wait for a thread that never comes."""

    async def main() -> None:
        pool = ThreadPoolExecutor(1)
        searches, searcher = Searches(pool, 1), Recorder()
        pool.shutdown()
        handle = IndexHandle(searcher)
        found = await asyncio.gather(
            *(searches.search(handle, query(i), 3, first) for i in range(3)), return_exceptions=True
        )
        assert all(isinstance(one, RuntimeError) for one in found)
        handle.release()
        assert searcher.closed == 1
        assert not searches._queues

    asyncio.run(main())


def test_the_version_stays_open_until_the_last_thread_is_done() -> None:
    """Callers that leave and a version that is replaced must not unmap the files under a search that runs."""
    searcher, running, go_on = Recorder(), threading.Event(), threading.Event()

    def slow(_: DocumentSearcher, _rankings: Sequence[Ranking], _found: int) -> None:
        running.set()
        assert go_on.wait(10)
        assert not searcher.closed

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(searcher)
        task = asyncio.ensure_future(searches.search(handle, query(0), 3, slow))
        assert await asyncio.to_thread(running.wait, 10)
        task.cancel()
        handle.release()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not searcher.closed
        go_on.set()

    run(1, scenario)
    assert searcher.closed == 1


class Batches:
    """Searches in parts that each take a time of their own; notes their sizes."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.sizes: list[int] = []
        self.begun = threading.Semaphore(0)

    def __call__(self, searcher: DocumentSearcher, part: Vectors) -> list[Ranking]:
        self.sizes.append(len(part))
        self.begun.release()
        time.sleep(self.seconds * len(part))
        return searcher.search(part, 3)


def every(_: DocumentSearcher, rankings: Sequence[Ranking], _found: int = 0) -> list[Found]:
    return [(ranking.doc_ids, ranking.scores.tolist()) for ranking in rankings]


def test_a_slow_batch_is_searched_in_parts_and_a_fast_one_nearly_whole() -> None:
    """Parts of seconds are not left by a caller who goes; parts of one query cost what batches are there to save."""
    slow, fast = Batches(0.03), Batches()

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(FakeSearcher())
        expected = [alone(i, 3) for i in range(len(QUERIES))]
        taught(searches, 1e-4)
        assert await searches.search_batch(handle, QUERIES, fast, every) == expected
        assert await searches.search_batch(handle, QUERIES, slow, every) == expected

    run(1, scenario)
    assert fast.sizes == [16, 24]
    # It looked fast until it was asked.
    assert slow.sizes[0] == 16
    assert slow.sizes[1:] == [1] * 24


def test_what_is_left_of_a_batch_whose_caller_went_is_dropped() -> None:
    """Otherwise a thread works for nobody until the batch ends, and others are refused for as long."""
    batches = Batches(0.05)

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(FakeSearcher())
        taught(searches, 0.05)
        running = asyncio.ensure_future(searches.search_batch(handle, QUERIES, batches, every))
        assert await asyncio.to_thread(batches.begun.acquire, timeout=20)
        waiting = asyncio.ensure_future(searches.search_batch(handle, QUERIES, batches, every))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="the index is busy"):
            await searches.search_batch(handle, QUERIES[:2], batches, every, seconds=1.0)
        running.cancel()
        waiting.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        assert searches._backlog._units <= 1
        assert await searches.search(handle, query(0), 3, first, seconds=1.0) == alone(0, 3)

    run(1, scenario)
    assert sum(batches.sizes) < 5


def test_a_batch_that_was_given_up_gets_no_other_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that looks for work in the moment before it is answered would answer it a second time."""
    batches, raisable, answered = Batches(0.05), searches_module._raisable, []

    async def scenario(searches: Searches) -> None:
        def meanwhile(error: BaseException) -> Exception:
            answered.append(error)
            if len(answered) == 1:
                searches._send_parts()
            return raisable(error)

        monkeypatch.setattr(searches_module, "_raisable", meanwhile)
        handle = IndexHandle(FakeSearcher())
        taught(searches, 0.05)
        batch = asyncio.ensure_future(searches.search_batch(handle, QUERIES, batches, every))
        assert await asyncio.to_thread(batches.begun.acquire, timeout=20)
        batch.cancel()
        await asyncio.gather(batch, return_exceptions=True)
        for _ in range(2):
            await searches.run(handle, lambda _: None)
        assert len(answered) == 1

    run(1, scenario)


def test_a_batch_keeps_no_thread_from_what_is_short() -> None:
    """Otherwise as many bulk callers as there are threads shut out everybody else for as long as they like."""
    batches = Batches(0.05)

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(FakeSearcher())
        taught(searches, 0.05)
        bulk = [asyncio.ensure_future(searches.search_batch(handle, QUERIES, batches, every)) for _ in range(2)]
        assert await asyncio.to_thread(batches.begun.acquire, timeout=20)
        # Two batches of two seconds: neither refused for the wait nor answered after it.
        assert await searches.search(handle, query(0), 3, first, seconds=1.0) == alone(0, 3)
        assert await searches.run(handle, lambda searcher: searcher.version) == "0000000001-cafe"
        assert sum(batches.sizes) < len(QUERIES)
        expected = [alone(i, 3) for i in range(len(QUERIES))]
        assert await asyncio.gather(*bulk) == [expected, expected]

    run(1, scenario)


def test_a_batch_that_was_taken_is_not_made_late_by_later_ones() -> None:
    """In turns all batches end when the last of them does: what was told to be in time is thrown away half done."""

    async def scenario(searches: Searches) -> None:
        handle, ended = IndexHandle(FakeSearcher()), []
        taught(searches, 0.01)

        async def one(name: int) -> None:
            await searches.search_batch(handle, QUERIES, Batches(0.01), every)
            ended.append((name, time.perf_counter()))

        began = time.perf_counter()
        await asyncio.gather(*(one(name) for name in range(4)))
        assert [name for name, _ in ended] == [0, 1, 2, 3]
        first, last = ended[0][1] - began, ended[3][1] - began
        assert first < last / 2

    run(1, scenario)


@pytest.mark.parametrize("queries", [0, 1])
def test_what_is_short_is_not_refused_for_batches_that_let_it_pass(queries: int) -> None:
    """Reading texts for a reranker would be refused for seconds of work that it need not wait for."""
    batches = Batches(0.05)

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(FakeSearcher())
        taught(searches, 0.05)
        bulk = [asyncio.ensure_future(searches.search_batch(handle, QUERIES, batches, every)) for _ in range(3)]
        assert await asyncio.to_thread(batches.begun.acquire, timeout=20)
        searches.require_in_time(queries, 0.5)
        with pytest.raises(OverloadedError):
            searches.require_in_time(2, 0.5)
        for one in bulk:
            one.cancel()
        await asyncio.gather(*bulk, return_exceptions=True)
        await searches.run(handle, lambda _: None)  # after the part that the thread had in hand

    run(1, scenario)


def test_a_batch_that_goes_on_counts_only_what_is_left_of_it() -> None:
    """Whoever comes when a batch is almost done would be refused as if it had just begun."""
    batches, left = Batches(), []

    async def scenario(searches: Searches) -> None:
        def noting(searcher: DocumentSearcher, part: Vectors) -> list[Ranking]:
            left.append((searches._backlog._jobs, searches._backlog._units))
            return batches(searcher, part)

        await searches.search_batch(IndexHandle(FakeSearcher()), QUERIES, noting, every)

    run(2, scenario)
    done = [sum(batches.sizes[:i]) for i in range(len(batches.sizes))]
    assert len(done) > 1
    assert left == [(1, len(QUERIES) - some) for some in done]


def test_a_part_that_fails_fails_its_batch_and_frees_the_version() -> None:
    """Otherwise one bad query of many would keep the version mapped, and the index busy, for good."""
    searcher = Recorder()

    async def scenario(searches: Searches) -> None:
        handle, vectors = IndexHandle(searcher), QUERIES.copy()
        vectors[-1] = np.nan
        with pytest.raises(ValueError, match="not finite"):
            await searches.search_batch(handle, vectors, lambda some, part: some.search(part, 3), every)
        handle.release()
        assert searcher.closed

    run(1, scenario)
