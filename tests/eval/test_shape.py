"""Self-matches and passages: what stands between a ranking and its measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.shape import Passages, Shape, best_passages, matches_itself
from retrieval_kd.collections.beir import BeirCollection
from retrieval_kd.collections.joined import JoinedCollection
from retrieval_kd.errors import DataError
from retrieval_kd.runs import rank


def _collection(folder: Path, text: str, doc_id: str = "d1") -> BeirCollection:
    (folder / "qrels").mkdir(parents=True)
    rows = f'{{"_id": "{doc_id}", "title": "T", "text": "{text}"}}\n{{"_id": "d2", "title": "", "text": ""}}\n'
    (folder / "corpus.jsonl").write_text(rows)
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "one"}\n')
    (folder / "qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t{doc_id}\t1\n")
    return BeirCollection(folder)


def test_a_query_does_not_find_itself() -> None:
    """ArguAna's queries are in its corpus: kept, every first rank is the query's own text."""
    run = {"q": rank(["q", "a", "b"], [3.0, 2.0, 1.0]), "p": rank(["a", "q"], [2.0, 1.0])}
    shape = Shape(remove_self=True)
    assert shape.search_depth(2) == 3
    shaped = shape(run, 2)
    assert shaped["q"].doc_ids == ("a", "b")
    assert shaped["q"].scores.tolist() == [2.0, 1.0]
    assert shaped["p"].doc_ids == ("a", "q")
    assert Shape()(run, 2)["q"].doc_ids == ("q", "a")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("arguana", True), ("ArguAna", True), ("irds:beir/quora/test", True), ("irds:beir/quora/dev", True),
        ("quora2", False), ("my-arguana", False),
    ],
)  # fmt: skip
def test_only_the_tasks_that_ask_for_it(name: str, expected: bool) -> None:
    """A rule that looked for a part of a name would drop documents of a stranger's collection."""
    assert matches_itself(name) is expected


def test_distractors_leave_a_query_its_own_document(tmp_path: Path) -> None:
    """Decided by the joined name, ArguAna with distractors would have every query's own text at rank 1."""
    base, other = _collection(tmp_path / "arguana", "a"), _collection(tmp_path / "scifact", "b")
    assert Shape.of(JoinedCollection(base, [other])) == Shape(remove_self=True)
    assert Shape.of(JoinedCollection(other, [base])) == Shape()
    assert Shape.of(base, remove_self=False, maxp=True) == Shape(maxp=True)


def test_a_document_has_its_best_passages_score() -> None:
    """Ranking a document by its last passage, or once for each, counts it wrongly or twice."""
    ranking = rank(["a#1", "b#0", "a#0", "c"], [4.0, 3.0, 2.0, 1.0])
    assert best_passages(ranking).doc_ids == ("a", "b", "c")
    assert best_passages(ranking).scores.tolist() == [4.0, 3.0, 1.0]
    assert Shape(maxp=True).search_depth(100) == 1000


def test_windows_cover_every_word_and_carry_the_title(tmp_path: Path) -> None:
    """A stride beyond the window loses words that a query may ask for."""
    words = [f"w{i}" for i in range(23)]
    passages = list(Passages(_collection(tmp_path / "c", " ".join(words)), words=10, stride=7).documents())
    assert [passage.doc_id for passage in passages] == ["d1#0", "d1#1", "d1#2", "d2#0"]
    assert {word for passage in passages for word in passage.text.split()} == set(words)
    assert all(passage.title == "T" for passage in passages[:3])
    assert [len(passage.text.split()) for passage in passages] == [10, 10, 9, 0]


def test_passages_are_looked_up_by_id(tmp_path: Path) -> None:
    """A reranker reads passages by id; another window's id must not give another text."""
    passages = Passages(_collection(tmp_path / "c", "a b c d"), words=2, stride=2)
    assert passages.contents(["d1#1", "d1#0"]) == {"d1#1": "T c d", "d1#0": "T a b"}
    with pytest.raises(DataError, match="no passage 'd1#7'"):
        passages.contents(["d1#7"])
    assert passages.qrels("test") == {"q": {"d1": 1}}
    other = Passages(_collection(tmp_path / "other", "a b c d"), words=3, stride=2)
    assert passages.corpus_fingerprint != other.corpus_fingerprint


def test_passages_refuse_what_would_lose_or_mix_documents(tmp_path: Path) -> None:
    """An id with the separator in it would be merged with another document."""
    with pytest.raises(DataError, match=r"must lie in 1\.\.5"):
        Passages(_collection(tmp_path / "a", "a"), words=5, stride=6)
    with pytest.raises(DataError, match="'d#1' looks like a passage's"):
        list(Passages(_collection(tmp_path / "b", "a", "d#1"), words=5, stride=5).documents())
