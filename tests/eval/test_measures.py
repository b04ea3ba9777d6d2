"""Measures agree with trec_eval, count every judged query, and cannot be fooled by ties."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.measures import evaluate, parse_measure, require_measurable, restrict
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Ranking, rank

TREC = {
    "nDCG@10": "ndcg_cut_10",
    "nDCG@3": "ndcg_cut_3",
    "RR": "recip_rank",
    "R@5": "recall_5",
    "R@100": "recall_100",
    "AP": "map",
    "P@5": "P_5",
}
DOCUMENTS = [f"d{number}" for number in range(14)]
JUDGED = st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 3), max_size=8)
# Few distinct scores over many documents: nearly every ranking has ties, some at a cut-off.
LISTED = st.dictionaries(st.sampled_from(DOCUMENTS), st.sampled_from([0.0, 1.0, 1.5]), max_size=14)
CASES = st.dictionaries(st.sampled_from("abcdef"), st.tuples(JUDGED, st.none() | LISTED), min_size=1)


def _trec_eval(
    run: Mapping[str, Ranking], qrels: dict[str, dict[str, int]], measures: set[str], level: int = 1
) -> dict[str, dict[str, float]]:
    scorer = pytrec_eval.RelevanceEvaluator(qrels, measures, relevance_level=level)
    return scorer.evaluate(
        {q: dict(zip(ranking.doc_ids, map(float, ranking.scores), strict=True)) for q, ranking in run.items()}
    )


@given(CASES)
@settings(max_examples=200, deadline=None)
def test_equals_trec_eval_on_random_runs(
    cases: dict[str, tuple[dict[str, int], dict[str, float] | None]],
) -> None:
    """A drift from trec_eval would make our numbers incomparable with every published one.

    Ties, missing queries, empty rankings and judgements, unjudged documents and graded labels all occur.
    """
    qrels = {query_id: judged for query_id, (judged, _) in cases.items()}
    run = {q: rank(list(listed), list(listed.values())) for q, (_, listed) in cases.items() if listed is not None}
    ours = evaluate(run, qrels, [*TREC, "RR(rel=2)", "R(rel=2)@5", "Judged@5"])
    theirs = _trec_eval(run, qrels, set(TREC.values()))
    for measure, name in TREC.items():
        expected = [theirs.get(q, {}).get(name, 0.0) for q in qrels]
        np.testing.assert_allclose(ours.values[measure], expected, atol=1e-12)
        assert ours.means[measure] == pytest.approx(sum(expected) / len(qrels), abs=1e-12)
    strict = _trec_eval(run, qrels, {"recip_rank", "recall_5"}, level=2)
    for measure, name in {"RR(rel=2)": "recip_rank", "R(rel=2)@5": "recall_5"}.items():
        np.testing.assert_allclose(ours.values[measure], [strict.get(q, {}).get(name, 0.0) for q in qrels], atol=1e-12)
    judged = [
        sum(doc_id in qrels[q] for doc_id in run[q].doc_ids[:5]) / min(5, len(run[q])) if len(run.get(q, ())) else 0.0
        for q in qrels
    ]
    np.testing.assert_allclose(ours.values["Judged@5"], judged, atol=1e-12)
    assert set(ours.missing) == {q for q in qrels if len(run.get(q, ())) == 0}


def test_ndcg_of_graded_labels_by_hand() -> None:
    """Binary gains (sentence-transformers' evaluator) would say 1.0 here; trec_eval's gain is the grade itself."""
    qrels = {"q": {"a": 3, "b": 1}}
    run = {"q": rank(["b", "a"], [2.0, 1.0])}
    gained, ideal = 1 + 3 / np.log2(3), 3 + 1 / np.log2(3)
    assert evaluate(run, qrels, ["nDCG@10"]).means["nDCG@10"] == pytest.approx(gained / ideal)


def test_a_missing_query_counts_zero() -> None:
    """BEIR's evaluator gives 1.0 to a run that answers half of the queries; answering less must not pay."""
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}}
    evaluation = evaluate({"q1": rank(["a"], [1.0])}, qrels, ["nDCG@10", "RR@10", "R@100"])
    assert evaluation.means == {"nDCG@10": 0.5, "RR@10": 0.5, "R@100": 0.5}
    assert evaluation.missing == ("q2",)


def test_an_empty_run_is_zero_everywhere() -> None:
    """An empty run must not divide by zero or vanish from the mean."""
    evaluation = evaluate({}, {"q1": {"a": 1}, "q2": {"b": 1}}, ["nDCG@10", "RR@10"])
    assert evaluation.means == {"nDCG@10": 0.0, "RR@10": 0.0}
    assert evaluation.missing == ("q1", "q2")


def test_a_query_without_relevant_documents_stays_in_the_denominator() -> None:
    """Two providers drop such queries from their own lists; the mean would then depend on the measure."""
    qrels = {"q1": {"a": 1}, "q2": {"b": 0}, "q3": {}}
    run = {"q1": rank(["a"], [1.0]), "q2": rank(["b"], [1.0]), "q3": rank(["b"], [1.0])}
    evaluation = evaluate(run, qrels, ["nDCG@10", "RR@10", "R@100"])
    for value in evaluation.means.values():
        assert value == pytest.approx(1 / 3)


