"""Reading an index version off the event loop; single searches that arrive together are one search of the index.

Queries that were encoded together are ready in the same pass of the loop. One call to the index costs them less than
one each, and a thread is woken once for all of them. An index answers a query alone and in a batch alike, to the bit,
so nobody can tell.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.runs import Ranking
from serve.backlog import Backlog
from serve.indexes import DocumentSearcher, IndexHandle

T = TypeVar("T")
Finish = Callable[[DocumentSearcher, Sequence[Ranking]], T]
# Nobody waits for the answers of more than these.
_MOST_TOGETHER = 16


@dataclass(frozen=True, eq=False)
class _Search:
    vector: Vectors
    finish: Finish[Any]
    done: asyncio.Future[Any]


class Searches:
    """What reads index versions on a pool's threads; used on one loop."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        """Take the pool and the number of its threads."""
        self._pool = pool
        self._threads = threads
        self._backlog = Backlog("the index", threads)
        self._together: dict[tuple[IndexHandle, int], list[_Search]] = {}

    def require_in_time(self, queries: int, seconds: float | None) -> None:
        """Refuse a request before any other work is done for it.

        Args:
            queries: How many it searches for.
            seconds: How long the caller waits; None if for ever.

        Raises:
            OverloadedError: the index would be done with it too late.
        """
        self._backlog.require_in_time(queries, seconds)

    async def run(
        self,
        handle: IndexHandle,
        work: Callable[[DocumentSearcher], T],
        queries: int = 0,
        seconds: float | None = None,
    ) -> T:
        """Run work that reads an index version; the version stays open until the thread is done with it.

        A caller who is cancelled leaves the thread behind, and it must not find its files unmapped.

        Args:
            handle: The version.
            work: What to do with it.
            queries: How many it is searched for; 0 for work that is short beside a search.
            seconds: How long the caller waits; None if for ever.

        Raises:
            OverloadedError: the work would be done too late; it was not queued.
        """
        if queries:
            self.require_in_time(queries, seconds)
        return await asyncio.wrap_future(self._submit(handle, work, queries))

    async def search(
        self, handle: IndexHandle, vector: Vectors, k: int, finish: Finish[T], seconds: float | None = None
    ) -> T:
        """Search a version as its own effort has it, without a filter, together with who else wants that now.

        Args:
            handle: The version.
            vector: The query, float32 ``[1, d]``.
            k: Documents wanted.
            finish: Makes the answer of the one ranking, on the thread that found it.
            seconds: How long the caller waits; None if for ever.

        Raises:
            OverloadedError: the search would be done too late; it was not queued.
        """
        self.require_in_time(1, seconds)
        loop = asyncio.get_running_loop()
        one = _Search(vector, finish, loop.create_future())
        waiting = self._together.get((handle, k))
        if waiting is None:
            # The version stays open for those who gather, though every one of their callers leaves.
            handle.acquire()
            self._together[handle, k] = waiting = []
            loop.call_soon(self._send, handle, k)
        waiting.append(one)
        done: T = await one.done
        return done

    def _send(self, handle: IndexHandle, k: int) -> None:
        """Give the searches that have gathered to the threads, some to each."""
        group = [one for one in self._together.pop((handle, k)) if not one.done.done()]
        parts = max(min(self._threads, len(group)), math.ceil(len(group) / _MOST_TOGETHER))
        try:
            for part in range(parts):
                self._send_part(handle, k, group[part::parts])
        finally:
            handle.release()

    def _send_part(self, handle: IndexHandle, k: int, part: Sequence[_Search]) -> None:
        loop = asyncio.get_running_loop()

        def work(searcher: DocumentSearcher) -> None:
            loop.call_soon_threadsafe(_settle, part, _outcomes(searcher, k, part))

        try:
            self._submit(handle, work, len(part))
        except RuntimeError as error:
            _settle(part, [error] * len(part))

    def _submit(self, handle: IndexHandle, work: Callable[[DocumentSearcher], T], queries: int) -> Any:
        def timed() -> T:
            started = time.perf_counter()
            done = work(handle.searcher)
            self._backlog.learn(queries, time.perf_counter() - started)
            return done

        def leave(_: object) -> None:
            self._backlog.leave(queries)
            handle.release()

        handle.acquire()
        self._backlog.enter(queries)
        try:
            running = self._pool.submit(timed)
        except BaseException:
            leave(None)
            raise
        running.add_done_callback(leave)
        return running


def _outcomes(searcher: DocumentSearcher, k: int, part: Sequence[_Search]) -> list[Any]:
    """Return an answer, or what went wrong, for each search; the trouble of one is not that of the others."""
    try:
        rankings = searcher.search(np.concatenate([one.vector for one in part]), k)
    except Exception as error:  # noqa: BLE001  it is its callers' to handle
        if len(part) == 1:
            return [error]
        return [outcome for one in part for outcome in _outcomes(searcher, k, [one])]
    return [_finished(searcher, one, ranking) for one, ranking in zip(part, rankings, strict=True)]


def _finished(searcher: DocumentSearcher, one: _Search, ranking: Ranking) -> Any:
    try:
        return one.finish(searcher, [ranking])
    except Exception as error:  # noqa: BLE001  it is its caller's to handle
        return error


def _settle(part: Sequence[_Search], outcomes: Sequence[Any]) -> None:
    for one, outcome in zip(part, outcomes, strict=True):
        if one.done.done():
            continue
        if isinstance(outcome, Exception):
            one.done.set_exception(outcome)
        else:
            one.done.set_result(outcome)
