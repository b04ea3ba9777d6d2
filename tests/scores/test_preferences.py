"""Preferences: probabilities by name, both orders apart, and the list scores that follow from them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_kd.artifacts import Artifact, Spec, build
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Shortlist
from retrieval_kd.scores.preferences import (
    STAGE,
    Aggregation,
    PreferenceStore,
    Triple,
    aggregated,
    symmetrised,
    write_preferences,
)

AGGREGATIONS: tuple[Aggregation, ...] = ("mean", "bradley_terry", "copeland")
nan = np.nan


def make(folder: Path, shards: list[dict[Triple, float]]) -> Artifact:
    """Write a store."""

    def work(target: Path) -> dict[str, object]:
        for number, rows in enumerate(shards):
            write_preferences(target, number, list(rows), np.array(list(rows.values()), np.float32))
        return {}

    return build(folder, Spec(STAGE, {}), work)


def strong(strengths: list[float]) -> np.ndarray:
    """Return the preferences that Bradley-Terry strengths imply."""
    b = np.array(strengths)
    out = 1 / (1 + np.exp(b[None, :] - b[:, None]))
    np.fill_diagonal(out, nan)
    return out.astype(np.float32)


def test_preferences_come_back_in_their_order(tmp_path: Path) -> None:
    """Without it P(i > j) could be read as P(j > i), and the student learn the ranking upside down."""
    draw = np.random.default_rng([2]).random((3, 4, 4)).astype(np.float32)
    rows = {
        (f"q{q}", f"d{i}", f"d{j}"): float(draw[q, i, j])
        for q in range(3)
        for i in range(4)
        for j in range(4)
        if i != j
    }
    half = dict(list(rows.items())[:17])
    make(tmp_path / "s", [half, {key: p for key, p in rows.items() if key not in half}])
    store = PreferenceStore.open(tmp_path / "s")
    assert len(store) == 36
    order = [2, 0, 3]
    one, other = store.find([Shortlist("q1", tuple(f"d{i}" for i in order)), Shortlist("q0", ("d1", "new", "d0"))])
    expected = draw[1][np.ix_(order, order)]
    np.fill_diagonal(expected, nan)
    np.testing.assert_array_equal(one, expected)
    assert other[0, 2] == draw[0, 1, 0]
    assert other[2, 0] == draw[0, 0, 1]
    assert np.isnan(other[1]).all()
    assert np.isnan(other[:, 1]).all()
    assert np.isnan(store.find([Shortlist("nobody", ("d0", "d1"))])[0]).all()


@pytest.mark.parametrize("value", [1.5, -0.22, float("nan"), float("inf")])
def test_only_probabilities_are_preferences(tmp_path: Path, value: float) -> None:
    """Without it log-probabilities, which is what PairDistill's files hold, would be learned as probabilities."""
    with pytest.raises(DataError, match=r"query 'q', documents 'a' and 'b' have the preference .* not its logarithm"):
        make(tmp_path / "s", [{("q", "a", "b"): value}])


def test_two_preferences_of_one_pair_are_refused(tmp_path: Path) -> None:
    """Without it two teachers in one folder would be told apart by the order of their files."""
    make(tmp_path / "s", [{("q", "a", "b"): 0.5, ("q", "b", "a"): 0.5}, {("q", "a", "b"): 0.4}])
    with pytest.raises(DataError, match=r"preferences-00001.parquet: query 'q', documents 'a' and 'b' have a second"):
        PreferenceStore.open(tmp_path / "s")


def test_symmetrisation_golden() -> None:
    """Without it a model's liking for what it reads first would be taken for relevance."""
    got = symmetrised(np.array([[nan, 0.9, 0.7], [0.5, nan, nan], [nan, nan, nan]], np.float32))
    np.testing.assert_allclose(got, [[nan, 0.7, 0.7], [0.3, nan, nan], [0.3, nan, nan]], atol=1e-6)


@given(st.integers(2, 6), st.integers(0, 99))
def test_symmetrised_preferences_are_complements(size: int, seed: int) -> None:
    """Without it both could be preferred to each other, which no ranking satisfies."""
    out = symmetrised(np.random.default_rng([seed]).random((size, size)).astype(np.float32))
    off = ~np.eye(size, dtype=bool)
    np.testing.assert_allclose((out + out.T)[off], 1, atol=1e-6)
    np.testing.assert_allclose(symmetrised(out), out, atol=1e-6)


def test_aggregation_golden() -> None:
    """Without it a mean over the list instead of the comparisons would punish documents that were compared less."""
    preferences = symmetrised(np.array([[nan, 0.9, 0.6], [nan, nan, 0.5], [nan, nan, nan]], np.float32))
    assert aggregated(preferences, "mean") == pytest.approx([0.75, 0.3, 0.45])
    assert aggregated(preferences, "copeland") == pytest.approx([1.0, -0.5, -0.5])
    lonely = symmetrised(np.array([[nan, 0.9, nan], [nan, nan, nan], [nan, nan, nan]], np.float32))
    assert aggregated(lonely, "mean") == pytest.approx([0.9, 0.1, 0.5])
    assert aggregated(lonely, "copeland") == pytest.approx([1, -1, 0])
    assert aggregated(lonely, "bradley_terry")[2] == pytest.approx(0, abs=1e-6)


def test_bradley_terry_finds_the_strengths() -> None:
    """Without it the likelihood could be that of another model, and margins be on no scale at all."""
    strengths = [1.5, -0.5, 0.25, -1.25]
    assert aggregated(strong(strengths), "bradley_terry") == pytest.approx(strengths, abs=0.01)
    two = aggregated(strong([0.0, -np.log(4)]), "bradley_terry")
    assert two[0] - two[1] == pytest.approx(np.log(4), abs=0.02)


def test_bradley_terry_joins_what_was_never_compared() -> None:
    """Without it comparing a part of the pairs would leave the others in no order."""
    chain = strong([2.0, 1.0, 0.0, -1.0, -2.0])
    far = np.abs(np.subtract.outer(np.arange(5), np.arange(5))) > 1
    chain[far] = nan
    out = aggregated(chain, "bradley_terry")
    assert np.diff(out) == pytest.approx([-1.0] * 4, abs=0.05)


def test_unanimous_preferences_stay_finite() -> None:
    """Without it a document that always wins would have an infinite strength, and the loss be NaN."""
    certain = np.triu(np.ones((4, 4), np.float32), 1)
    np.fill_diagonal(certain, nan)
    out = aggregated(certain, "bradley_terry")
    assert np.isfinite(out).all()
    assert (np.diff(out) < 0).all()


@pytest.mark.parametrize("how", AGGREGATIONS)
@given(st.permutations(range(5)), st.integers(0, 50))
def test_aggregation_follows_the_documents(how: Aggregation, order: list[int], seed: int) -> None:
    """Without it the place of a document in its list could decide its score."""
    preferences = symmetrised(np.random.default_rng([seed]).random((5, 5)).astype(np.float32))
    moved = preferences[np.ix_(order, order)]
    np.testing.assert_allclose(aggregated(moved, how), aggregated(preferences, how)[order], atol=1e-5)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_consistent_preferences_keep_their_order(how: Aggregation) -> None:
    """Without it an aggregation could disagree with preferences that agree among themselves."""
    assert np.argsort(-aggregated(strong([0.1, 3.0, -2.0, 1.0]), how)).tolist() == [1, 3, 0, 2]
