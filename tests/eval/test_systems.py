"""Every kind of system answers through one protocol, and refuses what is not of the collection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eval.results import Facts
from eval.systems import BM25System, RerankSystem, RunSystem, ServerSystem, assess, reranked
from retrieval_kd.collections.base import Document, Qrels
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Ranking, Run, rank, write_trec

QUERIES = {f"q{number}": f"query {number}" for number in range(5)}
QRELS = {query_id: {"d1": 1} for query_id in QUERIES}


@dataclass
class Corpus:
    """A collection of four documents."""

    name: str = "toy"
    fingerprint: str = "f"
    corpus_fingerprint: str = "c"
    ids: tuple[str, ...] = ("d1", "d2", "d3", "d4")

    def documents(self) -> Iterator[Document]:
        """Stream the four."""
        for doc_id in self.ids:
            yield Document(doc_id, "", f"text of {doc_id}")

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Look texts up."""
        return {doc_id: f"text of {doc_id}" for doc_id in doc_ids}

    def queries(self) -> Mapping[str, str]:
        """Return all queries."""
        return QUERIES

    def splits(self) -> tuple[str, ...]:
        """Return the only split."""
        return ("test",)

    def qrels(self, split: str) -> Qrels:
        """Return the judgements."""
        return QRELS


@dataclass
class Teacher:
    """Scores a pair by the document's number, lowest number first."""

    calls: list[int] = field(default_factory=list)
    parameters: int = 7

    def score(self, pairs: Sequence[tuple[str, str]], on_rows: Callable[[int], None] | None = None) -> np.ndarray:
        """Score pairs."""
        self.calls.append(len(pairs))
        if on_rows:
            on_rows(len(pairs))
        return np.array([-float(text[-1]) for _, text in pairs], dtype=np.float32)


FIRST = {query_id: rank(["d4", "d3", "d2", "d1"], [4.0, 3.0, 2.0, 1.0]) for query_id in list(QUERIES)[:4]}


def _reranker(depth: int, teacher: Teacher | None = None, first: Run | None = None) -> RerankSystem:
    stage = RunSystem("first", FIRST if first is None else first)
    return RerankSystem("teacher", stage, teacher or Teacher(), Corpus(), depth)  # type: ignore[arg-type]


def test_reranked_puts_the_tail_below_in_its_own_order() -> None:
    """A tail that keeps its first-stage scores would jump above reranked documents: the scales differ."""
    first = rank(["a", "b", "c", "d"], [90.0, 80.0, 70.0, 60.0])
    out = reranked(first, np.array([-5.0, 3.0], dtype=np.float32))
    assert out.doc_ids == ("b", "a", "c", "d")
    assert np.all(np.diff(out.scores) < 0)


def test_reranked_keeps_the_order_where_scores_are_huge() -> None:
    """In float32 1e9 - 1 is 1e9: the tail must still lie below."""
    first = rank(["z", "y", "x"], [3.0, 2.0, 1.0])
    out = reranked(first, np.array([1e9], dtype=np.float32))
    assert out.doc_ids[0] == "z"
    assert np.all(np.diff(out.scores) < 0)


def test_reranked_with_nothing_scored_is_the_first_stage() -> None:
    """A rerank depth of nothing changes nothing."""
    first = rank(["b", "a"], [2.0, 1.0])
    assert reranked(first, np.empty(0, dtype=np.float32)).doc_ids == ("b", "a")


def test_reranker_scores_only_its_depth_and_cuts_to_the_asked_one() -> None:
    """Scores must land on the documents they belong to, across queries of a block."""
    teacher = Teacher()
    run = _reranker(3, teacher).run(QUERIES, depth=4)
    assert teacher.calls == [12]
    assert set(run) == set(FIRST)
    assert all(ranking.doc_ids == ("d2", "d3", "d4", "d1") for ranking in run.values())
    assert all(ranking.doc_ids == ("d1", "d2") for ranking in _reranker(4).run(QUERIES, depth=2).values())


