"""The micro-batcher: texts that wait together are encoded together, and nobody waits for company.

On few CPU cores batching buys at most 1.6x, so there is no artificial delay: whenever the encoder is
free it takes what is queued. The rule is that of text-embeddings-inference's ``core/src/queue.rs``,
with its users' complaints answered: a single text and a batch meet the same bound
(text-embeddings-inference#662), and texts whose caller left are dropped before they are encoded
(infinity#546).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from retrieval_kd.encoders.base import Vectors
from serve.errors import NotReadyError, OverloadedError
from serve.limits import Limits

Tokens = Sequence[int]
SHORTEST_RETRY = 0.05
"""Seconds; a client told to come back at once would be refused again."""
_STOPPING = "the server is stopping; ask another one"


@dataclass(frozen=True)
class Encoded:
    """Vectors float32 ``[n, d]``, the wait of the first and the encoding of all, in nanoseconds."""

    vectors: Vectors
    queue_ns: int
    encode_ns: int


@dataclass(frozen=True)
class _Done:
    vector: Vectors
    started: int
    ended: int


@dataclass(frozen=True, eq=False)
class _Entry:
    tokens: Tokens
    done: asyncio.Future[_Done]


class MicroBatcher:
    """One thread that encodes, fed by a bounded queue on the event loop; the oldest entry always goes next.

    An entry whose caller was cancelled or ran out of time is one whose future is done: there is no
    second bookkeeping of deadlines.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Tokens]], Vectors],
        limits: Limits,
        batch_texts: int = 8,
        batch_tokens: int = 2048,
    ) -> None:
        """Take the encoder's ``run(rows) -> float32 [n, d]`` and the largest batch, in texts and in tokens."""
        self._run = run
        self._limits = limits
        self._batch_texts = batch_texts
        self._batch_tokens = batch_tokens
        self._queue: deque[_Entry] = deque()
        self._arrival = asyncio.Event()
        self._seconds_per_token = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._stopping = False

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._arrival.set()
        await self._worker
        for entry in self._queue:
            _fail(entry, NotReadyError(_STOPPING))
        self._thread.shutdown()

    async def encode(self, rows: Sequence[Tokens]) -> Encoded:
        """Encode token rows, together with whatever else waits.

        Raises:
            OverloadedError: the queue has no room for all of them; nothing was queued.
            NotReadyError: the batcher was left before the rows had their turn.
        """
        if self._stopping:
            raise NotReadyError(_STOPPING)
        self._admit(rows)
        arrived = time.perf_counter_ns()
        loop = asyncio.get_running_loop()
        entries = [_Entry(row, loop.create_future()) for row in rows]
        self._queue.extend(entries)
        self._arrival.set()
        done = await asyncio.gather(*(entry.done for entry in entries))
        started = min(one.started for one in done)
        return Encoded(
            vectors=np.stack([one.vector for one in done]),
            queue_ns=started - arrived,
            encode_ns=max(one.ended for one in done) - started,
        )

    def _admit(self, rows: Sequence[Tokens]) -> None:
        """Refuse what does not fit; an empty queue takes any request, or a large one could never be answered."""
        if self._fits(rows):
            return
        self._drop_abandoned()
        if self._queue and not self._fits(rows):
            wait = _tokens(self._queue) * self._seconds_per_token
            raise OverloadedError(
                f"{len(self._queue)} texts already wait for the encoder; try again later", max(SHORTEST_RETRY, wait)
            )

    def _fits(self, rows: Sequence[Tokens]) -> bool:
        texts = len(self._queue) + len(rows)
        tokens = _tokens(self._queue) + sum(map(len, rows))
        return texts <= self._limits.max_queued_texts and tokens <= self._limits.max_queued_tokens

    def _drop_abandoned(self) -> None:
        self._queue = deque(entry for entry in self._queue if not entry.done.done())

    async def _work(self) -> None:
        while True:
            await self._arrival.wait()
            if self._stopping:
                return
            batch = self._take()
            if batch:
                await self._encode(batch)
            else:
                self._arrival.clear()

    def _take(self) -> list[_Entry]:
        """Take the oldest entry and others of its length: the encoder pads nothing, so only those share a run."""
        self._drop_abandoned()
        if not self._queue:
            return []
        length = len(self._queue[0].tokens)
        room = max(1, min(self._batch_texts, self._batch_tokens // max(1, length)))
        batch = [entry for entry in self._queue if len(entry.tokens) == length][:room]
        taken = set(batch)
        self._queue = deque(entry for entry in self._queue if entry not in taken)
        return batch

    async def _encode(self, batch: list[_Entry]) -> None:
        started = time.perf_counter_ns()
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, [one.tokens for one in batch])
        await asyncio.wait([running])
        ended = time.perf_counter_ns()
        error = running.exception()
        if error is not None:
            for entry in batch:
                _fail(entry, error)
            return
        self._seconds_per_token = (ended - started) / 1e9 / max(1, _tokens(batch))
        for entry, vector in zip(batch, running.result(), strict=True):
            if not entry.done.done():
                entry.done.set_result(_Done(vector, started, ended))


def _fail(entry: _Entry, error: BaseException) -> None:
    if not entry.done.done():
        entry.done.set_exception(error)


def _tokens(entries: Sequence[_Entry] | deque[_Entry]) -> int:
    return sum(len(entry.tokens) for entry in entries)
