"""The reranker's queue: whole requests in the order of their arrival, and none that would be late."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from retrieval_kd.encoders.base import Vectors
from serve.backlog import Backlog

_SCORED_AT_ONCE = 16
"""Texts; a request that is given up ends within so many."""


class Reranker(Protocol):
    """Scores a query against texts, slowly and accurately."""

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over everything that changes a score."""

    def score(self, query: str, texts: Sequence[str]) -> Vectors:
        """Return one logit for each text, float32 ``[len(texts)]``."""


@dataclass(frozen=True)
class Candidates:
    """A query and the texts to be scored for it."""

    query: str
    texts: Sequence[str]


class RerankQueue:
    """One thread that scores. Who is cancelled or out of time while waiting leaves the queue by that alone."""

    def __init__(self) -> None:
        self._backlog = Backlog("the reranker")
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reranker")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def require_in_time(self, pairs: int, seconds: float | None) -> None:
        """Refuse a request before any other work is done for it.

        Args:
            pairs: Texts to be scored, over all queries.
            seconds: How long the caller waits; None if for ever.

        Raises:
            OverloadedError: they would be scored too late.
        """
        self._backlog.require_in_time(pairs, seconds)

    async def score(
        self, reranker: Reranker, wanted: Sequence[Candidates], seconds: float | None = None
    ) -> list[Vectors]:
        """Return the logits of each query's texts, float32 ``[len(texts)]`` each.

        Raises:
            OverloadedError: they would be scored after ``seconds``; nothing was queued.
        """
        parts = [(number, part) for number, one in enumerate(wanted) for part in _parts(one)]
        self.require_in_time(sum(len(part.texts) for _, part in parts), seconds)
        scores: list[list[Vectors]] = [[np.empty(0, dtype=np.float32)] for _ in wanted]
        for _, part in parts:
            self._backlog.enter(len(part.texts))
        left = deque(parts)
        try:
            async with self._turn:
                while left:
                    number, part = left[0]
                    scores[number].append(await self._scored(reranker, part))
                    self._backlog.leave(len(part.texts))
                    left.popleft()
        finally:
            for _, part in left:
                self._backlog.leave(len(part.texts))
        return [np.concatenate(some) for some in scores]

    async def _scored(self, reranker: Reranker, part: Candidates) -> Vectors:
        def work() -> Vectors:
            started = time.perf_counter()
            logits = reranker.score(part.query, part.texts)
            self._backlog.learn(len(part.texts), time.perf_counter() - started)
            return logits

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _parts(one: Candidates) -> list[Candidates]:
    starts = range(0, len(one.texts), _SCORED_AT_ONCE)
    return [Candidates(one.query, one.texts[start : start + _SCORED_AT_ONCE]) for start in starts]
