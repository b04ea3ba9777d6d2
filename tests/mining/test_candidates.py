"""Candidate lists: what may be a negative, that draws repeat, and files that say where they are torn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mining_fakes import MemoryCollection

from retrieval_kd.errors import DataError
from retrieval_kd.mining.candidates import CandidateList, read_candidates, write_candidates
from retrieval_kd.mining.pool import MiningReport
from retrieval_kd.mining.sampling import sample_candidates
from retrieval_kd.recipes.schema import CandidatesSpec
from retrieval_kd.runs import Ranking, rank


def ranking(*doc_ids: str) -> Ranking:
    return rank(doc_ids, [float(-i) for i in range(len(doc_ids))])


def pets(**changes: Any) -> MemoryCollection:
    fields: dict[str, Any] = {
        "texts": {f"d{i}": f"text {i}" for i in range(20)},
        "asked": {"q1": "one", "q2": "two", "q3": "held out"},
        "judged": {"train": {"q1": {"d0": 1}, "q2": {"d1": 1}}, "test": {"q3": {"d2": 1}}},
    }
    return MemoryCollection(**{**fields, **changes})


def spec(**changes: Any) -> CandidatesSpec:
    return CandidatesSpec(**{"strategy": "top", "negatives": 3, "window": (1, 10), **changes})


def sample(collection: MemoryCollection, runs: Any, how: CandidatesSpec, seed: int = 13) -> dict[str, CandidateList]:
    return {candidates.query_id: candidates for candidates in sample_candidates(collection, runs, how, seed)}


def test_top_pools_runs_by_best_rank() -> None:
    """Concatenating the runs would fill every list from the first source alone."""
    runs = {"bm25": {"q1": ranking("d5", "d6", "d7")}, "dense": {"q1": ranking("d8", "d5", "d9")}}
    lists = sample(pets(), runs, spec(negatives=5))
    assert lists["q1"] == CandidateList("q1", ("d0", "d5", "d8", "d6", "d7", "d9"), (1, 0, 0, 0, 0, 0))


def test_the_window_is_of_ranks_from_one_inclusive() -> None:
    """Off by one here and the top rank, most often a false negative, is back."""
    runs = {"bm25": {"q1": ranking("d3", "d4", "d5", "d6", "d7")}}
    assert sample(pets(), runs, spec(window=(2, 4), negatives=9))["q1"].doc_ids == ("d0", "d4", "d5", "d6")


def test_what_is_never_a_negative_and_is_counted() -> None:
    """A false negative teaches the student to push an answer away."""
    collection = pets(
        texts={
            "d0": "An answer",
            "d1": "x",
            "copy": "an  ANSWER",
            "twin": "Another",
            "empty": " ",
            "bad": "b",
            "low": "l",
        },
        judged={"train": {"q1": {"d0": 1, "d1": 2, "low": 0}}},
    )
    report = MiningReport()
    runs = {"bm25": {"q1": ranking("d0", "copy", "d1", "empty", "bad", "low", "twin")}}
    (candidates,) = sample_candidates(collection, runs, spec(negatives=5), 1, report)
    assert candidates == CandidateList("q1", ("d1", "bad", "low", "twin"), (2, 0, 0, 0))
    assert report.removed == {"judged relevant": 2, "same text as a positive": 1, "empty": 1}
    assert (report.queries, report.lists, report.short, report.dropped) == (1, 1, 1, {})


def test_copies_of_a_positive_that_was_not_chosen_are_left_out_too() -> None:
    """With one positive in the list the others are still right answers."""
    collection = pets(
        texts={"d0": "a", "d1": "b", "copy": "B", "bad": "c"}, judged={"train": {"q1": {"d0": 2, "d1": 1}}}
    )
    lists = sample(collection, {"r": {"q1": ranking("copy", "bad")}}, spec(positives=1))
    assert lists["q1"].doc_ids == ("d0", "bad")


def test_several_positives_best_grade_first() -> None:
    """At most as many as asked for, labels with their grades."""
    collection = pets(judged={"train": {"q1": {"d4": 1, "d3": 1, "d2": 3, "d1": 0, "d0": -1}}})
    runs = {"r": {"q1": ranking("d9")}}
    assert sample(collection, runs, spec(positives=2))["q1"] == CandidateList("q1", ("d2", "d3", "d9"), (3, 1, 0))
    assert sample(collection, runs, spec(positives=9))["q1"].labels == (3, 1, 1, 0)


def test_queries_that_cannot_teach_are_dropped_and_counted() -> None:
    """A list without a positive or a negative has no order to learn; dropping it unseen hides a broken run."""
    collection = pets(
        texts={"d0": "a", "d1": "", "d2": "c"},
        asked={f"q{i}": f"text {i}" for i in range(5)},
        judged={"train": {"q0": {"d0": 0}, "q1": {"d1": 1}, "q2": {"d0": 1}, "q3": {"d0": 1}, "q4": {"d0": 1}}},
    )
    runs = {"r": {"q0": ranking("d2"), "q1": ranking("d2"), "q2": ranking("d0", "d1"), "q4": ranking("d2")}}
    report = MiningReport()
    assert [c.query_id for c in sample_candidates(collection, runs, spec(), 1, report)] == ["q4"]
    assert report.dropped == {"no positive with a text": 2, "no negative in the pool": 2}
    assert report.queries == 5


def test_only_training_queries_get_lists() -> None:
    """A run that also covers the test split must not turn it into training data."""
    runs = {"r": {q: ranking("d7") for q in ("q1", "q2", "q3")}}
    assert set(sample(pets(), runs, spec())) == {"q1", "q2"}


def test_unknown_ids_are_named() -> None:
    """A run made for another collection must not shrink to what happens to match."""
    with pytest.raises(DataError, match="run 'bm25': query 'q9' is not in memory"):
        sample(pets(), {"bm25": {"q9": ranking("d1")}}, spec())
    with pytest.raises(DataError, match="no document 'other'"):
        sample(pets(), {"bm25": {"q1": ranking("other")}}, spec())


@given(st.integers(0, 2**40), st.integers(1, 12), st.permutations(["q1", "q2"]))
@settings(deadline=None, max_examples=60)
def test_random_draws_depend_on_seed_and_query_alone(seed: int, negatives: int, order: list[str]) -> None:
    """A generator shared by all queries would change every list when one query is added."""
    docs = [f"d{i}" for i in range(3, 13)]
    how = spec(strategy="random", negatives=negatives)
    qrels = {"q1": {"d0": 1}, "q2": {"d1": 1}}
    runs = {"r": {query_id: ranking(*docs) for query_id in order}}
    both = sample(pets(judged={"train": {query_id: qrels[query_id] for query_id in order}}), runs, how, seed)
    alone = sample(pets(judged={"train": {"q2": qrels["q2"]}}), runs, how, seed)
    assert both["q2"] == alone["q2"]
    assert len(alone["q2"].doc_ids) == 1 + min(negatives, 10)
    assert set(alone["q2"].doc_ids[1:]) <= set(docs)


def test_seeds_and_queries_draw_differently() -> None:
    """A generator that ignores its seed, or gives every query the same ranks, teaches one rank only."""
    texts = {f"d{i}": f"text {i}" for i in range(100)}
    runs = {"r": {q: ranking(*(f"d{i}" for i in range(3, 93))) for q in ("q1", "q2")}}
    how = spec(strategy="random", window=(1, 90), negatives=10)
    one, other = (sample(pets(texts=texts), runs, how, seed) for seed in (1, 2))
    assert one["q1"].doc_ids[1:] != one["q2"].doc_ids[1:]
    assert one["q1"].doc_ids != other["q1"].doc_ids
    counts: dict[str, int] = {}
    for seed in range(300):
        for doc_id in sample(pets(texts=texts), runs, how, seed)["q1"].doc_ids[1:]:
            counts[doc_id] = counts.get(doc_id, 0) + 1
    # 300 draws of 10 of 90: 33.3 each, standard deviation 5.4; six of them on either side.
    assert len(counts) == 90
    assert min(counts.values()) >= 1
    assert max(counts.values()) <= 66


def test_the_same_draws_in_every_process() -> None:
    """hash() of a string differs from process to process."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_candidates import *\n"
        "docs = [f'd{i}' for i in range(3, 19)]\n"
        "runs = {'a': {'q1': ranking(*docs), 'q2': ranking(*docs)}, 'b': {'q1': ranking(*reversed(docs))}}\n"
        "sys.stdout.write(repr(sample(pets(), runs, spec(strategy='random', window=(1, 12), negatives=4), 5)))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert len(outputs) == 1
    assert "CandidateList" in outputs.pop()


