"""Fusion by hand, and the properties that make it a fusion."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.fusion import FusedSystem, reciprocal_rank_fusion, weighted_fusion
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Ranking, rank

ONE = {"q": rank(["a", "b", "c"], [9.0, 5.0, 1.0]), "only": rank(["x"], [1.0])}
TWO = {"q": rank(["c", "a"], [0.9, 0.1]), "empty": rank([], [])}


def test_reciprocal_ranks_by_hand() -> None:
    """Ranks from 0, or the wrong constant, give another order on close calls."""
    fused = reciprocal_rank_fusion([ONE, TWO], k=60)
    assert fused["q"].doc_ids == ("a", "c", "b")
    expected = [1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62]
    np.testing.assert_allclose(fused["q"].scores, expected, rtol=1e-6)
    assert fused["only"].doc_ids == ("x",)
    assert fused["empty"].doc_ids == ()


def test_weights_by_hand() -> None:
    """Minmax maps 9, 5, 1 to 1, .5, 0 and .9, .1 to 1, 0; a document that a run lacks gets nothing from it."""
    fused = weighted_fusion([ONE, TWO], [0.25, 0.75], "minmax")
    assert dict(zip(fused["q"].doc_ids, fused["q"].scores.tolist(), strict=True)) == pytest.approx(
        {"c": 0.75, "a": 0.25, "b": 0.125}
    )
    raw = weighted_fusion([ONE, TWO], [1, 1], "none")
    assert raw["q"].doc_ids == ("a", "b", "c")


def _random(rng: np.random.Generator) -> dict[str, Ranking]:
    run = {}
    for query in range(4):
        size = int(rng.integers(0, 8))
        ids = [f"d{i}" for i in rng.permutation(12)[:size]]
        run[f"q{query}"] = rank(ids, rng.standard_normal(size))
    return run


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_fusion_does_not_depend_on_order_scale_or_company(seed: int) -> None:
    """A score scale or the order of the arguments that leaks through would make fusions irreproducible."""
    rng = np.random.default_rng(seed)
    one, two = _random(rng), _random(rng)
    stretched = {q: Ranking(r.doc_ids, (r.scores * np.float32(4)) - np.float32(2)) for q, r in one.items()}
    for query_id in one:
        rrf = reciprocal_rank_fusion([one, two])[query_id]
        assert reciprocal_rank_fusion([two, one])[query_id].doc_ids == rrf.doc_ids
        assert reciprocal_rank_fusion([stretched, two])[query_id].doc_ids == rrf.doc_ids
        assert set(rrf.doc_ids) == set(one[query_id].doc_ids) | set(two[query_id].doc_ids)
        scaled = weighted_fusion([stretched, two], [1, 2], "minmax")[query_id]
        plain = weighted_fusion([one, two], [10, 20], "minmax")[query_id]
        np.testing.assert_allclose(sorted(scaled.scores * 10), sorted(plain.scores), atol=2e-4)
    alone = weighted_fusion([one, two], [1, 0], "minmax")
    for query_id, ranking in one.items():
        # What only the other run has may share the last place, never overtake.
        assert alone[query_id].doc_ids[: max(0, len(ranking) - 1)] == ranking.doc_ids[:-1]


@pytest.mark.parametrize(
    ("runs", "weights", "how", "message"),
    [
        ([ONE], [1.0], "minmax", "1 run to fuse"),
        ([ONE, TWO], [1.0], "minmax", r"weights \[1.0\] for 2 runs"),
        ([ONE, TWO], [0.0, 0.0], "minmax", "one above 0"),
        ([ONE, TWO], [1.0, -1.0], "minmax", "not negative"),
        ([ONE, TWO], [1.0, float("nan")], "minmax", "weights"),
        ([ONE, TWO], [1.0, 1.0], "min-max", "did you mean 'minmax'"),
    ],
)
def test_impossible_fusions_are_refused(runs: list, weights: list[float], how: str, message: str) -> None:
    """A weight left out would silently drop a system."""
    with pytest.raises(DataError, match=message):
        weighted_fusion(runs, weights, how)  # type: ignore[arg-type]


def test_a_fused_system_answers_only_what_is_asked() -> None:
    """Queries of another split in a component's run would be measured as strangers."""
    system = FusedSystem("both", [ONE, TWO])
    assert set(system.run({"q": "text"}, 2)) == {"q"}
    assert system.run({"q": "text"}, 2)["q"].doc_ids == ("a", "c")
    with pytest.raises(DataError, match="k -1"):
        reciprocal_rank_fusion([ONE, TWO], -1)
