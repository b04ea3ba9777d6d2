"""BM25: the formula by hand, ties, unknown words, and Anserini's figures nearby."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from mining_fakes import MemoryCollection

from retrieval_kd.errors import DataError
from retrieval_kd.mining.bm25 import BM25Index

pytest.importorskip("bm25s", reason="bm25s is an extra")
SHARED = Path(__file__).resolve().parents[2] / "../shared/data/beir"


def test_scores_by_hand() -> None:
    """Another k1, b, idf or a constant factor would still rank plausibly."""
    collection = MemoryCollection({"a": "cat cat dog", "b": "cat", "c": "bird tree"})
    ranking = BM25Index.build(collection).search({"q": "cats"}, 10)["q"]
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))

    def score(tf: int, length: int) -> float:
        return idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * length / 2))

    assert ranking.doc_ids == ("a", "b")
    assert ranking.scores == pytest.approx([score(2, 3), score(1, 1)], rel=1e-6)


def test_a_word_asked_twice_counts_twice() -> None:
    """As in Lucene; a set of query words would rank long questions otherwise."""
    collection = MemoryCollection({"a": "cat", "b": "dog", "c": "bird"})
    run = BM25Index.build(collection).search({"one": "cat", "two": "cat cats"}, 1)
    assert run["two"].scores[0] == pytest.approx(2 * run["one"].scores[0])


def test_documents_that_share_no_word_are_left_out() -> None:
    """The library fills up to k with documents of score zero."""
    collection = MemoryCollection({"a": "cat", "b": "dog", "c": ""})
    run = BM25Index.build(collection).search(
        {"some": "cat", "unknown": "zebra", "stop": "the of and", "none": "?!", "mixed": "zebra dog"}, 100
    )
    assert {query_id: ranking.doc_ids for query_id, ranking in run.items()} == {
        "some": ("a",), "unknown": (), "stop": (), "none": (), "mixed": ("b",),
    }  # fmt: skip
    assert run["unknown"].scores.dtype == np.float32


def test_ties_at_k_keep_the_smallest_ids() -> None:
    """A partial sort keeps whichever it met; the same query would give other negatives on another machine."""
    collection = MemoryCollection({f"d{9 - i}": "same words here" for i in range(10)} | {"x": "other"})
    assert BM25Index.build(collection).search({"q": "words"}, 3)["q"].doc_ids == ("d0", "d1", "d2")


def test_a_search_leaves_the_index_as_it_was() -> None:
    """Words of a query must not enter the vocabulary, nor one query change another's answer."""
    collection = MemoryCollection({"a": "running cat", "b": "dog"})
    index = BM25Index.build(collection)
    before = index.search({"q": "runs zebra"}, 5)["q"]
    index.search({"p": "zebra runner runs"}, 5)
    after = index.search({"q": "runs zebra"}, 5)["q"]
    assert before.doc_ids == after.doc_ids == ("a",)
    assert np.array_equal(before.scores, after.scores)


def test_what_cannot_be_indexed_or_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own exceptions are about array shapes."""
    with pytest.raises(DataError, match="memory: no word in 2 documents"):
        BM25Index.build(MemoryCollection({"a": "", "b": "the"}))
    with pytest.raises(DataError, match="k 0 must be at least 1"):
        BM25Index.build(MemoryCollection({"a": "cat"})).search({"q": "cat"}, 0)
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(DataError, match=r"BM25: Stemmer is not installed; pip install 'retrieval-kd\[train\]'"):
        BM25Index.build(MemoryCollection({"a": "cat"}))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "figure", "anserini"), [("scifact", 0.6804, 0.679), ("nfcorpus", 0.3208, 0.322)])
def test_stands_near_anserini(name: str, figure: float, anserini: float) -> None:
    """A tokeniser gone wrong costs points that no unit test sees. Queries without a match count zero."""
    ir_measures = pytest.importorskip("ir_measures", reason="ir_measures is an extra")
    if not (SHARED / name).is_dir():
        pytest.skip("no shared BEIR data beside the repository")
    from retrieval_kd.collections.base import split_queries
    from retrieval_kd.collections.beir import BeirCollection

    collection = BeirCollection(SHARED / name)
    run = BM25Index.build(collection).search(split_queries(collection, "test"), 10)
    scores = {
        query_id: dict(zip(ranking.doc_ids, map(float, ranking.scores), strict=True))
        for query_id, ranking in run.items()
        if len(ranking)
    }
    qrels = {query_id: dict(grades) for query_id, grades in collection.qrels("test").items()}
    measured = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, scores)[ir_measures.nDCG @ 10]
    assert measured == pytest.approx(figure, abs=5e-4)
    assert measured == pytest.approx(anserini, abs=2e-3)