def test_many_queries_cross_the_chunk(tmp_path: Path) -> None:
    """Texts are looked up for some hundred queries at a time; none may be lost or swapped between."""
    n = 600
    collection = MemoryCollection(
        {f"d{i}": f"text {i}" for i in range(n)},
        {f"q{i}": f"query {i}" for i in range(n)},
        {"train": {f"q{i}": {f"d{i}": 1} for i in range(n)}},
    )
    runs = {"r": {f"q{i}": ranking(f"d{(i + 1) % n}") for i in range(n)}}
    lists = list(sample_candidates(collection, runs, spec(), 1))
    assert [c.doc_ids for c in lists] == [(f"d{i}", f"d{(i + 1) % n}") for i in range(n)]
    path = tmp_path / "candidates.jsonl"
    write_candidates(path, lists)
    assert read_candidates(path) == lists


GOOD = '{"query_id": "q1", "doc_ids": ["d1", "d2"], "labels": [1, 0]}\n'


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (GOOD[:30], "malformed JSON"),
        ("[]", "not a candidate list (query_id, doc_ids, labels)"),
        ('{"query_id": "q2", "doc_ids": ["d1", "d2"]}', "not a candidate list"),
        ('{"query_id": 2, "doc_ids": ["d1", "d2"], "labels": [1, 0]}', "not a candidate list"),
        ('{"query_id": "q2", "doc_ids": ["d1", 2], "labels": [1, 0]}', "not a candidate list"),
        ('{"query_id": "q2", "doc_ids": ["d1", "d2"], "labels": [true, 0]}', "not a candidate list"),
        ('{"query_id": "q2", "doc_ids": "d1", "labels": [1, 0]}', "not a candidate list"),
        ('{"query_id": "q2", "doc_ids": ["d1", "d2"], "labels": [1, 0], "scores": []}', "not a candidate list"),
        ('{"query_id": "q2", "doc_ids": ["d1"], "labels": [1, 0]}', "query 'q2': 1 documents but 2 labels"),
        ('{"query_id": "q2", "doc_ids": ["d1", "d1"], "labels": [1, 0]}', "query 'q2': document 'd1' occurs twice"),
        ('{"query_id": "q2", "doc_ids": ["d1", "d2"], "labels": [0, 1]}', "positives first"),
        ('{"query_id": "q2", "doc_ids": ["d1", "d2"], "labels": [1, -1]}', "positives first"),
        ('{"query_id": "q2", "doc_ids": ["d1", "d2"], "labels": [0, 0]}', "needs a positive and a negative"),
        ('{"query_id": "q2", "doc_ids": [], "labels": []}', "needs a positive and a negative"),
        ("[" * 100000, "nested too deep; mine again"),
        ("9" * 5000, "a number has too many digits without quotes; mine again"),
        (GOOD, "query 'q1' has a list already"),
    ],
)
def test_torn_or_wrong_files_name_the_line(tmp_path: Path, line: str, part: str) -> None:
    """A teacher scores for hours what the file says."""
    path = tmp_path / "candidates.jsonl"
    path.write_text(GOOD + line)
    with pytest.raises(DataError) as error:
        read_candidates(path)
    assert f"{path}:2: " in str(error.value)
    assert part in str(error.value)


def test_a_missing_file_and_a_failed_write(tmp_path: Path) -> None:
    """Half a candidate file must not stay behind for the next step to accept."""
    path = tmp_path / "candidates.jsonl"
    with pytest.raises(DataError, match="cannot read it"):
        read_candidates(path)

    def failing() -> Any:
        yield CandidateList("q1", ("d1", "d2"), (1, 0))
        raise DataError("torn")

    with pytest.raises(DataError, match="torn"):
        write_candidates(path, failing())
    assert list(tmp_path.iterdir()) == []
