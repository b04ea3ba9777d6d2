"""The learning rate and the calendar of a run."""

from __future__ import annotations

import pytest

from retrieval_kd.recipes.schema import ScheduleSpec
from retrieval_kd.training.schedule import evenly, learning_rate


def test_linear_rate_by_hand() -> None:
    """Without it an off-by-one would start at zero, or end above it and never settle."""
    spec = ScheduleSpec(learning_rate=0.1, warmup=0.2)
    rates = [learning_rate(step, 10, spec) for step in range(10)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125])


def test_cosine_is_half_way_in_the_middle_and_constant_stays() -> None:
    """Without it a schedule's name and its shape could part."""
    cosine = ScheduleSpec(learning_rate=0.1, warmup=0.0, decay="cosine")
    assert learning_rate(0, 8, cosine) == pytest.approx(0.1)
    assert learning_rate(4, 8, cosine) == pytest.approx(0.05)
    assert learning_rate(7, 8, cosine) < 0.005
    constant = ScheduleSpec(learning_rate=0.1, warmup=0.5, decay="constant")
    assert [learning_rate(s, 4, constant) for s in range(4)] == pytest.approx([0.05, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(("total", "times"), [(10, 3), (3, 10), (1, 1), (100, 8)])
def test_events_are_spread_and_end_with_the_run(total: int, times: int) -> None:
    """Without it the last weights might never be evaluated or saved."""
    steps = evenly(total, times)
    assert max(steps) == total
    assert min(steps) >= 1
    assert len(steps) == min(total, times)
