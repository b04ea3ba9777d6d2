"""Negatives by the teacher's scores: bounds by hand, strata, and a report that adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mining_fakes import MemoryCollection

from retrieval_kd.errors import DataError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.mining.pool import MiningReport
from retrieval_kd.mining.sampling import sample_candidates
from retrieval_kd.recipes.schema import CandidatesSpec, FilterSpec
from retrieval_kd.runs import Ranking, Scores, Shortlist, rank

POOL = [f"n{i}" for i in range(8)]


class Teacher:
    """Scores documents by id, and remembers what it was asked."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self._scores = scores
        self.asked: list[Sequence[Shortlist]] = []

    def __call__(self, lists: Sequence[Shortlist]) -> list[Scores]:
        self.asked.append(lists)
        return [np.array([self._scores[d] for d in item.doc_ids], dtype=np.float32) for item in lists]


def ranking(*doc_ids: str) -> Ranking:
    return rank(doc_ids, [float(-i) for i in range(len(doc_ids))])


def collection(queries: int = 1) -> MemoryCollection:
    texts = {doc_id: f"text of {doc_id}" for doc_id in ["p0", "p1", *POOL]}
    asked = {f"q{i}": f"query {i}" for i in range(queries)}
    return MemoryCollection(texts, asked, {"train": {query_id: {"p0": 2, "p1": 1} for query_id in asked}})


def mine(
    scores: Mapping[str, float],
    bounds: FilterSpec | None = None,
    report: MiningReport | None = None,
    seed: int = 1,
    queries: int = 1,
    **changes: Any,
) -> dict[str, CandidateList]:
    how = CandidatesSpec(**{"strategy": "top", "negatives": 8, "window": (1, 10), "filter": bounds, **changes})
    runs = {"bm25": {f"q{i}": ranking(*POOL) for i in range(queries)}}
    lists = sample_candidates(collection(queries), runs, how, seed, report, Teacher(scores))
    return {item.query_id: item for item in lists}


def kept(*arguments: Any, **keywords: Any) -> list[str]:
    lists = mine(*arguments, **keywords)
    return [doc_id for doc_id in lists["q0"].doc_ids if doc_id.startswith("n")] if lists else []


# The negatives' scores are 0, 1, ... 7; the positive's is 6 and that of the second one 4.
SCORES = {**{doc_id: float(i) for i, doc_id in enumerate(POOL)}, "p0": 6.0, "p1": 4.0}


@pytest.mark.parametrize(
    ("bounds", "last"),
    [
        (FilterSpec(max_score=2.5), 2),
        (FilterSpec(max_score=3.0), 3),
        (FilterSpec(margin=0.0), 6),
        (FilterSpec(margin=2.0), 4),
        (FilterSpec(ratio=1.0), 6),
        (FilterSpec(ratio=0.5), 3),
        (FilterSpec(percentiles=(0.0, 50.0)), 3),
        (FilterSpec(percentiles=(0.0, 100.0)), 7),
        (FilterSpec(margin=2.0, max_score=3.0, ratio=0.9), 3),
    ],
)
def test_bounds_by_hand(bounds: FilterSpec, last: int) -> None:
    """Without it a strict comparison, or a margin taken the other way, would mine the false negatives themselves."""
    assert kept(SCORES, bounds) == POOL[: last + 1]


def test_the_worst_positive_of_the_list_is_what_bounds_are_relative_to() -> None:
    """Without it a negative could score above a positive of its own list, an order that no student should learn."""
    assert kept(SCORES, FilterSpec(margin=1.0), positives=2) == POOL[:4]
    assert kept(SCORES, FilterSpec(margin=1.0), positives=1) == POOL[:6]


def test_a_ratio_to_a_negative_score_lies_below_it() -> None:
    """Without it the bound at .8 of a score of -5 would be -4: above the positive (sentence-transformers#3819)."""
    scores = {**{doc_id: -8.0 + i for i, doc_id in enumerate(POOL)}, "p0": -5.0}
    assert kept(scores, FilterSpec(ratio=0.8)) == POOL[:3]
    assert kept(scores, FilterSpec(ratio=1.0)) == POOL[:4]


def test_percentiles_have_two_ends() -> None:
    """Without it the easiest negatives, which teach nothing, could not be left out."""
    report = MiningReport()
    assert kept(SCORES, FilterSpec(percentiles=(25.0, 75.0)), report) == ["n2", "n3", "n4", "n5"]
    assert report.removed == {"scored above the percentiles": 2, "scored below the percentiles": 2}


@given(
    st.lists(st.integers(-50, 50), min_size=9, max_size=9), st.integers(-20, 20), st.integers(1, 4), st.integers(0, 9)
)
@settings(deadline=None, max_examples=60)
def test_filters_do_not_depend_on_what_a_teachers_scale_leaves_free(
    values: list[int], shift: int, scale: int, margin: int
) -> None:
    """Without it a teacher that adds a constant to its logits would mine other negatives.

    A margin is invariant to a shift and scales with the scores; percentiles are invariant to both; a ratio to scale.
    """
    names = [*POOL, "p0"]
    scores = dict(zip(names, map(float, values), strict=True))
    moved = {name: scale * value + shift for name, value in scores.items()}
    assert kept(scores, FilterSpec(margin=float(margin))) == kept(moved, FilterSpec(margin=float(margin * scale)))
    middle = FilterSpec(percentiles=(10.0, 90.0))
    assert kept(scores, middle) == kept(moved, middle)
    scaled = {name: scale * value for name, value in scores.items()}
    assert kept(scores, FilterSpec(ratio=0.75)) == kept(scaled, FilterSpec(ratio=0.75))


