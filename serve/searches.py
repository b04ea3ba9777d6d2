"""Reading an index version off the event loop; single searches that wait together are one search of the index.

Queries that were encoded together are ready together. One call of the index costs them less than one each, and a
thread is woken once for all of them. A thread that is free takes what waits, so nobody waits for company; it takes no
more than it answers within a few milliseconds, so nobody waits long for the company's answers either. An index answers
a query alone and in a batch alike, so nobody can tell.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.runs import Ranking
from serve.backlog import Backlog
from serve.indexes import DocumentSearcher, IndexHandle

T = TypeVar("T")
Finish = Callable[[DocumentSearcher, Sequence[Ranking], int], T]
"""Makes an answer of the rankings, given the state of the index that they are of and when they were found
(:func:`time.perf_counter_ns`)."""
SearchPart = Callable[[DocumentSearcher, Vectors], Sequence[Ranking]]
"""Finds a ranking for each row, float32 ``[n, d]``."""
_SECONDS_TOGETHER = 0.005
_MOST_TOGETHER = 16
_SECONDS_A_PART = 0.05


@dataclass(frozen=True, eq=False)
class _Search:
    vector: Vectors
    finish: Finish[Any]
    done: asyncio.Future[Any]


@dataclass(eq=False)
class _Batch:
    """Queries of one caller: ``left`` count as waiting or under way, of which ``begun`` are in a thread's hands."""

    number: int
    handle: IndexHandle
    vectors: Vectors
    search: SearchPart
    finish: Finish[Any]
    left: int
    part: int
    begun: int = 0
    under_way: bool = False
    given_up: bool = False
    searcher: DocumentSearcher | None = None
    rankings: list[Ranking] = field(default_factory=list)
    job: Future[None] | None = None
    answer: Future[Any] = field(default_factory=Future)

    @property
    def later(self) -> int:
        """Return how many of its queries have their turn after what arrives now and is short."""
        return max(0, self.left - self.part) if self.under_way else self.left


@dataclass(eq=False)
class _Queue:
    """Searches of one version for equally many documents; ``jobs`` of the pool have yet to look here."""

    handle: IndexHandle
    k: int
    waiting: deque[_Search] = field(default_factory=deque)
    jobs: int = 0
    sending: bool = False


