"""What the server serves: one query encoder and one index version, off the event loop."""

from __future__ import annotations

import asyncio
import os
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
from retrieval_kd.runs import Ranking
from serve.batcher import Encoded, MicroBatcher
from serve.errors import NotReadyError
from serve.limits import Limits

T = TypeVar("T")


class QueryEncoder(Protocol):
    """An encoder in two halves, so that tokenising does not wait for the model."""

    @property
    def card(self) -> EncoderCard:
        """Return the encoder's identity."""

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        """Return the token ids of each text."""

    def run(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Return float32 ``[len(rows), d]``, a row's vector not depending on its batch."""


class DocumentSearcher(Protocol):
    """An index version, opened."""

    @property
    def card(self) -> EncoderCard:
        """Return the document encoder's identity."""

    @property
    def version(self) -> str:
        """Return the version's id."""

    @property
    def kind(self) -> str:
        """Return how the index is searched."""

    @property
    def count(self) -> int:
        """Return the number of documents."""

    @property
    def dimension(self) -> int:
        """Return the vector width."""

    def search(self, vectors: Vectors, k: int) -> list[Ranking]:
        """Return the best ``k`` documents for each row."""

    def check_query_encoder(self, card: EncoderCard) -> None:
        """Refuse an encoder of another space."""


@dataclass(frozen=True)
class Embedded:
    """Vectors float32 ``[n, d]`` and where the time went, in nanoseconds."""

    vectors: Vectors
    tokenize_ns: int = 0
    queue_ns: int = 0
    encode_ns: int = 0


@dataclass(frozen=True)
class Found:
    """One ranking for each query and the time it took, in nanoseconds."""

    rankings: list[Ranking]
    search_ns: int


class Engine:
    """An encoder and the index it may search; used as ``async with`` on the loop that calls it."""

    def __init__(self, encoder: QueryEncoder, searcher: DocumentSearcher, limits: Limits, threads: int) -> None:
        """Pair the two; ``threads`` search and tokenise.

        Raises:
            EncoderMismatch: the encoder's vectors do not lie in the index's space.
        """
        searcher.check_query_encoder(encoder.card)
        self.encoder = encoder
        self.searcher = searcher
        self._limits = limits
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="search")
        self._exit = AsyncExitStack()

    @classmethod
    def open(cls, store: Path, encoder: Path, limits: Limits, threads: int | None = None) -> Engine:
        """Load an exported encoder and the current version of an index store.

        Args:
            store: The index store.
            encoder: Folder of the exported query encoder.
            limits: The server's limits.
            threads: Threads of the encoder and of the search pool; one for each core when None.

        Raises:
            ArtifactError: one of the two is missing or torn.
            EncoderMismatch: they do not share a space.
        """
        from index.search import Searcher
        from retrieval_kd.encoders.onnx import OnnxEncoder

        return cls(
            OnnxEncoder.load(encoder, threads),
            Searcher.open(store),
            limits,
            threads or os.cpu_count() or 1,
        )

    async def __aenter__(self) -> Self:
        """Start the encoder thread and send one text the whole way, so that no caller pays for the first."""
        self._batcher = await self._exit.enter_async_context(MicroBatcher(self.encoder.run, self._limits))
        warm = await self.embed(["warm up"])
        await self.search(warm.vectors, 1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()
        self._pool.shutdown()

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Encode texts as queries.

        Raises:
            OverloadedError: too much already waits for the encoder.
        """
        if not texts:
            return Embedded(np.empty((0, self.encoder.card.dimension), dtype=np.float32))
        started = time.perf_counter_ns()
        rows = await self._off_loop(lambda: self.encoder.tokenize(texts, "query"))
        tokenized = time.perf_counter_ns()
        encoded: Encoded = await self._batcher.encode(rows)
        return Embedded(encoded.vectors, tokenized - started, encoded.queue_ns, encoded.encode_ns)

    async def search(self, vectors: Vectors, k: int) -> Found:
        """Rank documents against float32 ``[n, d]``, the best ``k`` for each row."""
        started = time.perf_counter_ns()
        rankings = await self._off_loop(lambda: self.searcher.search(vectors, k))
        return Found(rankings, time.perf_counter_ns() - started)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        """Run on the pool; work that has not begun when the caller gives up never begins."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


class EngineSlot:
    """Where the servicers find the engine; empty while it loads and once it drains."""

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
