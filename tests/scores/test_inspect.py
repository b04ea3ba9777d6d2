"""The report on score lists: golden statistics, the temperature's definition, the warnings."""

from typing import Any

import numpy as np
import pytest

from retrieval_kd.errors import DataError
from retrieval_kd.scores.inspect import inspect


def _mean_relative_entropy(lists: list[Any], temperature: float) -> float:
    out = []
    for scores in lists:
        z = np.asarray(scores, dtype=np.float64) / temperature
        p = np.exp(z - z.max())
        p /= p.sum()
        p = p[p > 0]
        out.append(-(p * np.log(p)).sum() / np.log(len(scores)))
    return float(np.mean(out))


def test_golden_statistics() -> None:
    """A spread taken over all lists at once, or ties counted across queries, would mislead every reader."""
    report = inspect([np.array([0.0, 4.0]), np.array([1.0, 1.0, 3.0]), np.array([4.0, 4.0])])
    assert (report.queries, report.pairs, report.equal_lists, report.not_finite) == (3, 7, 1, 0)
    assert report.mean_spread == pytest.approx(2.0)
    assert report.widest_spread == 4.0
    assert report.p50 == 3.0
    assert report.tied == pytest.approx(4 / 7)
    assert report.underflow == 0
    assert report.warnings == ("1 of 3 lists have equal scores and teach nothing",)


def test_temperature_meets_its_definition() -> None:
    """A temperature that is documented one way and computed another is worse than none."""
    draw = np.random.default_rng([5, 0])
    lists = [draw.normal(0, 5, size=draw.integers(2, 30)) for _ in range(40)]
    temperature = inspect(lists).temperature
    assert temperature is not None
    assert _mean_relative_entropy(lists, temperature) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_temperature_scales_with_the_scores(factor: float) -> None:
    """Scores times c and temperature times c are the same softmax; padding must not leak into it."""
    lists = [np.array([1.0, 2.0, 4.0]), np.array([0.5, 0.0]), np.arange(9.0)]
    plain, scaled = inspect(lists), inspect([factor * scores + 3 for scores in lists])
    assert scaled.temperature == pytest.approx(factor * plain.temperature, rel=1e-5)


def test_underflow_is_that_of_float32() -> None:
    """Scores 100 apart give a document no gradient at all; the warning must name a temperature that does."""
    lists = [np.array([0.0, 100.0]), np.array([0.0, 80.0])]
    report = inspect(lists)
    assert report.underflow == pytest.approx(1 / 4)
    (line,) = report.warnings
    assert "25.0% of the scores underflow" in line
    temperature = float(line.rsplit(" ", 1)[1])
    assert inspect([scores / temperature for scores in lists]).underflow == 0


def test_equal_scores_everywhere_are_a_warning() -> None:
    """A teacher that loaded without its head gives equal scores and would train on nothing."""
    report = inspect([np.array([2.0, 2.0]), np.array([1.0, 1.0])])
    assert report.temperature is None
    assert report.tied == 1
    assert "nothing to learn" in report.warnings[0]


def test_not_finite_scores_are_counted_and_left_out() -> None:
    """One NaN would turn every percentile into NaN and hide where it came from."""
    report = inspect([np.array([1.0, np.nan, np.inf]), np.array([1.0, 3.0])])
    assert report.not_finite == 2
    assert report.p50 == 2.0
    assert report.warnings == ("2 of 5 scores are NaN or infinite; mend the teacher",)


def test_nothing_to_inspect_is_an_error() -> None:
    """A report on no score would print NaN as if it were measured."""
    with pytest.raises(DataError, match="0 score lists"):
        inspect([])
    with pytest.raises(DataError, match="none with finite scores"):
        inspect([np.array([np.nan])])