class Searches:
    """What reads index versions on a pool's threads; used on one loop."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        """Take the pool and the number of its threads."""
        self._pool = pool
        self._threads = threads
        self._backlog = Backlog("the index", threads)
        self._queues: dict[tuple[IndexHandle, int], _Queue] = {}
        self._batches = dict[int, _Batch]()
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def require_in_time(self, queries: int, seconds: float | None) -> None:
        """Refuse a request before any other work is done for it.

        Args:
            queries: How many it searches for.
            seconds: How long the caller waits; None if for ever.

        Raises:
            OverloadedError: the index would be done with it too late.
        """
        with self._lock:
            # Batches keep their order. What is short comes between the parts of those that are under way.
            later = sum(batch.later for batch in self._batches.values()) if queries <= 1 else 0
        self._backlog.require_in_time(queries, seconds, later)

    async def run(self, handle: IndexHandle, work: Callable[[DocumentSearcher], T]) -> T:
        """Run work that is short beside a search; the version stays open until the thread is done with it.

        A caller who is cancelled leaves the thread behind, and it must not find its files unmapped.
        """
        self._enter(handle, 0)
        try:
            running = self._pool.submit(work, handle.searcher)
        except BaseException:
            self._leave(handle, 0)
            raise
        running.add_done_callback(lambda _: self._leave(handle, 0))
        return await asyncio.wrap_future(running)

    async def search_batch(
        self,
        handle: IndexHandle,
        vectors: Vectors,
        search: SearchPart,
        finish: Finish[T],
        seconds: float | None = None,
    ) -> T:
        """Search a version for a batch of queries, in parts, between which a thread does what else waits.

        Once the caller is cancelled the rest is dropped.

        Args:
            handle: The version.
            vectors: The queries, float32 ``[n, d]``.
            search: Finds the rankings of a part.
            finish: Makes the answer of all rankings, on the thread that found them.
            seconds: How long the caller waits; None if for ever.

        Raises:
            OverloadedError: the search would be done too late; it was not queued.
        """
        self.require_in_time(len(vectors), seconds)
        # How long these queries take, whose filter or effort may be like nobody else's, only they can tell.
        part = min(_MOST_TOGETHER, self._backlog.within(_SECONDS_A_PART))
        batch = _Batch(next(self._numbers), handle, vectors, search, finish, len(vectors), part)
        # A running future is not cancelled by who waits for it: a thread may have a part in hand.
        batch.answer.set_running_or_notify_cancel()
        self._enter(handle, batch.left)
        with self._lock:
            self._batches[batch.number] = batch
        batch.answer.add_done_callback(lambda _: self._end(batch))
        self._send_parts()
        try:
            answer: T = await asyncio.wrap_future(batch.answer)
        except asyncio.CancelledError:
            self._give_up(batch)
            raise
        return answer

    def _send_parts(self) -> None:
        """Have a part of the oldest batches in the pool, of as many as there are threads.

        In turns, each would be done as late as all of them together, and none when its caller was told.
        """
        with self._lock:
            free = self._threads - sum(batch.under_way for batch in self._batches.values())
            waiting = (batch for _, batch in sorted(self._batches.items()) if not batch.under_way)
            chosen = list(itertools.islice(waiting, max(0, free)))
            for batch in chosen:
                batch.under_way = True
        for batch in chosen:
            try:
                batch.job = self._pool.submit(self._work_on, batch)
            except BaseException as error:  # noqa: BLE001  it is its caller's to handle
                batch.answer.set_exception(_raisable(error))

    def _work_on(self, batch: _Batch) -> None:
        """Search the next part, and answer if it was the last."""
        try:
            searcher = batch.searcher = batch.searcher or batch.handle.searcher.snapshot()
            done = len(batch.rankings)
            vectors = batch.vectors[done : done + batch.part]
            self._begin(batch, len(vectors))
            started = time.perf_counter()
            batch.rankings += batch.search(searcher, vectors)
            seconds = time.perf_counter() - started
            self._backlog.learn(len(vectors), seconds)
            with self._lock:
                batch.part = max(1, int(len(vectors) * _SECONDS_A_PART / max(seconds, 1e-9)))
                given_up = batch.given_up
                # Whoever ends it here keeps it out of other hands.
                ended = given_up or len(batch.rankings) == len(batch.vectors)
                batch.under_way = ended
            if given_up:
                raise CancelledError
            if ended:
                batch.answer.set_result(batch.finish(searcher, batch.rankings, time.perf_counter_ns()))
        except BaseException as error:  # noqa: BLE001  it is its caller's to handle
            batch.answer.set_exception(_raisable(error))
        self._send_parts()

    def _begin(self, batch: _Batch, queries: int) -> None:
        """Count the part before as done, and begin another unless nobody waits for it."""
        with self._lock:
            if batch.given_up:
                raise CancelledError
            done, batch.begun = batch.begun, queries
            batch.left -= done
        self._backlog.progress(done)

    def _give_up(self, batch: _Batch) -> None:
        """Let the thread, if it has begun, end with the part that it has in hand."""
        with self._lock:
            batch.given_up = True
            dropped = batch.left - batch.begun
            batch.left = batch.begun
            idle, batch.under_way = not batch.under_way, True
        self._backlog.progress(dropped)
        if idle or (batch.job is not None and batch.job.cancel()):
            batch.answer.set_exception(CancelledError())
            self._send_parts()

    def _end(self, batch: _Batch) -> None:
        with self._lock:
            del self._batches[batch.number]
            left, batch.left, batch.begun = batch.left, 0, 0
        self._leave(batch.handle, left)

    async def search(
        self, handle: IndexHandle, vector: Vectors, k: int, finish: Finish[T], seconds: float | None = None
    ) -> T:
        """Search a version as its own effort has it, without a filter, together with who else waits for that.

        Who is cancelled while waiting leaves the queue by that alone.

        Args:
            handle: The version.
            vector: The query, float32 ``[1, d]``.
            k: Documents wanted.
            finish: Makes the answer, on the thread that found the ranking.
            seconds: How long the caller waits; None if for ever.

        Raises:
            OverloadedError: the search would be done too late; it was not queued.
        """
        self.require_in_time(1, seconds)
        loop = asyncio.get_running_loop()
        one = _Search(vector, finish, loop.create_future())
        queue = self._queues.setdefault((handle, k), _Queue(handle, k))
        self._enter(handle, 1)
        with self._lock:
            queue.waiting.append(one)
        if not queue.sending:
            # Those that are ready in the same pass of the loop are in the queue by the time of this call.
            queue.sending = True
            loop.call_soon(self._send, queue, loop)
        try:
            answer: T = await one.done
        except asyncio.CancelledError:
            self._abandon(queue, one)
            raise
        return answer

    def _send(self, queue: _Queue, loop: asyncio.AbstractEventLoop) -> None:
        """Have as many threads look here as have something to do."""
        queue.sending = False
        with self._lock:
            lacking = max(0, min(self._threads, len(queue.waiting)) - queue.jobs)
            queue.jobs += lacking
        for _ in range(lacking):
            self._submit(queue, loop)

    def _submit(self, queue: _Queue, loop: asyncio.AbstractEventLoop) -> None:
        """Give the pool one of the queue's jobs."""
        try:
            self._pool.submit(self._work, queue, loop)
        except BaseException as error:  # noqa: BLE001  those who wait for the thread have to hear of it
            with self._lock:
                queue.jobs -= 1
                part = list(queue.waiting)
                queue.waiting.clear()
            self._answer(queue, loop, part, [_raisable(error)] * len(part))

    def _work(self, queue: _Queue, loop: asyncio.AbstractEventLoop) -> None:
        part, rest = self._take(queue)
        if rest:
            self._submit(queue, loop)
        if not part:
            loop.call_soon_threadsafe(self._forget_if_idle, queue)
            return
        started = time.perf_counter()
        outcomes = _outcomes(queue.handle.searcher, queue.k, part)
        self._backlog.learn(len(part), time.perf_counter() - started)
        self._answer(queue, loop, part, outcomes)

    def _take(self, queue: _Queue) -> tuple[list[_Search], bool]:
        """Return a fair share of those who wait, and whether one more job is needed for others who are left."""
        most = min(_MOST_TOGETHER, self._backlog.within(_SECONDS_TOGETHER))
        with self._lock:
            share = min(most, math.ceil(len(queue.waiting) / queue.jobs))
            queue.jobs -= 1
            part = [queue.waiting.popleft() for _ in range(share)]
            rest = bool(queue.waiting) and queue.jobs == 0
            queue.jobs += rest
            return part, rest

    def _answer(
        self, queue: _Queue, loop: asyncio.AbstractEventLoop, part: Sequence[_Search], outcomes: Sequence[Any]
    ) -> None:
        for _ in part:
            self._leave(queue.handle, 1)
        loop.call_soon_threadsafe(self._settle, queue, part, outcomes)

    def _settle(self, queue: _Queue, part: Sequence[_Search], outcomes: Sequence[Any]) -> None:
        self._forget_if_idle(queue)
        for one, outcome in zip(part, outcomes, strict=True):
            if one.done.done():
                continue
            if isinstance(outcome, Exception):
                one.done.set_exception(outcome)
            else:
                one.done.set_result(outcome)

    def _abandon(self, queue: _Queue, one: _Search) -> None:
        with self._lock:
            if one not in queue.waiting:
                return
            queue.waiting.remove(one)
        self._leave(queue.handle, 1)
        self._forget_if_idle(queue)

    def _forget_if_idle(self, queue: _Queue) -> None:
        with self._lock:
            idle = not queue.waiting and not queue.jobs and not queue.sending
        if idle and self._queues.get((queue.handle, queue.k)) is queue:
            del self._queues[queue.handle, queue.k]

    def _enter(self, handle: IndexHandle, queries: int) -> None:
        handle.acquire()
        self._backlog.enter(queries)

    def _leave(self, handle: IndexHandle, queries: int) -> None:
        self._backlog.leave(queries)
        handle.release()


def _outcomes(searcher: DocumentSearcher, k: int, part: Sequence[_Search]) -> list[Any]:
    """Return an answer, or what went wrong, for each search; the trouble of one is not that of the others."""
    try:
        searcher = searcher.snapshot()
        rankings = searcher.search(np.concatenate([one.vector for one in part]), k)
        found = time.perf_counter_ns()
        return [_finished(searcher, one, ranking, found) for one, ranking in zip(part, rankings, strict=True)]
    except BaseException as error:  # noqa: BLE001  it is its callers' to handle
        if len(part) == 1:
            return [_raisable(error)]
        return [outcome for one in part for outcome in _outcomes(searcher, k, [one])]


def _finished(searcher: DocumentSearcher, one: _Search, ranking: Ranking, found: int) -> Any:
    try:
        return one.finish(searcher, [ranking], found)
    except BaseException as error:  # noqa: BLE001  it is its caller's to handle
        return _raisable(error)


def _raisable(error: BaseException) -> Exception:
    """Return an error as a future takes it; others would end the loop, or pass for the caller's own cancellation."""
    return error if isinstance(error, Exception) and not isinstance(error, StopIteration) else RuntimeError(repr(error))
