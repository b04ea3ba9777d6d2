"""Searches that arrive together: one call of the index, and nobody's trouble is anybody else's."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serve_fakes import DIMENSION, FakeSearcher

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.runs import Ranking
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


def first(_: DocumentSearcher, rankings: Sequence[Ranking]) -> Found:
    (ranking,) = rankings
    return ranking.doc_ids, ranking.scores.tolist()


def alone(number: int, k: int, version: str = "0000000001-cafe") -> Found:
    searcher = FakeSearcher(version=version)
    return first(searcher, searcher.search(query(number), k))


def run(threads: int, scenario: Callable[[Searches], Awaitable[None]]) -> None:
    async def main() -> None:
        with ThreadPoolExecutor(threads) as pool:
            await scenario(Searches(pool, threads))

    asyncio.run(main())


def query(number: int) -> Vectors:
    return QUERIES[number : number + 1]


@pytest.mark.parametrize(
    ("threads", "count", "sizes"), [(1, 5, [5]), (2, 5, [2, 3]), (8, 3, [1, 1, 1]), (1, 40, [13, 13, 14])]
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


def test_later_searches_do_not_wait_for_company() -> None:
    """A search that came a moment later belongs to the next call; nobody is held back for it."""
    searcher = Recorder()

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(searcher)
        await searches.search(handle, query(0), 3, first)
        await searches.search(handle, query(1), 3, first)

    run(1, scenario)
    assert searcher.calls == [(1, 3), (1, 3)]


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


def test_an_answer_that_cannot_be_made_fails_alone() -> None:
    """A request for a field that is not stored fails when its answer is made, after the search it shared."""

    def fails(_: DocumentSearcher, _rankings: Sequence[Ranking]) -> Ranking:
        raise KeyError("field")

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(Recorder())
        found = await asyncio.gather(
            searches.search(handle, query(0), 3, fails),
            searches.search(handle, query(1), 3, first),
            return_exceptions=True,
        )
        assert isinstance(found[0], KeyError)
        assert found[1] == alone(1, 3)

    run(1, scenario)


def test_who_left_is_not_searched_for() -> None:
    """A caller that gave up while the searches gathered would cost the others its time."""
    searcher = Recorder()

    async def scenario(searches: Searches) -> None:
        handle = IndexHandle(searcher)
        tasks = [asyncio.ensure_future(searches.search(handle, query(i), 3, first)) for i in range(3)]
        asyncio.get_running_loop().call_soon(tasks[1].cancel)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[1], asyncio.CancelledError)

    run(1, scenario)
    assert searcher.calls == [(2, 3)]


def test_the_version_stays_open_until_the_last_thread_is_done() -> None:
    """Callers that leave and a version that is replaced must not unmap the files under a search that runs."""
    searcher, running, go_on = Recorder(), threading.Event(), threading.Event()

    def slow(_: DocumentSearcher, _rankings: Sequence[Ranking]) -> None:
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


def test_a_search_that_would_be_late_is_refused_before_it_gathers() -> None:
    """Queued behind more than its deadline it would be searched for nobody."""
    searcher = Recorder()

    async def scenario(searches: Searches) -> None:
        handle, busy = IndexHandle(searcher), threading.Event()

        def slow(_: DocumentSearcher) -> None:
            busy.set()
            searcher.gate.wait(10)

        await searches.run(handle, lambda _: searcher.gate.wait(0.05) and None, 1)
        searcher.gate.clear()
        running = asyncio.ensure_future(searches.run(handle, slow, 10_000))
        await asyncio.to_thread(busy.wait, 10)
        try:
            with pytest.raises(OverloadedError, match="the index is busy"):
                await searches.search(handle, query(0), 3, first, seconds=1e-6)
        finally:
            searcher.gate.set()
        await running

    run(1, scenario)
    assert searcher.calls == []