def test_reranker_handles_rankings_of_different_lengths() -> None:
    """Splitting the flat scores at the wrong places gives one query another's scores."""
    first = {"q0": rank(["d3", "d1"], [2.0, 1.0]), "q1": rank([], []), "q2": rank(["d4", "d2", "d3"], [3.0, 2.0, 1.0])}
    run = _reranker(3, first=first).run(QUERIES, depth=3)
    assert run["q0"].doc_ids == ("d1", "d3")
    assert run["q1"].doc_ids == ()
    assert run["q2"].doc_ids == ("d2", "d3", "d4")


def test_reranker_facts() -> None:
    """The time is of one query's pairs; without candidates there is none."""
    facts = _reranker(3).facts(QUERIES, depth=3)
    assert facts.params == 7
    assert facts.query_ms_p50 is not None
    assert _reranker(3, first={}).facts(QUERIES, depth=3) == Facts(params=7)


def test_assess_measures_over_all_judged_queries() -> None:
    """q4 has no candidates: four of five queries found d1 first."""
    result = assess(_reranker(4), QUERIES, QRELS, ["nDCG@10", "RR@10"], depth=10)
    assert result.measures == {"nDCG@10": 0.8, "RR@10": 0.8}
    assert result.evaluation.missing == ("q4",)
    entry = result.to_json()
    assert (entry["queries"], entry["queries_without_results"], entry["params"]) == (5, 1, 7)
    assert entry["intervals"]["nDCG@10"][0] <= 0.8 <= entry["intervals"]["nDCG@10"][1]


def test_run_file_round_trip(tmp_path: Path) -> None:
    """A run written by us and read back is the same system."""
    write_trec(tmp_path / "first.trec", FIRST, "first")
    system = RunSystem.read("first", tmp_path / "first.trec", Corpus(), QRELS)
    assert system.run(QUERIES, 2)["q0"].doc_ids == ("d4", "d3")
    assert set(system.run(QUERIES, 2)) == set(FIRST)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("q0 Q0 d9 2 0.5 tag", r"run\.trec:3: document 'd9' is not in toy"),
        ("q9 Q0 d1 1 0.5 tag", r"run\.trec:3: query 'q9' is not judged"),
        ("q0 Q0 d1 1 nan tag", r"run\.trec:3: score nan is not finite"),
        ("q0 Q0 d2 1 0.1 tag", r"run\.trec:3: query 'q0' lists document 'd2' twice"),
        ("q0 d1 1 0.5", r"run\.trec:3: 4 columns"),
    ],
)
def test_a_bad_run_file_names_its_line(tmp_path: Path, row: str, message: str) -> None:
    """A run over another corpus or split scores near zero and looks like a bad system."""
    path = tmp_path / "run.trec"
    path.write_text(f"q0 Q0 d2 1 0.9 tag\n\n{row}\n")
    with pytest.raises(DataError, match=message):
        RunSystem.read("bad", path, Corpus(), QRELS)


def test_an_empty_run_file_is_named(tmp_path: Path) -> None:
    """A run whose making was killed at once would stand in the table as a system worth nothing."""
    for name in ("run.trec", "run.tsv"):
        for content in ("", "\n \n"):
            (tmp_path / name).write_text(content)
            with pytest.raises(DataError, match=rf"{name}: no rankings in it; make the run again"):
                RunSystem.read("empty", tmp_path / name, Corpus(), QRELS)


def test_a_bad_line_of_ms_marcos_format_is_named(tmp_path: Path) -> None:
    """Looked for in TREC's column, the document would be taken for a rank, or not be found at all."""
    path = tmp_path / "run.tsv"
    path.write_text("q0\td2\t1\nq0\td9\t2\n")
    with pytest.raises(DataError, match=r"run\.tsv:2: document 'd9' is not in toy"):
        RunSystem.read("bad", path, Corpus(), QRELS)
    path.write_text("q0\td2\t2\nq0\td1\t1\n")
    assert RunSystem.read("good", path, Corpus(), QRELS).run(QUERIES, 5)["q0"].doc_ids == ("d1", "d2")


