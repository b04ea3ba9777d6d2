"""How long one query takes, measured one at a time, the first calls not counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from retrieval_kd.encoders.base import Encoder
from retrieval_kd.encoders.card import Side
from retrieval_kd.errors import DataError

Input = TypeVar("Input")


@dataclass(frozen=True)
class Latency:
    """Percentiles of single calls, in milliseconds.

    Attributes:
        calls: Number of timed calls.
        p50_ms: Median.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        max_ms: The slowest call.
    """

    calls: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Return the percentiles of timed calls, at least one."""
        p50, p95, p99, slowest = (np.percentile(seconds, [50, 95, 99, 100]) * 1000).tolist()
        return cls(len(seconds), p50, p95, p99, slowest)


def latency(
    call: Callable[[Input], object], inputs: Sequence[Input], warmup: int = 5, budget_s: float = 10.0
) -> Latency:
    """Time ``call`` on each input once, after warming up on the first ones.

    Args:
        call: What is timed.
        inputs: One argument for each call.
        warmup: Calls made before the clock counts.
        budget_s: Start no further call after this many seconds, for the warm-up and the timed calls each;
            at least one is timed.

    Raises:
        DataError: no inputs.
    """
    if not inputs:
        raise DataError("no queries to time; give at least one")
    _timed(call, inputs[:warmup], budget_s)
    return Latency.of(_timed(call, inputs, budget_s))


def _timed(call: Callable[[Input], object], inputs: Sequence[Input], budget_s: float) -> list[float]:
    seconds: list[float] = []
    for value in inputs:
        start = time.perf_counter()
        call(value)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) >= budget_s:
            break
    return seconds


def encode_latency(
    encoder: Encoder, texts: Sequence[str], side: Side = "query", warmup: int = 5, budget_s: float = 10.0
) -> Latency:
    """Time the encoding of single texts; see :func:`latency`."""
    return latency(lambda text: encoder.encode([text], side), texts, warmup, budget_s)
