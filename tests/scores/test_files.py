"""Scores from elsewhere: the file's own numbers, or an error that names the line."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_kd.errors import DataError
from retrieval_kd.runs import Shortlist, rank, write_trec
from retrieval_kd.scores.files import read_preferences, read_scores
from retrieval_kd.scores.store import SCHEMA


def text_file(tmp_path: Path, text: str) -> Path:
    """Write a file of scores."""
    path = tmp_path / "scores.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_run_is_a_teacher(tmp_path: Path) -> None:
    """Without it a TREC file could come back under other documents, or with its rank for its score."""
    path = tmp_path / "run.trec"
    write_trec(path, {"q1": rank(["a", "b", "c"], [3.5, -1.25, 0.1]), "q2": rank(["b", "d"], [0.2, 0.3])}, "x")
    store = read_scores(path)
    one, two = store.score_lists([Shortlist("q1", ("b", "a")), Shortlist("q2", ("d", "b"))])
    assert one.tolist() == [-1.25, 3.5]
    assert two.tolist() == np.array([0.3, 0.2], np.float32).tolist()
    assert len(store) == 5


def test_ties_of_a_run_stay_ties(tmp_path: Path) -> None:
    """Without it a teacher's indifference would be reported, and learned, as the order of the ids."""
    (scores,) = read_scores(text_file(tmp_path, "q Q0 a 1 2.0 t\nq Q0 b 2 2.0 t\n")).score_lists(
        [Shortlist("q", ("b", "a"))]
    )
    assert scores.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("head", ["", "query_id\tdoc_id\tscore\n", "qid\tdocid\tScore\n"])
def test_a_tsv_file_is_a_teacher(tmp_path: Path, head: str) -> None:
    """Without it ids with spaces would be cut, or the line of names be taken for a pair."""
    store = read_scores(text_file(tmp_path, f"{head}q 1\td 1\t-0.5\n\nq 1\td2\t1e2\n"))
    (scores,) = store.score_lists([Shortlist("q 1", ("d2", "d 1"))])
    assert scores.tolist() == [100.0, -0.5]
    assert len(store) == 2


def test_a_parquet_file_is_a_teacher(tmp_path: Path) -> None:
    """Without it a file of doubles, with numbers for ids and columns in another order, would have to be rewritten."""
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"score": [0.1, 2.0], "doc_id": [7, 8], "query_id": ["q", "q"], "more": [1, 2]}), path)
    (scores,) = read_scores(path).score_lists([Shortlist("q", ("8", "7"))])
    assert scores.tolist() == [2.0, np.float32(0.1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q\td\t1\n\nq\td\t2\n", r"scores.txt:3: query 'q' and document 'd' have a second score"),
        ("q\td\t1\nq\te\tnan\n", r"scores.txt:2: query 'q' and document 'e' have the score nan"),
        ("q\td\t1e39\n", r"scores.txt:1: query 'q' and document 'd' have the score inf"),
        ("q\td\t1\nq\te\tgood\n", r"scores.txt:2: score 'good' is not a number"),
        ("q Q0 d 1 good t\n", r"scores.txt:1: score 'good' is not a number"),
        ("q\td\t1,5\nq\te\t2\n", r"scores.txt:1: score '1,5' is not a number"),
        ("q\td\tgood\n", r"scores.txt:1: score 'good' is not a number"),
        ("query_id\tdoc_id\tscore\n", r"scores.txt: no scores"),
        ("", r"scores.txt: no scores"),
        ("q d\n", r"scores.txt:1: 2 columns; a TREC run has 6"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    """Without it one bad line in a million would be found by its NaN in the loss."""
    with pytest.raises(DataError, match=message):
        read_scores(text_file(tmp_path, text))


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    """Without it an empty score would read as zero, and text as whatever Arrow makes of it."""
    path = tmp_path / "s.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_scores(path)
    for table, message in (
        (pa.table({"query_id": ["q"], "score": [1.0]}), "no column 'doc_id'"),
        (pa.table({"query_id": ["q"], "doc_id": ["d"], "score": [None]}), "'score' has empty values"),
        (pa.table({"query_id": ["q"], "doc_id": ["d"], "score": ["high"]}), "such a file has"),
        (pa.table({"query_id": ["q"], "doc_id": ["d"], "score": [float("nan")]}), "have the score nan"),
        (pa.table([["q"], ["p"], ["d"], [1.0]], ["query_id", "query_id", "doc_id", "score"]), "2 columns 'query_id'"),
        (SCHEMA.empty_table(), "s.parquet: no scores"),
    ):
        pq.write_table(table, path)
        with pytest.raises(DataError, match=message):
            read_scores(path)
    with pytest.raises(DataError, match="cannot read"):
        read_scores(tmp_path / "nothing.trec")
    with pytest.raises(DataError, match=r"nothing\.parquet: not a Parquet file"):
        read_scores(tmp_path / "nothing.parquet")


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    """Without it a byte that a disk or a copy lost would end in a trace of Arrow's, without the file's name."""
    path = tmp_path / "s.parquet"
    ids = [f"q{i}" for i in range(50)]
    refused = []
    for compression in ("none", "zstd"):
        pq.write_table(
            pa.table({"query_id": ids, "doc_id": ids, "score": np.arange(50.0)}), path, compression=compression
        )
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
            try:
                read_scores(path)
            except DataError as error:
                refused.append(str(error))
        path.write_bytes(whole)
        assert len(read_scores(path)) == 50
    assert len(refused) > 100
    assert all(line.startswith(str(path)) and "\n" not in line for line in refused)


def test_missing_pairs_are_counted_and_named(tmp_path: Path) -> None:
    """Without it a run cut at rank ten would teach that everything below it is equally bad."""
    store = read_scores(text_file(tmp_path, "q\ta\t1\n"))
    with pytest.raises(DataError, match=r"3 of 4 pairs have no score \(query 'q' document 'b', .*'p' document 'a'"):
        store.score_lists([Shortlist("q", ("a", "b", "c")), Shortlist("p", ("a",))])


def test_preferences_are_read_by_the_name_of_their_column(tmp_path: Path) -> None:
    """Without it PairDistill's log-probabilities would be refused, or worse, be taken for probabilities."""
    path = tmp_path / "p.parquet"
    ids = {"query_id": ["q", "q"], "doc_i": ["a", "b"], "doc_j": ["b", "a"]}
    for column, values in (("p", [0.8, 0.4]), ("logp", [float(np.log(0.8)), float(np.log(0.4))])):
        pq.write_table(pa.table({**ids, column: values}), path)
        (matrix,) = read_preferences(path).find([Shortlist("q", ("a", "b"))])
        np.testing.assert_allclose(matrix, [[np.nan, 0.8], [0.4, np.nan]], rtol=1e-6)
    for column, message in (("p", "have the preference -0.2"), ("logp", "have the preference 1.2")):
        pq.write_table(pa.table({**ids, column: [0.5, -0.2] if column == "p" else [-1.0, 0.2]}), path)
        with pytest.raises(DataError, match=message):
            read_preferences(path)
    pq.write_table(pa.table({"query_id": ["q"], "score": [0.5]}), path)
    with pytest.raises(DataError, match="no column 'doc_i'"):
        read_preferences(path)
