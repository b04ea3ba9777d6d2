"""MS MARCO layout and its first-stage files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from collection_files import write_msmarco

from retrieval_kd.collections.msmarco import MsMarcoCollection, read_run, read_top1000, usual_measures
from retrieval_kd.errors import DataError


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def read_all(folder: Path) -> None:
    collection = MsMarcoCollection(folder)
    list(collection.documents())
    for split in collection.splits():
        collection.qrels(split)


def test_reads_what_is_there(tmp_path: Path) -> None:
    """The plain case: tabs and spaces in qrels, overlapping query files, queries without judgements."""
    collection = MsMarcoCollection(write_msmarco(tmp_path / "marco"))
    assert collection.name == "marco"
    assert [document.doc_id for document in collection.documents()] == ["0", "7"]
    assert collection.contents(["7"]) == {"7": "dogs bark"}
    assert collection.splits() == ("train", "dev")
    assert collection.qrels("dev") == {"2": {"7": 1}}
    assert set(collection.queries()) == {"1", "2", "9"}


def test_a_passage_may_hold_tabs_and_quotes(tmp_path: Path) -> None:
    """A csv reader would join lines at a stray quote; a split at every tab would cut the text."""
    folder = write_msmarco(tmp_path / "c")
    append(folder / "collection.tsv", '8\ta "stray\tquote\n9\tnext\n')
    assert MsMarcoCollection(folder).contents(["8", "9"]) == {"8": 'a "stray\tquote', "9": "next"}


def test_the_fingerprint_covers_queries_and_qrels(tmp_path: Path) -> None:
    """Other judgements over the same passages are another collection with the same vectors."""
    folder = write_msmarco(tmp_path / "c")
    before = MsMarcoCollection(folder)
    whole, corpus = before.fingerprint, before.corpus_fingerprint
    append(folder / "queries.eval.tsv", "10\tone more\n")
    after = MsMarcoCollection(folder)
    assert after.corpus_fingerprint == corpus
    assert after.fingerprint != whole


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tab": (lambda f: append(f / "collection.tsv", "8 text\n"), "collection.tsv:3: no tab"),
    "doc twice": (
        lambda f: append(f / "collection.tsv", "7\tagain\n"),
        "collection.tsv:3: document id '7' occurs twice",
    ),
    "doc id": (lambda f: append(f / "collection.tsv", "\ttext\n"), "collection.tsv:3: the document id is empty"),
    "query columns": (lambda f: append(f / "queries.dev.tsv", "3\n"), "queries.dev.tsv:2: 1 columns instead of 2"),
    "query twice": (lambda f: append(f / "queries.dev.tsv", "2\twhat barks\n"), "query id '2' occurs twice"),
    "query empty": (
        lambda f: append(f / "queries.dev.tsv", "3\t \n"),
        "queries.dev.tsv:2: query '3' has an empty text",
    ),
    "two texts": (lambda f: append(f / "queries.eval.tsv", "1\tother\n"), "query '1' has another text in another"),
    "qrels columns": (
        lambda f: append(f / "qrels.dev.tsv", "2 7 1\n"),
        "qrels.dev.tsv:2: 3 columns, TREC qrels have 4",
    ),
    "grade": (lambda f: append(f / "qrels.dev.tsv", "2 0 0 x\n"), "qrels.dev.tsv:2: grade 'x' is not an integer"),
    "unknown doc": (lambda f: append(f / "qrels.dev.tsv", "2 0 5 1\n"), "qrels.dev.tsv:2: document '5' is not in"),
    "no qrels": (lambda f: [p.unlink() for p in f.glob("qrels*")], "qrels.*.tsv: missing; MS MARCO layout has"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_lie_is_named_with_file_and_line(tmp_path: Path, case: str) -> None:
    """A wrong row must stop the reader, with its place."""
    break_it, part = CASES[case]
    folder = write_msmarco(tmp_path / "c")
    break_it(folder)
    with pytest.raises(DataError) as error:
        read_all(folder)
    assert part in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "1\t0\n1\t7\n2\t7\n",
        "1\t7\t2\n2\t7\t1\n1\t0\t1\n",
        "1\t0\twhat purrs\tcats\n1\t7\twhat purrs\tdogs\n2\t7\tq\td\n",
    ],
)
def test_top1000_in_each_of_its_forms(tmp_path: Path, content: str) -> None:
    """Each published form must give the same first stage; a rank column outranks the order of the file."""
    path = tmp_path / "top1000.dev"
    path.write_text(content)
    run = read_top1000(path)
    assert {query_id: ranking.doc_ids for query_id, ranking in run.items()} == {"1": ("0", "7"), "2": ("7",)}
    assert np.all(np.diff(run["1"].scores) < 0)


def test_a_run_is_read_in_the_format_of_its_columns(tmp_path: Path) -> None:
    """Read as TREC's, MS MARCO's own runs are refused; a ranking must be the same in either format."""
    path = tmp_path / "run"
    for content in (
        "1\t7\t2\n1\t0\t1\n",
        "1 Q0 7 2 0.5 t\n1 Q0 0 1 0.75 t\n",
        "1\tQ0\t0\t1\t2\tt\n1\tQ0\t7\t2\t1\tt\n",
    ):
        path.write_text(content)
        assert read_run(path)["1"].doc_ids == ("0", "7")
    path.write_text("1 0 1\n")
    with pytest.raises(DataError, match=r"run:1: neither the 6 columns of a TREC run .* nor, between tabs, the 3 of"):
        read_run(path)


@pytest.mark.parametrize(
    ("collection", "split", "expected"),
    [
        ("irds:msmarco-passage", "dev", ("RR@10", "R@1000")),
        ("irds:msmarco-passage/trec-dl-2019/judged", "test", ("nDCG@10", "RR(rel=2)", "R(rel=2)@1000")),
        ("irds:msmarco-document/trec-dl-2020", "test", ("nDCG@10", "RR", "R@1000")),
        ("irds:msmarco-document-v2/trec-dl-2021/judged", "test", ("nDCG@10", "RR", "R@1000")),
        ("irds:beir/msmarco/test", "test", ("nDCG@10", "RR(rel=2)", "R(rel=2)@1000")),
        ("irds:beir/msmarco", "dev", ("RR@10", "R@1000")),
        ("somewhere/trec-dl-2019", "dev", ("RR@10", "R@1000")),
    ],
)
def test_graded_sets_have_their_own_measures(collection: str, split: str, expected: tuple[str, ...]) -> None:
    """A passage of grade 1 counted as relevant gives an RR that no paper's can be compared with."""
    assert usual_measures(collection, split) == expected


