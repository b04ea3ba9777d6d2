"""What the server serves: one query encoder, one index, perhaps a reranker, all off the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import numpy as np

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, Side
from retrieval_kd.errors import ServeError
from serve.batcher import Encoded, MicroBatcher
from serve.errors import NotReadyError
from serve.indexes import IndexHost, IndexSource, StoreSource
from serve.limits import Limits
from serve.metrics import Metrics
from serve.reranking import Candidates, Reranker, RerankQueue
from serve.searches import Searches

T = TypeVar("T")


class TextEncoder(Protocol):
    """An encoder in two halves, so that tokenising does not wait for the model."""

    @property
    def card(self) -> EncoderCard:
        """Return the encoder's identity."""

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        """Return the token ids of each text."""

    def run(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Return float32 ``[len(rows), d]``, a row's vector not depending on its batch."""


@dataclass(frozen=True)
class Embedded:
    """Vectors float32 ``[n, d]`` and where the time went, in nanoseconds."""

    vectors: Vectors
    tokenize_ns: int = 0
    queue_ns: int = 0
    encode_ns: int = 0


class Engine:
    """An encoder and the index it may search; used as ``async with`` on the loop that calls it."""

    def __init__(
        self,
        encoder: TextEncoder,
        source: IndexSource,
        limits: Limits,
        threads: int,
        metrics: Metrics | None = None,
        reranker: Reranker | None = None,
    ) -> None:
        """Join the parts; the index is opened on entering. ``threads`` search and tokenise."""
        self.encoder = encoder
        self.reranker = reranker
        self.metrics = metrics or Metrics()
        self.index = IndexHost(source, encoder.card, self.metrics)
        self._limits = limits
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="search")
        self.searches = Searches(self._pool, threads)
        self._reranking = RerankQueue()
        self._exit = AsyncExitStack()

    @classmethod
    def open(
        cls,
        store: Path,
        encoder: Path,
        limits: Limits,
        threads: int | None = None,
        metrics: Metrics | None = None,
        reranker: Path | None = None,
    ) -> Engine:
        """Load an exported encoder, and a reranker if one is named; the store is opened on entering.

        Args:
            store: The index store.
            encoder: Folder of the exported query encoder.
            limits: The server's limits.
            threads: Threads of the encoder and of the search pool; one for each core when None.
            metrics: Counts what happens.
            reranker: Folder of an exported reranker.

        Raises:
            ArtifactError: a folder is missing or torn.
        """
        from retrieval_kd.encoders.onnx import OnnxEncoder
        from retrieval_kd.teachers.onnx_reranker import OnnxReranker

        return cls(
            OnnxEncoder.load(encoder, threads),
            StoreSource(store),
            limits,
            threads or os.cpu_count() or 1,
            metrics,
            None if reranker is None else OnnxReranker.load(reranker, threads),
        )

    async def __aenter__(self) -> Self:
        """Open and test the index, then send one text the whole way, so that no caller pays for the first.

        Raises:
            ArtifactError: the index is missing or torn, or fails its own test.
            EncoderMismatch: the encoder's vectors do not lie in the index's space.
            ServeError: the machine does not start as many threads.
        """
        self._exit.callback(self._pool.shutdown)
        self._exit.callback(self._reranking.close)
        try:
            _start_all(self._pool, self._threads)
            await self.index.follow()
            self._exit.callback(self.index.close)
            self._batcher = await self._exit.enter_async_context(
                MicroBatcher(self.encoder.run, self._limits, self.metrics)
            )
            warm = await self.embed(["warm up"])
            with self.index.hold() as handle:
                await self.searches.search(handle, warm.vectors, 1, lambda _, rankings, _found: rankings)
            if self.reranker is not None:
                await self.rerank(self.reranker, [Candidates("warm up", ["warm up"])])
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    async def embed(
        self, texts: Sequence[str], side: Side = "query", seconds: float | None = None, turn: Side | None = None
    ) -> Embedded:
        """Encode texts.

        Args:
            texts: What to encode.
            side: Whether they are queries or documents.
            seconds: How long the caller waits; None if for ever.
            turn: Whose turn they take: queries go first; ``side`` when None.

        Raises:
            OverloadedError: too much already waits for the encoder.
            EncoderMismatch: the encoder does not encode that side.
        """
        if not texts:
            return Embedded(np.empty((0, self.encoder.card.dimension), dtype=np.float32))
        started = time.perf_counter_ns()
        rows = await self._off_loop(lambda: self.encoder.tokenize(texts, side))
        tokenized = time.perf_counter_ns()
        left = None if seconds is None else seconds - (tokenized - started) / 1e9
        encoded: Encoded = await self._batcher.encode(rows, turn or side, left)
        return Embedded(encoded.vectors, tokenized - started, encoded.queue_ns, encoded.encode_ns)

    def require_in_time(self, queries: int, pairs: int, seconds: float | None) -> None:
        """Refuse a request before any work is done for it.

        Args:
            queries: How many it searches the index for.
            pairs: How many pairs of query and text it has reranked.
            seconds: How long the caller waits; None if for ever.

        Raises:
            OverloadedError: index or reranker would be done with it too late.
        """
        self.searches.require_in_time(queries, seconds)
        if pairs:
            self._reranking.require_in_time(pairs, seconds)

    async def rerank(
        self, reranker: Reranker, wanted: Sequence[Candidates], seconds: float | None = None
    ) -> list[Vectors]:
        """Score each query's texts, float32 ``[len(texts)]`` each; requests have their turn as they arrive.

        Raises:
            OverloadedError: they would be scored after ``seconds``.
        """
        return await self._reranking.score(reranker, wanted, seconds)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        """Run on the pool; work that has not begun when the caller gives up never begins."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


class EngineSlot:
    """Where the servicers find the engine; empty while it loads."""

    def __init__(self) -> None:
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """Return the engine.

        Raises:
            NotReadyError: there is none yet.
        """
        if self._engine is None:
            raise NotReadyError("the server is still loading its index; wait until its health is SERVING")
        return self._engine

    def put(self, engine: Engine) -> None:
        """Let every request from now on use ``engine``."""
        self._engine = engine


def _start_all(pool: ThreadPoolExecutor, threads: int) -> None:
    """Start a pool's threads now, not when a request needs one.

    A pool that cannot start a thread for some work raises, and yet does the work later, when the index version that it
    reads may be unmapped.
    """
    meeting = threading.Barrier(threads)
    try:
        for _ in range(threads):
            pool.submit(meeting.wait)
    except BaseException as error:
        meeting.abort()
        if not isinstance(error, RuntimeError):
            raise
        raise ServeError(
            f"cannot start {threads} threads ({error}); lower --threads or raise the machine's limit"
        ) from None
