"""BEIR layout: reading it, and every way in which a folder can lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from collection_files import write_beir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval_kd.collections.base import Document, split_queries, training_queries
from retrieval_kd.collections.beir import BeirCollection
from retrieval_kd.collections.beir import write_beir as copy_beir
from retrieval_kd.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/beir"


def append(path: Path, text: str | bytes) -> None:
    path.write_bytes(path.read_bytes() + (text if isinstance(text, bytes) else text.encode()))


def read_all(folder: Path) -> None:
    collection = BeirCollection(folder)
    list(collection.documents())
    for split in collection.splits():
        collection.qrels(split)


def test_reads_what_is_there(tmp_path: Path) -> None:
    """The plain case, every method of the protocol."""
    collection = BeirCollection(write_beir(tmp_path / "pets"))
    assert collection.name == "pets"
    assert list(collection.documents())[:2] == [Document("d1", "Cats", "purr a lot"), Document("d2", "", "dogs bark")]
    assert collection.contents(["d3", "d1", "d3"]) == {"d3": "Bird", "d1": "Cats purr a lot"}
    assert collection.contents([]) == {}
    assert collection.splits() == ("train", "test")
    assert collection.qrels("train") == {"q2": {"d2": 2}}
    assert split_queries(collection, "test") == {"q1": "what purrs"}


def test_the_fingerprint_is_of_the_bytes(tmp_path: Path) -> None:
    """A cache keyed by anything less would serve vectors of an edited corpus."""
    folder = write_beir(tmp_path / "a")
    one = BeirCollection(folder)
    assert one.corpus_fingerprint == hashlib.sha256((folder / "corpus.jsonl").read_bytes()).hexdigest()
    assert one.fingerprint == BeirCollection(write_beir(tmp_path / "b")).fingerprint
    append(folder / "qrels/test.tsv", "q1\td2\t0\n")
    assert BeirCollection(folder).fingerprint != one.fingerprint
    assert BeirCollection(folder).corpus_fingerprint == one.corpus_fingerprint
    append(folder / "corpus.jsonl", "\n")
    assert BeirCollection(folder).corpus_fingerprint != one.corpus_fingerprint


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_text_by_id_is_the_streamed_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]
) -> None:
    """Offsets counted in characters, or lines split at U+2028, would give another document's text."""
    documents = {f"é{i}": text for i, text in enumerate(texts)}
    folder = write_beir(tmp_path_factory.mktemp("c") / "x", documents, qrels={"test": [("q1", "é0", 1)]})
    collection = BeirCollection(folder)
    streamed = {document.doc_id: document.content for document in collection.documents()}
    assert collection.contents(reversed(list(streamed))) == streamed
    assert list(streamed) == list(documents)


def test_windows_line_ends_byte_order_mark_and_unicode_separators(tmp_path: Path) -> None:
    """Files that went through an editor must read the same."""
    folder = write_beir(tmp_path / "c")
    (folder / "corpus.jsonl").write_bytes(
        "\ufeff".encode() + '{"_id": "d1", "text": "a\u2028b"}\r\n\r\n{"_id": "d2", "title": null, "text": ""}'.encode()
    )
    (folder / "qrels/test.tsv").write_bytes(b"query-id\tcorpus-id\tscore\r\nq1\td1\t1\r\n")
    collection = BeirCollection(folder)
    assert collection.contents(["d2", "d1"]) == {"d2": "", "d1": "a\u2028b"}
    assert collection.qrels("test") == {"q1": {"d1": 1}}


def test_training_queries_leave_out_what_any_other_split_asks(tmp_path: Path) -> None:
    """A student trained on a test query's text has seen the exam."""
    queries = {
        "q1": "What  Purrs?",
        "q2": "what purrs",
        "q3": "what barks",
        "q4": "What barks",
        "q5": "kept",
        "q6": "dev",
    }
    qrels = {
        "validation": [("q1", "d1", 1)],
        "test": [("q4", "d2", 1)],
        "dev": [("q6", "d1", 1)],
        "train": [("q2", "d1", 1), ("q3", "d2", 1), ("q5", "d1", 1)],
    }
    collection = BeirCollection(write_beir(tmp_path / "c", queries=queries, qrels=qrels))
    assert training_queries(collection) == {"q5": "kept"}


def test_a_train_split_without_a_query_of_its_own_is_refused(tmp_path: Path) -> None:
    """A training on no query would end, after all the mining, in a count of zero that names no reason."""
    queries = {"q1": "What purrs?", "q2": "what purrs", "q3": "what barks"}
    qrels = {"test": [("q1", "d1", 1)], "dev": [("q3", "d2", 1)], "train": [("q2", "d1", 1), ("q3", "d2", 1)]}
    collection = BeirCollection(write_beir(tmp_path / "c", queries=queries, qrels=qrels))
    with pytest.raises(DataError, match=r"^c: each of the 2 train queries is asked in dev or another split too"):
        training_queries(collection)


