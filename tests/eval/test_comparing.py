"""Comparison from files: the tests, the refusals with file and line, and the listing that says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.comparing import Candidate, compare_files, differing_queries, format_cases, format_comparisons
from eval.measures import Evaluation, evaluate
from eval.per_query import read_per_query, write_per_query
from eval.significance import compare
from retrieval_kd.collections.beir import BeirCollection
from retrieval_kd.errors import DataError
from retrieval_kd.runs import rank, write_trec

HEADER = "query_id\tnDCG@10\tRR@10\n"


def _file(path: Path, rows: str, header: str = HEADER) -> Path:
    path.write_text(header + rows)
    return path


def test_values_come_back_exactly(tmp_path: Path) -> None:
    """A value rounded on disk turns a tie into a win."""
    values = {"nDCG@10": np.array([1 / 3, 0.0, np.nextafter(1, 0)]), "RR": np.array([0.1, 1.0, 2 / 7])}
    write_per_query(tmp_path / "a.tsv", Evaluation(("q1", "q2", "q 3"), values, ()))
    read, lines = read_per_query(tmp_path / "a.tsv")
    assert read.query_ids == ("q1", "q2", "q 3")
    assert lines == {"q1": 2, "q2": 3, "q 3": 4}
    for measure, expected in values.items():
        np.testing.assert_array_equal(read.values[measure], expected)


def test_files_give_the_tests_of_the_values(tmp_path: Path) -> None:
    """Comparing later, from files in another order, must say what the report said."""
    rng = np.random.default_rng(4)
    ids = tuple(f"q{i}" for i in range(40))
    evaluations = {}
    for name in "abc":
        evaluations[name] = Evaluation(ids, {"nDCG@10": rng.random(40)}, ())
        shuffled = rng.permutation(40)
        write_per_query(
            tmp_path / f"{name}.tsv",
            Evaluation(tuple(ids[i] for i in shuffled), {"nDCG@10": evaluations[name].values["nDCG@10"][shuffled]}, ()),
        )
    paths = [tmp_path / f"{name}.tsv" for name in "abc"]
    _, rows = compare_files(paths, baseline="b")
    for row, expected in zip(rows, compare(evaluations, "b", "nDCG@10"), strict=True):
        assert (row.system, row.baseline, row.wins, row.losses) == (
            expected.system, "b", expected.wins, expected.losses,
        )  # fmt: skip
        assert row.difference == pytest.approx(expected.difference)
        assert row.p_t == pytest.approx(expected.p_t)
        assert row.p_holm == pytest.approx(expected.p_holm, abs=0.02)
    assert "40 paired queries" in format_comparisons(rows)


GOOD = "q1\t0.5\t1.0\nq2\t0.25\t0.5\n"
BROKEN = {
    "no header": ("q1\t0.5\n", "", r"b\.tsv:1: no header"),
    "columns": ("q1\t0.5\n", HEADER, r"b\.tsv:2: 2 columns, the header has 3"),
    "text": ("q1\t0.5\thigh\n", HEADER, r"b\.tsv:2: 'high' is not a number"),
    "nan": ("q1\t0.5\tnan\n", HEADER, r"b\.tsv:2: value nan is not finite"),
    "twice": ("q1\t0\t0\n\nq1\t0\t0\n", HEADER, r"b\.tsv:4: query 'q1' also stands in line 2"),
    "empty": ("", HEADER, r"b\.tsv: no values"),
    "fewer": ("q1\t0.5\t1.0\n", HEADER, r"a\.tsv:3: query 'q2' is not in .*b\.tsv \(2 and 1 queries\)"),
    "other": (GOOD + "q3\t1\t1\n", HEADER, r"b\.tsv:4: query 'q3' is not in .*a\.tsv"),
    "measures": ("q1\t1\nq2\t1\n", "query_id\tAP\n", "share no measure"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_lie_is_named_with_file_and_line(tmp_path: Path, case: str) -> None:
    """Two systems on different queries are compared every day, and the difference is the queries'."""
    rows, header, message = BROKEN[case]
    paths = [_file(tmp_path / "a.tsv", GOOD), _file(tmp_path / "b.tsv", rows, header)]
    with pytest.raises(DataError, match=message):
        compare_files(paths)


