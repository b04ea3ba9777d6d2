"""Load for the server benchmarks: closed loops that find what a server can do, open loops that see how it feels.

An open loop sends on a schedule whatever comes back, and counts a call's time from the moment it was due: a
generator that waits for slow answers would leave out the very calls that suffer (coordinated omission).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Call = Callable[[str], Awaitable[None]]
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Outcome:
    """What came of some calls: seconds of each that succeeded, and the failures by kind."""

    seconds: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)

    def failed(self, kind: str) -> None:
        """Count a failure."""
        self.failures[kind] = self.failures.get(kind, 0) + 1

    def percentiles(self) -> dict[str, float]:
        """Return milliseconds."""
        values = 1e3 * np.array(self.seconds or [np.nan])
        return {f"p{q:g}_ms": float(np.percentile(values, q)) for q in (50, 95, 99)}


async def closed_loop(call: Call, texts: Sequence[str], callers: int, seconds: float) -> tuple[float, Outcome]:
    """Return calls a second of ``callers`` that each ask again as soon as they are answered."""
    outcome, queue = Outcome(), itertools.cycle(texts)
    began = time.perf_counter()
    end = began + seconds

    async def caller() -> None:
        while time.perf_counter() < end:
            sent = time.perf_counter()
            try:
                await call(next(queue))
                outcome.seconds.append(time.perf_counter() - sent)
            except Exception as error:  # noqa: BLE001  every failure is counted by its kind
                outcome.failed(kind_of(error))

    await asyncio.gather(*(caller() for _ in range(callers)))
    return len(outcome.seconds) / (time.perf_counter() - began), outcome


async def open_loop(call: Call, texts: Sequence[str], rate: float, seconds: float) -> Outcome:
    """Send ``rate`` calls a second on a schedule."""
    outcome = Outcome()

    async def one(text: str, due: float) -> None:
        try:
            await call(text)
            outcome.seconds.append(time.perf_counter() - due)
        except Exception as error:  # noqa: BLE001  every failure is counted by its kind
            outcome.failed(kind_of(error))

    calls, began = [], time.perf_counter()
    for number, text in zip(range(int(rate * seconds)), itertools.cycle(texts), strict=False):
        due = began + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        calls.append(asyncio.create_task(one(text, due)))
    await asyncio.gather(*calls)
    return outcome


def kind_of(error: Exception) -> str:
    """Return a status code's name, or the error's type."""
    code = getattr(error, "code", None)
    return code().name if callable(code) else type(error).__name__


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children so far, ended ones included."""
    total = 0
    for one in process_tree(pid):
        try:
            values = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        total += sum(map(int, values[11:15])) if one == pid else sum(map(int, values[11:13]))
    return total / TICKS


def process_tree(pid: int) -> Iterator[int]:
    """Yield a process and all below it."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except FileNotFoundError:
            continue
        for child in found:
            yield from process_tree(int(child))
