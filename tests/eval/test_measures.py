"""Measures agree with trec_eval, count every judged query, and cannot be fooled by ties."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval

from eval.measures import evaluate, parse_measure, restrict
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Ranking, rank

MEASURES = ("nDCG@10", "RR", "R@100", "AP", "P@5")
TREC = {"nDCG@10": "ndcg_cut_10", "RR": "recip_rank", "R@100": "recall_100", "AP": "map", "P@5": "P_5"}


def _random_case(seed: int) -> tuple[dict[str, Ranking], dict[str, dict[str, int]]]:
    """Make graded, partly unjudged, tied rankings; some queries missing, empty, or without relevant documents."""
    rng = np.random.default_rng(seed)
    documents = [f"d{number}" for number in range(60)]
    run, qrels = {}, {}
    for number in range(30):
        query_id = f"q{number}"
        judged = rng.choice(documents, size=rng.integers(1, 12), replace=False)
        grades = rng.integers(0, 4, size=len(judged)) * int(rng.random() > 0.1)
        qrels[query_id] = dict(zip(judged.tolist(), grades.tolist(), strict=True))
        size = int(rng.choice([0, 1, 8, 40]))
        if rng.random() < 0.2:
            continue
        listed = rng.choice(documents, size=size, replace=False).tolist()
        run[query_id] = rank(listed, rng.integers(0, 4, size=size).astype(np.float32))
    return run, qrels


@pytest.mark.parametrize("seed", range(8))
def test_equals_trec_eval_on_random_runs_with_ties(seed: int) -> None:
    """A drift from trec_eval would make our numbers incomparable with every published one."""
    run, qrels = _random_case(seed)
    ours = evaluate(run, qrels, MEASURES)
    scorer = pytrec_eval.RelevanceEvaluator(qrels, set(TREC.values()))
    theirs = scorer.evaluate(
        {q: dict(zip(ranking.doc_ids, map(float, ranking.scores), strict=True)) for q, ranking in run.items()}
    )
    for measure in MEASURES:
        expected = [theirs.get(q, {}).get(TREC[measure], 0.0) for q in qrels]
        np.testing.assert_allclose(ours.values[measure], expected, atol=1e-12)
        assert ours.means[measure] == pytest.approx(sum(expected) / len(qrels), abs=1e-12)


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