def test_rr_and_rr_at_10_agree_on_ties() -> None:
    """ir_measures gives 0.5 and 1.0 for one tied run, because its providers break ties differently."""
    run = {"q": rank(["b", "a"], [1.0, 1.0])}
    means = evaluate(run, {"q": {"a": 1}}, ["RR", "RR@10"]).means
    assert means == {"RR": 1.0, "RR@10": 1.0}


def test_scores_do_not_matter_only_their_order() -> None:
    """A ranking's order is the run's own: scores that a library would tie or reorder must change nothing."""
    ids = tuple(f"d{number:02d}" for number in range(20))
    qrels = {"q": {"d05": 2, "d12": 1}}
    tied = {"q": Ranking(tuple(reversed(ids)), np.zeros(20, dtype=np.float32))}
    spread = {"q": Ranking(tuple(reversed(ids)), np.linspace(9, 1, 20, dtype=np.float32))}
    measures = ["nDCG@10", "RR", "RR@10", "Judged@10"]
    assert evaluate(tied, qrels, measures).means == evaluate(spread, qrels, measures).means


def test_an_alias_gets_its_own_values() -> None:
    """MRR@10 is RR@10; asking for both must not leave one of them at zero."""
    means = evaluate({"q": rank(["a"], [1.0])}, {"q": {"a": 1}}, ["MRR@10", "RR@10"]).means
    assert means == {"MRR@10": 1.0, "RR@10": 1.0}


def test_judged_at_k_counts_unjudged_documents() -> None:
    """Pools with holes must be visible."""
    run = {"q": rank(["a", "b", "c", "d"], [4.0, 3.0, 2.0, 1.0])}
    assert evaluate(run, {"q": {"a": 0, "c": 1}}, ["Judged@4"]).means["Judged@4"] == 0.5


def test_an_empty_ranking_is_a_missing_one() -> None:
    """BM25 answers a query of unknown words with nothing; Judged@k of the library then divides by zero."""
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}}
    evaluation = evaluate({"q1": rank(["a"], [1.0]), "q2": rank([], [])}, qrels, ["nDCG@10", "RR@10", "Judged@10"])
    assert evaluation.means == {"nDCG@10": 0.5, "RR@10": 0.5, "Judged@10": 0.5}
    assert evaluation.missing == ("q2",)


def test_a_query_of_another_split_is_refused_and_can_be_restricted() -> None:
    """A run of the wrong split would otherwise be averaged over whatever ids happen to coincide."""
    run = {"q1": rank(["a"], [1.0]), "other": rank(["a"], [1.0])}
    qrels = {"q1": {"a": 1}}
    with pytest.raises(DataError, match="'other', which the judgements do not have"):
        evaluate(run, qrels, ["nDCG@10"])
    assert evaluate(restrict(run, qrels), qrels, ["nDCG@10"]).means["nDCG@10"] == 1.0


def test_no_judgements_is_an_error() -> None:
    """The mean of nothing is no number."""
    with pytest.raises(DataError, match="no judgements"):
        evaluate({}, {}, ["nDCG@10"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nDGC@10", "did you mean 'nDCG@10'"),
        ("ndcg@10", "did you mean 'nDCG@10'"),
        ("quality", "such as nDCG@10"),
        ("nDCG@0", "at least 1"),
        ("nDCG@ten", "cannot be read"),
        ("nDCG@1.5", "cannot be read"),
        ("nDCG(depth=3)@10", "cannot be read"),
        ("", "cannot be read"),
        ("NumRet", "count without a mean"),
        ("alpha_nDCG@10", "nothing installed computes it"),
    ],
)
def test_an_impossible_measure_says_what_to_write(name: str, message: str) -> None:
    """The library answers with NameError, assertions and object addresses."""
    with pytest.raises(DataError, match=message):
        parse_measure(name)


@pytest.mark.parametrize("name", ["Accuracy@10", "nDCG@99999999999999999999", "R@99999999999999999999"])
def test_a_measure_whose_provider_fails_is_named_before_anything_is_measured(name: str) -> None:
    """The library's own ZeroDivisionError or KeyError ended an evaluation in a trace."""
    with pytest.raises(DataError, match=f"measure '{name}': what computes it fails .*; name another measure") as error:
        require_measurable(["nDCG@10", name], 10**30)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=f"measure '{name}': what computes it fails"):
        evaluate({"q": rank(["a"], [1.0])}, {"q": {"a": 1}}, ["RR@10", name])


@pytest.mark.skipif(shutil.which("perl") is None, reason="gdeval is a Perl script")
def test_gdeval_gets_numbers_for_ids(capfd: pytest.CaptureFixture[str]) -> None:
    """It refuses "q15", and takes "a-1" and "b-1" for one query, whose value the other would get."""
    qrels = {"q15": {"a": 2}, "a-1": {"a": 1}, "b-1": {"b": 0, "c": 1}}
    run = {query_id: rank(["b", "a"], [2.0, 1.0]) for query_id in qrels}
    run["q15"] = rank(["a", "b"], [2.0, 1.0])
    require_measurable(["ERR@20"], 20)
    values = evaluate(run, qrels, ["ERR@20", "RR@10"]).values
    assert values["RR@10"].tolist() == [1.0, 0.5, 0.0]
    assert values["ERR@20"][0] > values["ERR@20"][1] > values["ERR@20"][2] == 0
    assert capfd.readouterr().err == ""