def test_a_folders_corpus_says_where_relevance_begins(tmp_path: Path) -> None:
    """TREC's document judgements are relevant from grade 1, its passages from grade 2."""
    (tmp_path / "msmarco-docs.tsv").touch()
    assert usual_measures(str(tmp_path), "dl19") == ("nDCG@10", "RR", "R@1000")
    (tmp_path / "collection.tsv").touch()
    assert usual_measures(str(tmp_path), "dl19") == ("nDCG@10", "RR(rel=2)", "R(rel=2)@1000")


def test_the_order_of_a_long_file_survives_float32() -> None:
    """Scores made of ranks must not tie deep in a list, or ids would reorder it."""
    from retrieval_kd.runs import rank

    ids = [f"d{-i + 20_000}" for i in range(10_000)]
    assert rank(ids, [1.0 / (i + 1) for i in range(10_000)]).doc_ids == tuple(ids)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("1\t0\t1\tq\td\n", ":1: 5 columns; give query-id passage-id"),
        ("1\t0\n1\t0\n", ":2: query '1' lists document '0' twice"),
        ("1\t0\tfirst\n", ":1: rank 'first' is not a positive integer"),
        ("1\t0\t0\n", ":1: rank '0' is not a positive integer"),
        ("1\t\n", ":1: the document id is empty"),
        ("1\t0\n1", ":2: 1 columns"),
    ],
)
def test_wrong_top1000_files(tmp_path: Path, content: str, part: str) -> None:
    """A torn last line or a shifted column must not become a first stage."""
    path = tmp_path / "top1000.dev.tsv"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_top1000(path)
    assert part in str(error.value)


def test_documents_and_trec_files_under_their_published_names(tmp_path: Path) -> None:
    """Renaming downloaded files by hand is where splits get mixed up."""
    (tmp_path / "msmarco-docs.tsv").write_text("D1\thttp://a\tCats\tthey purr\nD2\thttp://b\tDogs\tthey bark\n")
    (tmp_path / "msmarco-docdev-queries.tsv").write_text("1\twhat purrs\n")
    (tmp_path / "msmarco-docdev-qrels.tsv").write_text("1 0 D1 1\n")
    (tmp_path / "msmarco-test2019-queries.tsv").write_text("9\twhat barks\n")
    (tmp_path / "2019qrels-docs.txt").write_text("9 0 D2 3\n9 0 D1 0\n")
    collection = MsMarcoCollection(tmp_path)
    assert collection.splits() == ("dev", "dl19")
    assert collection.qrels("dl19") == {"9": {"D2": 3, "D1": 0}}
    assert collection.contents(["D1"]) == {"D1": "Cats they purr"}
    assert collection.queries() == {"1": "what purrs", "9": "what barks"}
    append(tmp_path / "msmarco-docs.tsv", "D3\ttwo columns\n")
    with pytest.raises(DataError, match=r"msmarco-docs\.tsv:3: 2 columns instead of 4"):
        list(MsMarcoCollection(tmp_path).documents())
