"""Normalisation within a list, and the average of teachers on different scales."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_kd.errors import DataError
from retrieval_kd.scores.normalise import (
    Normalisation,
    activate,
    combine,
    ensemble,
    normalise,
    percentile_bounds,
)

lists = st.lists(st.integers(-1000, 1000), min_size=1, max_size=20)


def test_golden_numbers() -> None:
    """A sample instead of a population deviation, or a min-max off by a term, would pass every invariance below."""
    assert normalise([1.0, 2.0, 3.0], "none").tolist() == [1.0, 2.0, 3.0]
    assert normalise([1.0, 2.0, 3.0], "zscore") == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert normalise([1.0, 2.0, 5.0], "minmax").tolist() == [0.0, 0.25, 1.0]
    assert normalise([7.0, -2.0, 9.0, 7.0], "rank") == pytest.approx([0.5, 0.0, 1.0, 0.5])
    assert normalise([-3.0, 1.0, 2.0, 9.0], "percentile", (0.0, 4.0)).tolist() == [0.0, 0.25, 0.5, 1.0]


@pytest.mark.parametrize(("how", "value"), [("zscore", 0.0), ("minmax", 0.5), ("rank", 0.5)])
def test_a_constant_list_is_defined(how: Normalisation, value: float) -> None:
    """Dividing by a zero spread would put NaN into every loss."""
    assert normalise([0.1, 0.1, 0.1], how).tolist() == [value] * 3
    assert normalise([7.0], how).tolist() == [value]


@given(lists, st.sampled_from(["zscore", "minmax", "rank"]), st.integers(1, 8), st.integers(-9, 9))
def test_shift_and_scale_do_not_matter(scores: list[int], how: Normalisation, factor: float, shift: int) -> None:
    """A teacher's scale must not survive its normalisation."""
    moved = [factor * score + shift for score in scores]
    np.testing.assert_allclose(normalise(moved, how), normalise(scores, how), atol=1e-5)


@given(lists, st.sampled_from(["none", "zscore", "minmax", "rank", "percentile"]))
def test_the_order_survives(scores: list[int], how: Normalisation) -> None:
    """A normalisation that reorders documents would teach another ranking."""
    out = normalise(scores, how, (-500.0, 500.0))
    assert out.dtype == np.float32
    assert all(out[i] <= out[j] for i in range(len(out)) for j in range(len(out)) if scores[i] <= scores[j])


def test_input_is_never_changed() -> None:
    """The store's raw logits are shared: normalising in place would corrupt the next reader."""
    raw = np.array([1.0, 2.0], dtype=np.float32)
    normalise(raw, "zscore")
    assert normalise(raw, "none") is not raw
    assert raw.tolist() == [1.0, 2.0]


def test_wide_scales_do_not_dominate() -> None:
    """Without normalising first, a teacher with logits a thousand times wider would decide alone."""
    narrow, wide = np.array([1.0, 0.0, 0.5]), np.array([0.0, 1000.0, 500.0])
    assert combine([narrow, wide], [1, 1], "zscore") == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("how", ["none", "zscore", "minmax", "rank"])
def test_weight_one_and_zero_is_the_single_teacher(how: Normalisation) -> None:
    """A switched-off teacher must leave no trace."""
    one, other = np.array([3.0, 1.0, 2.0]), np.array([0.3, 0.2, 0.1])
    assert combine([one, other], [2, 0], how).tolist() == normalise(one, how).tolist()


def test_only_the_ratio_of_weights_matters() -> None:
    """Weights that do not sum to 1 would act as a hidden temperature."""
    one, other = np.array([3.0, 1.0, 2.0]), np.array([0.1, 0.2, 0.4])
    np.testing.assert_allclose(combine([one, other], [1, 3], "zscore"), combine([one, other], [0.25, 0.75], "zscore"))


def test_percentiles_are_those_of_all_lists_of_a_teacher() -> None:
    """Percentiles of one list would put every list's best at 1 and forget which query has good documents at all."""
    values = np.arange(101, dtype=np.float32)
    lists = [values[:50], values[50:]]
    assert percentile_bounds(lists) == (1.0, 99.0)
    bad, good = ensemble({"one": lists}, [1], "percentile")
    assert bad.max() == pytest.approx(48 / 98)
    assert good.min() == pytest.approx(49 / 98)
    np.testing.assert_allclose(normalise(good, "percentile", (0.0, 1.0)), good)


def test_an_ensemble_is_its_lists_combined() -> None:
    """Lists of one teacher paired with another's by position must stay with their query."""
    one = [np.array([1.0, 2.0], np.float32), np.array([5.0], np.float32)]
    other = [np.array([4.0, 0.0], np.float32), np.array([1.0], np.float32)]
    out = ensemble({"one": one, "other": other}, [3, 1], "minmax")
    assert [scores.tolist() for scores in out] == [[0.25, 0.75], [0.5]]


def test_activations() -> None:
    """Exp of a large logit overflows to NaN, and a second sigmoid would squash the margins twice."""
    logits = np.array([-1000.0, -1.0, 0.0, 1.0, 1000.0], np.float32)
    assert activate(logits, "identity") is logits
    assert activate(logits, "logit_difference") is logits
    assert activate(logits, "sigmoid") == pytest.approx([0.0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normalise([1.0, np.nan], "zscore"), "score 1 of the list is nan"),
        (lambda: normalise([np.inf, 1.0], "none"), "score 0 of the list is inf"),
        (lambda: normalise([], "none"), "at least one score"),
        (lambda: normalise([[1.0]], "none"), r"shape \(1, 1\)"),
        (lambda: normalise([1.0], "softmax"), "'softmax'; known: none, zscore, minmax, percentile, rank"),
        (lambda: normalise([1.0, 2.0], "percentile"), "give percentile_bounds"),
        (lambda: percentile_bounds([]), "0 scores"),
        (lambda: percentile_bounds([np.array([1.0, np.nan], np.float32)]), "not all of them finite"),
        (lambda: percentile_bounds([np.ones(3, np.float32)]), "both 1: nothing to scale"),
        (lambda: ensemble({"a": [np.ones(2, np.float32)], "b": []}, [1, 1], "zscore"), r"\[1, 0\] lists"),
        (
            lambda: ensemble({"a": [np.arange(2.0)], "b": [np.ones(2)]}, [1, 1], "percentile"),
            "teacher member b: 1st and 99th percentile of the scores are both 1",
        ),
        (lambda: combine([[1.0, 2.0], [1.0]], [1, 1], "none"), r"\[2, 1\] documents of one list"),
        (lambda: combine([[1.0]], [1, 1], "none"), "1 teachers but 2 weights"),
        (lambda: combine([], [], "none"), "0 teachers"),
        (lambda: combine([[1.0], [1.0]], [1, -1], "none"), "not negative"),
        (lambda: combine([[1.0]], [0], "none"), "one above 0"),
        (lambda: combine([[1.0]], [float("nan")], "none"), "must be finite"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    """NaN averaged in silence, or lists zipped to the shorter one, would train on noise."""
    with pytest.raises(DataError, match=message):
        call()