LINE = '{"_id": "x", "text": "y"}\n'
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn line": (lambda f: append(f / "corpus.jsonl", '{"_id": "d4", "te'), "corpus.jsonl:4: malformed JSON"),
    "array": (lambda f: append(f / "corpus.jsonl", "[1]\n"), "corpus.jsonl:4: list instead of a JSON object"),
    "no id": (lambda f: append(f / "corpus.jsonl", '{"text": "y"}\n'), "corpus.jsonl:4: no '_id'"),
    "no text": (lambda f: append(f / "corpus.jsonl", '{"_id": "x"}\n'), "corpus.jsonl:4: no 'text'"),
    "number id": (lambda f: append(f / "corpus.jsonl", '{"_id": 4, "text": ""}\n'), "'_id' is 4, not a string"),
    "number title": (
        lambda f: append(f / "corpus.jsonl", '{"_id": "4", "title": 1, "text": ""}\n'),
        "'title' is 1, not a string",
    ),
    "empty id": (lambda f: append(f / "corpus.jsonl", '{"_id": "", "text": ""}\n'), "document id is empty"),
    "white space": (
        lambda f: append(f / "corpus.jsonl", '{"_id": "a b", "text": ""}\n'),
        "corpus.jsonl:4: document id 'a b' has white space, which breaks TREC files",
    ),
    "duplicate": (lambda f: append(f / "corpus.jsonl", LINE + LINE), "corpus.jsonl:5: document id 'x' occurs twice"),
    "not utf-8": (lambda f: append(f / "corpus.jsonl", b'{"_id": "\xff"}\n'), "corpus.jsonl:4: not UTF-8"),
    "half a surrogate pair": (
        lambda f: append(f / "corpus.jsonl", '{"_id": "x", "text": "\\ud83d"}\n'),
        "corpus.jsonl:4: 'text' is not valid Unicode",
    ),
    "empty corpus": (lambda f: (f / "corpus.jsonl").write_text("\n"), "corpus.jsonl: no documents"),
    "empty query": (
        lambda f: append(f / "queries.jsonl", '{"_id": "x", "text": " "}\n'),
        "queries.jsonl:3: query 'x' has an empty text",
    ),
    "query twice": (lambda f: append(f / "queries.jsonl", LINE + LINE), "queries.jsonl:4: query id 'x' occurs twice"),
    "query id": (
        lambda f: append(f / "queries.jsonl", '{"_id": "\\t", "text": "x"}\n'),
        "query id '\\t' has white space",
    ),
    "columns": (lambda f: append(f / "qrels/test.tsv", "q1\td2\n"), "test.tsv:3: 2 columns, qrels have 3"),
    "spaces": (lambda f: append(f / "qrels/test.tsv", "q1 d2 1\n"), "test.tsv:3: 1 columns, qrels have 3"),
    "grade": (lambda f: append(f / "qrels/test.tsv", "q1\td2\t0.5\n"), "test.tsv:3: grade '0.5' is not an integer"),
    "grade tricks": (lambda f: append(f / "qrels/test.tsv", "q1\td2\t1_0\n"), "grade '1_0' is not an integer"),
    "grade of gigabytes": (
        lambda f: append(f / "qrels/test.tsv", "q1\td2\t3000000000\n"),
        "test.tsv:3: grade '3000000000' is not in ..1,000",
    ),
    "grade above all": (lambda f: append(f / "qrels/test.tsv", "q1\td2\t1001\n"), "grade '1001' is not in ..1,000"),
    "grade of many digits": (
        lambda f: append(f / "qrels/test.tsv", f"q1\td2\t{'9' * 6000}\n"),
        "test.tsv:3: grade '999999999999...9999999999999' is not in ..1,000",
    ),
    "number of many digits": (
        lambda f: append(f / "corpus.jsonl", f'{{"_id": "x", "text": "y", "n": {"9" * 5000}}}\n'),
        "corpus.jsonl:4: a number has too many digits",
    ),
    "deep nesting": (
        lambda f: append(f / "corpus.jsonl", f'{{"_id": "x", "text": "y", "n": {"[" * 100000}{"]" * 100000}}}\n'),
        "corpus.jsonl:4: nested too deep",
    ),
    "deep nesting of a query": (
        lambda f: append(f / "queries.jsonl", f"{'[' * 100000}{']' * 100000}\n"),
        "queries.jsonl:3: nested too deep",
    ),
    "unknown query": (lambda f: append(f / "qrels/test.tsv", "q9\td2\t1\n"), "test.tsv:3: query 'q9' has no text"),
    "unknown doc": (lambda f: append(f / "qrels/test.tsv", "q1\td9\t1\n"), "test.tsv:3: document 'd9' is not in"),
    "pair twice": (lambda f: append(f / "qrels/test.tsv", "q1\td1\t0\n"), "query 'q1' judges document 'd1' twice"),
    "no header": (lambda f: (f / "qrels/test.tsv").write_text("q1\td1\t1\n"), "test.tsv:1: no header"),
    "no rows": (lambda f: (f / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n"), "test.tsv: no judgements"),
    "empty qrels": (lambda f: (f / "qrels/test.tsv").write_text(""), "test.tsv: no judgements"),
    "no queries": (lambda f: (f / "queries.jsonl").unlink(), "queries.jsonl: missing"),
    "no corpus": (lambda f: (f / "corpus.jsonl").unlink(), "corpus.jsonl: missing"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_lie_is_named_with_file_and_line(tmp_path: Path, case: str) -> None:
    """A row skipped in silence moves every measure; a bare exception tells nobody which row it was."""
    break_it, part = CASES[case]
    folder = write_beir(tmp_path / "c")
    break_it(folder)
    with pytest.raises(DataError) as error:
        read_all(folder)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_every_grade_in_use_is_read(tmp_path: Path) -> None:
    """A bound that refused spam's -2 or a percentage would lock out collections that were always fine."""
    folder = write_beir(tmp_path / "c")
    append(folder / "qrels/test.tsv", "q1\td2\t-2\nq1\td3\t1000\n")
    assert BeirCollection(folder).qrels("test") == {"q1": {"d1": 1, "d2": -2, "d3": 1000}}


def test_a_lines_other_keys_may_hold_numbers_and_nesting(tmp_path: Path) -> None:
    """A refusal of what only might be too much would lose the fields that a search filters by."""
    folder = write_beir(tmp_path / "c")
    append(folder / "corpus.jsonl", f'{{"_id": "x", "text": "y", "n": {"9" * 30}, "of": [[[[1]]]]}}\n')
    assert list(BeirCollection(folder).documents())[3].metadata == {"n": 10**30 - 1, "of": [[[[1]]]]}


def test_documents_are_checked_before_the_first_one_comes(tmp_path: Path) -> None:
    """Hours of encoding must not end at a duplicate in the last line."""
    folder = write_beir(tmp_path / "c")
    append(folder / "corpus.jsonl", '{"_id": "d1", "text": ""}\n')
    with pytest.raises(DataError, match="'d1' occurs twice"):
        next(BeirCollection(folder).documents())


def test_unknown_document_and_split_are_named(tmp_path: Path) -> None:
    """The remedy is in the message: which id, and which splits there are."""
    collection = BeirCollection(write_beir(tmp_path / "c"))
    with pytest.raises(DataError, match="no document 'd9'"):
        collection.contents(["d1", "d9"])
    with pytest.raises(DataError, match="c: no split 'dev'; it has train, test"):
        collection.qrels("dev")


@pytest.mark.parametrize("name", ["scifact", "nfcorpus", "cranfield"])
def test_published_collections_read_whole(name: str) -> None:
    """Checks stricter than the published data would make the benchmark unreadable."""
    if not (SHARED / name).is_dir():
        pytest.skip("no shared BEIR data beside the repository")
    collection = BeirCollection(SHARED / name)
    queries = split_queries(collection, "test")
    assert len(queries) == {"scifact": 300, "nfcorpus": 323, "cranfield": 225}[name] or len(queries) > 150
    some = next(iter(collection.qrels("test").values()))
    assert all(collection.contents(some).values())


def test_what_else_a_line_has_is_the_documents_metadata(tmp_path: Path) -> None:
    """Without it a filter on the year of a document would have nothing to compare; a rewritten folder would lose it."""
    folder = write_beir(tmp_path / "a")
    append(
        folder / "corpus.jsonl", '{"_id": "m", "text": "t", "year": 2020, "metadata": {"url": "u", "tags": ["a"]}}\n'
    )
    document = list(BeirCollection(folder).documents())[-1]
    assert document.metadata == {"year": 2020, "url": "u", "tags": ["a"]}
    copy_beir(BeirCollection(folder), tmp_path / "b")
    assert list(BeirCollection(tmp_path / "b").documents())[-1] == document
    append(folder / "corpus.jsonl", '{"_id": "n", "text": "t", "metadata": 3}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl:\d+: 'metadata' is 3, not an object"):
        list(BeirCollection(folder).documents())
