"""The micro-batcher: texts that wait together are encoded together, and nobody waits for company.

On few CPU cores batching buys at most 1.6x, so there is no artificial delay: whenever the encoder is
free it takes what is queued. The rule is that of text-embeddings-inference's ``core/src/queue.rs``,
with its users' complaints answered: a single text and a batch meet the same bound
(text-embeddings-inference#662), and texts whose caller left are dropped before they are encoded
(infinity#546). Queries go before documents, but documents get their turn.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import Side
from serve.backlog import SHORTEST_RETRY, moved, require_in_time
from serve.errors import NotReadyError, OverloadedError
from serve.limits import Limits
from serve.metrics import Metrics

Tokens = Sequence[int]
QUERY_BATCHES = 4
"""Batches of queries that may go before a batch of documents that waits."""
_STOPPING = "the server is stopping; ask another one"


@dataclass(frozen=True)
class Encoded:
    """Vectors float32 ``[n, d]``, the wait of the first and the encoding of all, in nanoseconds."""

    vectors: Vectors
    queue_ns: int
    encode_ns: int


@dataclass(eq=False)
class _Request:
    """The texts of one caller, of which ``left`` have no vector yet; times are those of its first and last batch."""

    done: asyncio.Future[Encoded]
    arrived: int
    vectors: list[Vectors]
    left: int
    started: int = 0

    def put(self, position: int, vector: Vectors, started: int, ended: int) -> None:
        """Take a text's vector and answer the caller, if there still is one, after the last."""
        self.vectors[position] = vector
        self.started = self.started or started
        self.left -= 1
        if not self.left and not self.done.done():
            queued, encoded = self.started - self.arrived, ended - self.started
            self.done.set_result(Encoded(np.stack(self.vectors), queued, encoded))

    def fail(self, error: BaseException) -> None:
        """Tell the caller, if there still is one."""
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(frozen=True, eq=False)
class _Entry:
    tokens: Tokens
    request: _Request
    position: int


