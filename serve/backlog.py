"""How long work that arrives now would take, and the refusal of what would be done too late.

A queue without such a bound answers everybody after their deadline, and so nobody.
"""

from __future__ import annotations

import threading

from serve.errors import OverloadedError

SHORTEST_RETRY = 0.05
"""Seconds; a client told to come back at once would be refused again."""
_NEWEST_WEIGHT = 0.2
_HEADROOM = 0.8
"""Overload fills a queue to its bound, where half of the answers would be late by no more than the estimate's error."""


def require_in_time(what: str, wait: float, work: float, seconds: float | None) -> None:
    """Refuse work that waits and is done too late; what need not wait is taken, or nothing could ever be learned.

    Args:
        what: What it waits for.
        wait: Estimated seconds until it has its turn.
        work: Estimated seconds that it takes then.
        seconds: How long its caller waits; None if for ever.

    Raises:
        OverloadedError: it would be late.
    """
    if seconds is not None and wait > 0 and wait + work > seconds:
        raise OverloadedError(
            f"{what} is busy for about {1e3 * wait:.0f} ms, longer than the request may take; try again later",
            max(SHORTEST_RETRY, wait),
        )


def moved(average: float, newest: float) -> float:
    """Return a running average after one more value; the first value is the average."""
    return average + _NEWEST_WEIGHT * (newest - average) if average else newest


class Backlog:
    """Jobs that wait for threads or are under way, measured in units that take about as long as one another."""

    def __init__(self, what: str, threads: int = 1) -> None:
        """Name what the jobs wait for, and how many of them it does at once."""
        self._what = what
        self._threads = threads
        self._jobs = 0
        self._units = 0
        self._unit_seconds = 0.0
        self._lock = threading.Lock()

    def require_in_time(self, units: int, seconds: float | None, later: int = 0) -> None:
        """Refuse a job of so many units whose caller waits ``seconds``.

        Args:
            units: What it measures.
            seconds: How long its caller waits; None if for ever.
            later: Units of the jobs before it that are done after it all the same.

        Raises:
            OverloadedError: it would be late.
        """
        with self._lock:
            ahead = max(0, self._units - later)
            wait = ahead * self._unit_seconds / self._threads if self._jobs >= self._threads else 0.0
            work = units * self._unit_seconds
        require_in_time(self._what, wait, work, None if seconds is None else _HEADROOM * seconds)

    def within(self, seconds: float) -> int:
        """Return how many units are done in so many seconds, at least one."""
        with self._lock:
            return max(1, int(seconds / self._unit_seconds)) if self._unit_seconds else 1

    def enter(self, units: int) -> None:
        """Count a job that waits from now on."""
        with self._lock:
            self._jobs += 1
            self._units += units

    def progress(self, units: int) -> None:
        """Count so many units of a job no more, which goes on."""
        with self._lock:
            self._units -= units

    def leave(self, units: int) -> None:
        """Count a job no more, whether it was done or given up."""
        with self._lock:
            self._jobs -= 1
            self._units -= units

    def learn(self, units: int, seconds: float) -> None:
        """Note how long a job took once it had its turn."""
        if units:
            with self._lock:
                self._unit_seconds = moved(self._unit_seconds, seconds / units)
