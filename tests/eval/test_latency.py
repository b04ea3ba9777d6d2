"""Timing counts what it says: single calls, warm, within a budget."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from eval.latency import latency
from retrieval_kd.errors import DataError
from retrieval_kd.progress import progress, silence


def test_warm_up_is_not_timed_and_every_input_is_called_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a session loads and compiles: in the percentiles it would hide the service's speed."""
    calls: list[int] = []
    now = 0.0
    monkeypatch.setattr("eval.latency.time", SimpleNamespace(perf_counter=lambda: now))

    def call(value: int) -> None:
        nonlocal now
        calls.append(value)
        now += 0.05 if len(calls) <= 2 else 0.001 * value

    found = latency(call, [1, 2, 3, 4, 5, 6], warmup=2)
    assert calls == [1, 2, 1, 2, 3, 4, 5, 6]
    assert found.calls == 6
    assert (found.p50_ms, found.p95_ms, found.max_ms) == pytest.approx((3.5, 5.75, 6.0))


def test_a_budget_stops_slow_systems_after_one_call_at_least() -> None:
    """A reranker of a second a query must not hold the report for minutes."""
    found = latency(lambda _: time.sleep(0.01), list(range(1000)), warmup=0, budget_s=0.001)
    assert found.calls == 1
    assert found.p50_ms >= 10.0


def test_nothing_to_time_is_an_error() -> None:
    """A percentile of nothing is no number."""
    with pytest.raises(DataError, match="no queries to time"):
        latency(lambda _: None, [])


def test_no_bar_is_drawn_inside_a_timed_call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting a bar takes milliseconds: on a terminal it would be most of a query's time, in a log nothing."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with silence(), progress("search", 1, "queries") as advance:
        advance(1)
    assert capsys.readouterr().err == ""
    with progress("search", 1, "queries") as advance:
        advance(1)
    assert "search" in capsys.readouterr().err