def test_wrong_calls_say_what_to_give(tmp_path: Path) -> None:
    """A misspelt name must not fall back to another system or measure."""
    paths = [_file(tmp_path / f"{name}.tsv", GOOD) for name in "ab"]
    for given, extra, message in (
        (paths[:1], {}, "1 system to compare"),
        (paths, {"baseline": "c"}, "baseline 'c' is not among"),
        (paths, {"measures": ["nDGC@10"]}, r"a\.tsv: no measure 'nDGC@10', did you mean 'nDCG@10'"),
        ([*paths, paths[0]], {}, r"two files are called a\.tsv"),
        ([tmp_path], {}, "no per_query"),
        ([tmp_path / "c.tsv", *paths], {}, r"c\.tsv: cannot read it"),
    ):
        with pytest.raises(DataError, match=message):
            compare_files(given, **extra)


def _report(folder: Path) -> tuple[Candidate, Candidate, BeirCollection]:
    """Write a collection of three queries and two systems: one wins q1, loses q2, ties q3."""
    corpus = folder / "toy"
    (corpus / "qrels").mkdir(parents=True)
    documents = [f'{{"_id": "d{i}", "title": "", "text": "{"long " * 60}text {i}"}}\n' for i in range(6)]
    (corpus / "corpus.jsonl").write_text("".join(documents))
    (corpus / "queries.jsonl").write_text("".join(f'{{"_id": "q{i}", "text": "query {i}"}}\n' for i in range(1, 4)))
    (corpus / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t1\nq2\td2\t1\nq3\td3\t1\n")
    collection = BeirCollection(corpus)
    runs = {
        "base": {"q1": rank(["d0", "d1"], [2, 1]), "q2": rank(["d2"], [1]), "q3": rank(["d3"], [1])},
        "new": {"q1": rank(["d1", "d0"], [2, 1]), "q2": rank(["d0"], [1]), "q3": rank(["d3"], [1])},
    }
    for name, run in runs.items():
        write_trec(folder / "runs" / f"{name}.trec", run, name)
        write_per_query(folder / "per_query" / f"{name}.tsv", evaluate(run, collection.qrels("test"), ["RR@10"]))
    base, new = (Candidate.read(folder / "per_query" / f"{name}.tsv") for name in runs)
    return base, new, collection


def test_the_listing_shows_what_each_system_found_and_where_the_relevant_is(tmp_path: Path) -> None:
    """A difference without its queries cannot be understood or argued with."""
    base, new, collection = _report(tmp_path)
    wins, losses = differing_queries(base, new, "RR@10", collection, "test", count=5)
    assert [(case.query_id, case.baseline, case.system) for case in wins] == [("q1", 0.5, 1.0)]
    assert [case.query_id for case in losses] == ["q2"]
    document, places = wins[0].relevant[0]
    assert (document.doc_id, document.grade, dict(places)) == ("d1", 2, {"base": 2, "new": 1})
    assert [(hit.doc_id, hit.grade) for hit in wins[0].tops["new"]] == [("d1", 2), ("d0", None)]
    assert losses[0].relevant[0][1] == {"base": 1, "new": None}
    text = format_cases("Wins", wins)
    assert "query 1   0.500 -> 1.000" in text
    assert "new 2. not judged d0: long long" in text
    assert max(map(len, text.splitlines())) < 260
    # The same runs the other way round: wins are losses.
    turned = differing_queries(new, base, "RR@10", collection, "test", count=5)
    assert [case.query_id for case in turned[0]] == ["q2"]


def test_a_listing_of_another_collection_is_refused(tmp_path: Path) -> None:
    """Ids that coincide would show texts that nobody ranked."""
    base, new, collection = _report(tmp_path)
    other = Candidate(base.name, base.path, base.evaluation, {"q9": 7, **base.lines})
    with pytest.raises(DataError, match=r"base\.tsv:7: query 'q9' is not judged in split 'test' of toy"):
        differing_queries(other, new, "RR@10", collection, "test", count=1)


def test_values_without_runs_still_list_queries(tmp_path: Path) -> None:
    """A per-query file taken out of its folder has no rankings; the queries are worth showing all the same."""
    base, new, collection = _report(tmp_path)
    moved = [Candidate.read(_copied(candidate, tmp_path / "moved")) for candidate in (base, new)]
    wins, _ = differing_queries(moved[0], moved[1], "RR@10", collection, "test", count=1)
    assert wins[0].tops == {"base": (), "new": ()}


def _copied(candidate: Candidate, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / candidate.path.name).write_text(candidate.path.read_text())
    return folder / candidate.path.name