class Client:
    """A server of the four documents, as the client shows it."""

    def __init__(self, documents: int = 4, ids: Sequence[str] = ("d1", "d2"), batch: int = 2) -> None:
        self.documents, self.ids, self.batch = documents, ids, batch
        self.batches: list[int] = []

    def index(self) -> Any:
        """Describe the index."""
        return SimpleNamespace(document_count=self.documents, index_version="v1")

    def server_info(self) -> Any:
        """State small limits."""
        return SimpleNamespace(limits=SimpleNamespace(max_batch_queries=self.batch, max_top_k=100))

    def search(self, text: str, top_k: int) -> Any:
        """Return the same hits for any text."""
        hits = [SimpleNamespace(doc_id=doc_id, score=-float(i)) for i, doc_id in enumerate(self.ids)]
        return SimpleNamespace(hits=hits[:top_k])

    def batch_search(self, texts: Sequence[str], top_k: int) -> list[Any]:
        """Search each text."""
        self.batches.append(len(texts))
        return [self.search(text, top_k) for text in texts]


def _server(client: Client) -> ServerSystem:
    return ServerSystem("service", client, Corpus())  # type: ignore[arg-type]


def test_a_server_is_asked_within_its_limits() -> None:
    """A batch above the server's limit is refused by it: five queries go in 2, 2, 1."""
    client = Client()
    result = assess(_server(client), QUERIES, QRELS, ["RR@10"], depth=10)
    assert client.batches == [2, 2, 1]
    assert result.measures == {"RR@10": 1.0}
    assert result.facts.query_ms_p50 is not None


@pytest.mark.parametrize(
    ("client", "depth", "message"),
    [
        (Client(documents=5), 10, "searches 5 documents .* collection toy has 4"),
        (Client(ids=("d1", "x7")), 10, "returned document 'x7', which toy does not have"),
        (Client(), 1000, "at most 100 documents, depth is 1000"),
    ],
)
def test_a_server_of_another_collection_is_refused(client: Client, depth: int, message: str) -> None:
    """Scoring a stranger's index gives zeros that read as a broken student."""
    with pytest.raises(DataError, match=message):
        _server(client).run(QUERIES, depth)


def test_a_ranking_is_the_same_whatever_the_block() -> None:
    """More queries than one block: each keeps its own ranking."""
    queries = {f"q{number:03d}": f"query {number}" for number in range(150)}
    first: dict[str, Ranking] = {
        query_id: rank([f"d{1 + number % 4}", f"d{1 + (number + 1) % 4}"], [2.0, 1.0])
        for number, query_id in enumerate(queries)
    }
    run = RerankSystem("t", RunSystem("first", first), Teacher(), Corpus(), 2).run(queries, 2)  # type: ignore[arg-type]
    assert list(run) == list(queries)
    assert all(ranking.doc_ids == tuple(sorted(first[query_id].doc_ids)) for query_id, ranking in run.items())


def test_bm25_is_indexed_once_and_timed() -> None:
    """Indexing for every query would time the corpus and not the query."""
    pytest.importorskip("bm25s")
    corpus = Corpus()
    streams = []
    stream = corpus.documents
    corpus.documents = lambda: streams.append(1) or stream()  # type: ignore[method-assign, func-returns-value]
    queries = {query_id: f"text of d{number % 4 + 1}" for number, query_id in enumerate(QUERIES)}
    result = assess(BM25System(corpus), queries, QRELS, ["R@100"], depth=100)
    assert len(streams) == 1
    assert result.run is not None
    assert result.run["q2"].doc_ids[0] == "d3"
    assert result.facts.query_ms_p50 is not None
    assert result.facts.params is None