def test_each_stratum_gives_one_negative() -> None:
    """Without it a random draw could take four easy negatives, and the list would have no order to learn."""
    strata = [{"n6", "n7"}, {"n4", "n5"}, {"n2", "n3"}, {"n0", "n1"}]
    drawn: set[tuple[str, ...]] = set()
    for seed in range(60):
        negatives = mine(SCORES, strategy="stratified", negatives=4, seed=seed)["q0"].doc_ids[1:]
        assert all(len(stratum & set(negatives)) == 1 for stratum in strata)
        drawn.add(negatives)
    # Sixteen draws are possible; sixty that were all alike would be a generator without its seed.
    assert len(drawn) >= 12
    assert mine(SCORES, strategy="stratified", negatives=8)["q0"].doc_ids[1:] == tuple(POOL)


def test_scored_draws_depend_on_seed_and_query_alone() -> None:
    """Without it a query's negatives would change when another query is added."""
    one, three = (mine(SCORES, strategy="stratified", negatives=3, queries=n) for n in (1, 3))
    assert one["q0"] == three["q0"]
    assert len({item.doc_ids for item in three.values()}) > 1


def test_a_teacher_is_asked_once_and_only_if_the_recipe_asks() -> None:
    """Without it every mining would pay for a cross-encoder, or load its model once for each query."""
    runs = {"bm25": {"q0": ranking(*POOL), "q1": ranking("n1", "p0")}}
    for strategy, bounds in (("stratified", None), ("random", FilterSpec(margin=1.0))):
        teacher = Teacher(SCORES)
        how = CandidatesSpec(strategy=strategy, filter=bounds, positives=2)  # type: ignore[arg-type]
        list(sample_candidates(collection(2), runs, how, 1, scorer=teacher))
        (asked,) = teacher.asked
        assert asked == [Shortlist("q0", ("p0", "p1", *POOL)), Shortlist("q1", ("p0", "p1", "n1"))]
    unasked = Teacher({})
    assert len(list(sample_candidates(collection(2), runs, CandidatesSpec(), 1, scorer=unasked))) == 2
    assert unasked.asked == []
    with pytest.raises(DataError, match="need a teacher's scores"):
        list(sample_candidates(collection(), runs, CandidatesSpec(strategy="stratified"), 1))


def test_unscored_mining_streams() -> None:
    """Without it the lists of millions of queries would stand in memory before the first is written."""
    seen: list[int] = []

    class Watched(MemoryCollection):
        def contents(self, doc_ids: Any) -> dict[str, str]:
            seen.append(1)
            return super().contents(doc_ids)

    plain = collection(1000)
    watched = Watched(plain.texts, plain.asked, plain.judged)
    runs = {"bm25": {f"q{i}": ranking(*POOL) for i in range(1000)}}
    lists = sample_candidates(watched, runs, CandidatesSpec(), 1)
    next(lists)
    assert len(seen) == 1
    assert len([*lists]) == 999
    assert len(seen) == 4


def test_the_report_says_what_was_kept_and_why() -> None:
    """Without it nobody could rebuild a candidate file or see that a filter left nothing (tevatron#107)."""
    texts = {**collection().texts, "twin": "TEXT of  n0"}
    judged = {"train": {"q0": {"p0": 1}, "q1": {"p0": 1}}}
    opened = MemoryCollection(texts, {"q0": "a", "q1": "b"}, judged)
    runs = {
        "bm25": {"q0": ranking("n0", "n1", "p0", "twin", "n7"), "q1": ranking("n7")},
        "dense": {"q0": ranking("n2", "n1")},
    }
    scores = {**SCORES, "twin": 0.0}
    how = CandidatesSpec(strategy="top", negatives=5, filter=FilterSpec(max_score=6.0))
    report = MiningReport()
    lists = list(sample_candidates(opened, runs, how, 1, report, Teacher(scores)))
    assert [item.doc_ids for item in lists] == [("p0", "n0", "n2", "n1")]
    told = report.to_json()
    assert (told["queries"], told["lists"], told["short"]) == (2, 1, 1)
    assert told["dropped"] == {"no negative that the teacher's filter allows": 1}
    assert told["removed"] == {
        "judged relevant": 1, "same text as a better ranked one": 1, "scored above the maximum": 2,
    }  # fmt: skip
    assert told["kept"] == {"bm25": 1, "dense": 1, "bm25 + dense": 1}
    assert told["scores"] == {
        "positives": {"count": 1, "lowest": 6.0, "median": 6.0, "highest": 6.0},
        "negatives": {"count": 3, "lowest": 0.0, "median": 1.0, "highest": 2.0},
        "left out": {"count": 2, "lowest": 7.0, "median": 7.0, "highest": 7.0},
    }


def test_only_the_wanted_queries_are_mined() -> None:
    """Without it a teacher that is fine-tuned on 300 queries would count all others as dropped."""
    report = MiningReport()
    runs = {"bm25": {f"q{i}": ranking(*POOL) for i in range(5)}}
    lists = sample_candidates(collection(5), runs, CandidatesSpec(), 1, report, queries=["q3", "q1"])
    assert [item.query_id for item in lists] == ["q3", "q1"]
    assert (report.queries, report.lists) == (2, 2)
