"""Load as users make it: requests arrive when they arrive, whether or not earlier ones have been answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from eval.latency import Latency
from retrieval_kd.errors import DataError, RkdError

Input = TypeVar("Input")


@dataclass(frozen=True)
class OpenLoop:
    """What happened under an offered load.

    Attributes:
        offered_per_s: Requests that arrived each second, on average.
        sent: Requests in all.
        failed: Requests that the server refused or did not answer in time; they are not in ``latency``.
        answered_per_s: Answers each second, until the last one.
        latency: From the arrival of a request to its answer, waiting included.
    """

    offered_per_s: float
    sent: int
    failed: int
    answered_per_s: float
    latency: Latency | None


def open_loop(
    call: Callable[[Input], object], inputs: Sequence[Input], rate: float, seconds: float, seed: int, workers: int = 64
) -> OpenLoop:
    """Send requests with exponential gaps and measure each from when it was due.

    Measuring from the sending instead hides every wait that a slow answer causes behind it ("coordinated
    omission", G. Tene).

    Args:
        call: Sends one request; an :class:`RkdError` counts as failed.
        inputs: Requests, taken in turn.
        rate: Arrivals each second.
        seconds: How long requests arrive.
        seed: Seed of the gaps.
        workers: Requests that can be under way at once; what arrives beyond waits, and the wait counts.

    Raises:
        DataError: no inputs, or no request within the time.
    """
    if rate <= 0 or seconds <= 0:
        raise DataError(f"open loop: rate {rate} and seconds {seconds} must be above 0")
    gaps = np.random.default_rng([seed, 3]).exponential(1 / rate, size=max(1, int(4 * rate * seconds)))
    due = [at for at in np.cumsum(gaps).tolist() if at < seconds]
    if not inputs or not due:
        raise DataError(f"open loop: no request arrives within {seconds} s at {rate}/s; give queries and more time")
    waits: list[float] = []
    lock = threading.Lock()

    def send(value: Input, arrived: float) -> None:
        try:
            call(value)
        except RkdError:
            return
        took = time.perf_counter() - arrived
        with lock:
            waits.append(took)

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for number, at in enumerate(due):
            time.sleep(max(0.0, start + at - time.perf_counter()))
            pool.submit(send, inputs[number % len(inputs)], start + at)
    elapsed = time.perf_counter() - start
    return OpenLoop(
        offered_per_s=len(due) / seconds,
        sent=len(due),
        failed=len(due) - len(waits),
        answered_per_s=len(waits) / elapsed,
        latency=Latency.of(waits) if waits else None,
    )