class _Queue:
    """Entries in the order of their arrival, and how many tokens they hold."""

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[_Entry]:
        return iter(self._entries)

    def extend(self, entries: Sequence[_Entry]) -> None:
        self._entries.extend(entries)
        self.tokens += _tokens(entries)

    def drop_abandoned(self) -> int:
        """Drop the entries whose callers left and return how many they were."""
        before = len(self)
        self._keep([entry for entry in self._entries if not entry.request.done.done()])
        return before - len(self)

    def take(self, texts: int, tokens: int) -> list[_Entry]:
        """Take the oldest entry and others of its length: the encoder pads nothing, so only those share a run."""
        if not self._entries:
            return []
        length = len(self._entries[0].tokens)
        room = max(1, min(texts, tokens // max(1, length)))
        batch = [entry for entry in self._entries if len(entry.tokens) == length][:room]
        taken = set(batch)
        self._keep([entry for entry in self._entries if entry not in taken])
        return batch

    def _keep(self, entries: list[_Entry]) -> None:
        if len(entries) < len(self._entries):
            self._entries = deque(entries)
            self.tokens = _tokens(entries)


class MicroBatcher:
    """One thread that encodes, fed by bounded queues on the event loop; of a queue the oldest entry goes next.

    An entry whose caller was cancelled or ran out of time is one of a request that is done: there is no second
    bookkeeping of deadlines.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Tokens]], Vectors],
        limits: Limits,
        metrics: Metrics | None = None,
        batch_texts: int = 16,
        batch_tokens: int = 2048,
    ) -> None:
        """Take the encoder's ``run(rows) -> float32 [n, d]`` and the largest batch, in texts and in tokens."""
        self._run = run
        self._limits = limits
        self._metrics = metrics or Metrics()
        self._batch_texts = batch_texts
        self._batch_tokens = batch_tokens
        self._queues: dict[Side, _Queue] = {"query": _Queue(), "document": _Queue()}
        self._query_batches = 0
        self._arrival = asyncio.Event()
        self._seconds_per_token = 0.0
        self._seconds_per_batch = 0.0
        self._running_tokens = 0
        self._running_since = 0.0
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
        for queue in self._queues.values():
            for entry in queue:
                entry.request.fail(NotReadyError(_STOPPING))
        self._thread.shutdown()

    async def encode(self, rows: Sequence[Tokens], side: Side = "query", seconds: float | None = None) -> Encoded:
        """Encode token rows, together with whatever else waits.

        Args:
            rows: Token ids of each text, at least one.
            side: Whether they are queries, which go first, or documents.
            seconds: How long the caller waits; None if for ever.

        Raises:
            OverloadedError: the queue has no room for all of them, or they would be encoded after
                ``seconds``; nothing was queued.
            NotReadyError: the batcher was left before the rows had their turn.
        """
        if self._stopping:
            raise NotReadyError(_STOPPING)
        self._admit(rows, side, seconds)
        done: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()
        request = _Request(done, time.perf_counter_ns(), [np.empty(0, np.float32)] * len(rows), len(rows))
        self._queues[side].extend([_Entry(row, request, position) for position, row in enumerate(rows)])
        self._metrics.queued(self._texts, self._queued_tokens)
        self._arrival.set()
        return await done

    def _admit(self, rows: Sequence[Tokens], side: Side, seconds: float | None) -> None:
        """Refuse what does not fit or would be late; an idle encoder takes any request, or it could never learn."""
        if not self._fits(rows):
            self._drop_abandoned()
            if self._texts and not self._fits(rows):
                self._metrics.dropped("full", len(rows))
                raise OverloadedError(
                    f"{self._texts} texts already wait for the encoder; try again later",
                    max(SHORTEST_RETRY, self._wait(side)),
                )
        wait = self._wait(side)
        # A text is done when its batch is, and a batch that waited is seldom a small one.
        encoding = max(_tokens_of(rows) * self._seconds_per_token, self._seconds_per_batch)
        try:
            require_in_time("the encoder", wait, encoding, seconds)
        except OverloadedError:
            self._metrics.dropped("late", len(rows))
            raise

    def _wait(self, side: Side) -> float:
        """Return the estimated seconds until a text that arrives now has its turn."""
        queries, documents = self._queues["query"].tokens, self._queues["document"].tokens
        ahead = queries + (documents if side == "document" else min(documents, queries // QUERY_BATCHES))
        elapsed = time.perf_counter() - self._running_since
        running = max(0.0, self._running_tokens * self._seconds_per_token - elapsed) if self._running_tokens else 0.0
        return running + ahead * self._seconds_per_token

    @property
    def _texts(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def _queued_tokens(self) -> int:
        return sum(queue.tokens for queue in self._queues.values())

    def _fits(self, rows: Sequence[Tokens]) -> bool:
        texts, tokens = self._texts + len(rows), self._queued_tokens + _tokens_of(rows)
        return texts <= self._limits.max_queued_texts and tokens <= self._limits.max_queued_tokens

    def _drop_abandoned(self) -> None:
        for queue in self._queues.values():
            dropped = queue.drop_abandoned()
            if dropped:
                self._metrics.dropped("abandoned", dropped)

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
        self._drop_abandoned()
        batch = self._queues[self._next_side()].take(self._batch_texts, self._batch_tokens)
        self._metrics.queued(self._texts, self._queued_tokens)
        return batch

    def _next_side(self) -> Side:
        if len(self._queues["query"]) and not (len(self._queues["document"]) and self._query_batches >= QUERY_BATCHES):
            self._query_batches += 1
            return "query"
        self._query_batches = 0
        return "document"

    async def _encode(self, batch: list[_Entry]) -> None:
        self._metrics.batch(len(batch))
        self._running_tokens, self._running_since = _tokens(batch), time.perf_counter()
        started = time.perf_counter_ns()
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, [one.tokens for one in batch])
        await asyncio.wait([running])
        ended = time.perf_counter_ns()
        self._learn((ended - started) / 1e9, self._running_tokens)
        self._running_tokens = 0
        error = running.exception()
        if error is not None:
            for entry in batch:
                entry.request.fail(error)
            return
        for entry, vector in zip(batch, running.result(), strict=True):
            entry.request.put(entry.position, vector, started, ended)

    def _learn(self, seconds: float, tokens: int) -> None:
        self._seconds_per_batch = moved(self._seconds_per_batch, seconds)
        self._seconds_per_token = moved(self._seconds_per_token, seconds / max(1, tokens))


def _tokens(entries: Iterable[_Entry]) -> int:
    return sum(len(entry.tokens) for entry in entries)


def _tokens_of(rows: Sequence[Tokens]) -> int:
    return sum(map(len, rows))
