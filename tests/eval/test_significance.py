"""Intervals and tests: values by hand, limits, and honest error rates when nothing differs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from eval.measures import Evaluation
from eval.significance import bootstrap_interval, compare, holm, paired_randomisation_test, paired_t_test
from retrieval_kd.errors import DataError


def _evaluation(values: list[float] | np.ndarray, ids: list[str] | None = None) -> Evaluation:
    array = np.asarray(values, dtype=np.float64)
    return Evaluation(tuple(ids or [f"q{number}" for number in range(len(array))]), {"nDCG@10": array}, ())


def test_bootstrap_interval_is_that_of_the_normal_limit() -> None:
    """An interval of the wrong quantiles looks plausible and is wrong by a third."""
    values = np.random.default_rng(0).normal(0.5, 0.2, size=2000)
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_interval_is_seeded_and_of_zero_width_for_a_constant() -> None:
    """A report made twice must say the same."""
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval(np.full(9, 0.25), seed=0) == (0.25, 0.25)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Coverage is the interval's only meaning."""
    rng = np.random.default_rng(5)
    inside = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.beta(2, 1, size=150), seed=trial, resamples=500)
        inside += low <= 2 / 3 <= high
    assert 178 <= inside <= 199


def test_t_test_equals_the_textbook_formula() -> None:
    """Mean 2, standard deviation 1, n 4 gives t = 4 on 3 degrees of freedom."""
    differences = np.array([1.0, 2.0, 2.0, 3.0])
    t = 2.0 / (np.sqrt(2 / 3) / 2)
    assert paired_t_test(differences) == pytest.approx(2 * stats.t.sf(t, df=3))


def test_randomisation_test_equals_exact_enumeration() -> None:
    """All eight sign patterns of (1, 2, 4): only the two with one sign reach |7|, so p is 2/8."""
    p = paired_randomisation_test(np.array([1.0, 2.0, 4.0]), seed=0, resamples=20_000)
    assert p == pytest.approx(0.25, abs=0.01)


def test_randomisation_p_is_never_zero() -> None:
    """Without the +1 a finite number of draws claims certainty."""
    assert paired_randomisation_test(np.ones(60), seed=0, resamples=999) == 1 / 1000


def test_equal_systems_are_not_different() -> None:
    """The library answers NaN here, which would sort and print as anything."""
    nothing = np.zeros(10)
    assert paired_t_test(nothing) == 1.0
    assert paired_randomisation_test(nothing, seed=0) == 1.0
    assert paired_t_test(np.full(10, 0.5)) == 0.0


def test_p_values_are_uniform_when_nothing_differs() -> None:
    """A test that rejects more than 5 % of true nulls sells noise as progress."""
    rng = np.random.default_rng(11)
    samples = [rng.normal(size=40) for _ in range(300)]
    t = np.array([paired_t_test(sample) for sample in samples])
    randomised = np.array(
        [paired_randomisation_test(sample, seed=number, resamples=400) for number, sample in enumerate(samples)]
    )
    for p_values in (t, randomised):
        assert 4 <= np.count_nonzero(p_values < 0.05) <= 28
        assert stats.kstest(p_values, "uniform").pvalue > 0.001
    assert np.corrcoef(t, randomised)[0, 1] > 0.99


def test_holm_by_hand() -> None:
    """Sorted .01 .02 .03 .04 times 4 3 2 1 gives .04 .06 .06 .04, made monotone: .04 .06 .06 .06."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_compare_reports_direction_wins_and_effect() -> None:
    """A swapped sign would ship the worse system."""
    base = _evaluation([0.0, 0.5, 1.0, 0.5])
    better = _evaluation([0.5, 0.5, 0.75, 1.0])
    (row,) = compare({"base": base, "new": better}, "base", "nDCG@10")
    assert (row.system, row.baseline, row.queries) == ("new", "base", 4)
    assert row.difference == pytest.approx(0.1875)
    assert (row.wins, row.ties, row.losses) == (2, 1, 1)
    deviation = np.std([0.5, 0, -0.25, 0.5], ddof=1)
    assert row.effect_size == pytest.approx(0.1875 / deviation)
    assert row.detectable == pytest.approx(2.801585 * deviation / 2)
    assert row.interval[0] <= row.difference <= row.interval[1]
    assert row.p_holm == row.p_randomisation


def test_compare_corrects_over_all_systems() -> None:
    """Ten students against one baseline give a lucky one for free unless corrected."""
    rng = np.random.default_rng(2)
    base = rng.random(50)
    systems = {f"s{number}": _evaluation(base + rng.normal(0.03, 0.1, 50)) for number in range(3)}
    rows = compare({"base": _evaluation(base), **systems}, "base", "nDCG@10")
    assert [row.p_holm for row in rows] == holm([row.p_randomisation for row in rows])


def test_compare_pairs_by_query_id_not_by_position() -> None:
    """Runs list queries in any order; pairing by position compares different queries."""
    base = _evaluation([0.1, 0.9, 0.4], ["a", "b", "c"])
    same = _evaluation([0.4, 0.1, 0.9], ["c", "a", "b"])
    (row,) = compare({"base": base, "same": same}, "base", "nDCG@10")
    assert (row.difference, row.ties) == (0.0, 3)


def test_compare_refuses_what_cannot_be_compared() -> None:
    """Each refusal names the culprit."""
    base = _evaluation([0.1, 0.2], ["a", "b"])
    with pytest.raises(DataError, match=r"'other'.*query 'b' is in only one"):
        compare({"base": base, "other": _evaluation([0.1, 0.3], ["a", "c"])}, "base", "nDCG@10")
    with pytest.raises(DataError, match="baseline 'bass' is not among the systems, did you mean 'base'"):
        compare({"base": base}, "bass", "nDCG@10")
    with pytest.raises(DataError, match="not evaluated on 'nDGC@10', did you mean 'nDCG@10'"):
        compare({"base": base, "same": base}, "base", "nDGC@10")


def test_too_few_queries_are_an_error() -> None:
    """One query has no variance to test with."""
    with pytest.raises(DataError, match="at least two"):
        paired_t_test(np.array([0.1]))
    with pytest.raises(DataError, match="no queries"):
        bootstrap_interval(np.empty(0), seed=0)
