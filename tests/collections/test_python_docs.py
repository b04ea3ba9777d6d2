"""The demo collection: what becomes a query, what its document, and that both are the same every time."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from retrieval_kd.collections import python_docs
from retrieval_kd.collections.base import normalised, training_queries
from retrieval_kd.collections.python_docs import MAX_DOCUMENTS, MAX_TEXT, PythonDocs, split_docstring
from retrieval_kd.errors import DataError

BODY = "The rest explains at some length what happens when the input is empty, torn, or far too long for it."
STDLIB = Path(sysconfig.get_path("stdlib"))


def package(tmp_path: Path, **modules: str) -> PythonDocs:
    for name, source in modules.items():
        path = tmp_path / "src" / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return PythonDocs({"pkg": tmp_path / "src"})


def function(name: str, summary: str, body: str = BODY) -> str:
    return f'def {name}(a, *, b=1):\n    """{summary}\n\n    {body}\n    """\n'


@pytest.mark.parametrize(
    ("docstring", "summary", "rest"),
    [
        ("Sum the parts.\n\nMore.", "Sum the parts", "More."),
        ("Sum the parts. Then more.\n\nEven more.", "Sum the parts", "Then more. Even more."),
        ("Sum two\nlines of it.\n\nMore.", "Sum two lines of it", "More."),
        ("relu(input) -> Tensor\n\nApply it to all. Yes.", "Apply it to all", "Yes."),
        ("Take e.g. this one. Not that.", "Take e.g. this one", "Not that."),
        ("Return version 1.5 of it.\n\nMore.", "Return version 1.5 of it", "More."),
        ("Sum the parts.\n\nNote: SUM  the\nparts. Really.", "Sum the parts", "Note: Really."),
        ("Make a :class:`~torch.Tensor` of ``x``.\n\nMore.", "Make a torch.Tensor of x", "More."),
        ("Arguments:\n\nMore.", "Arguments", "More."),
        ("", "", ""),
        ("f(x)", "", ""),
    ],
)
def test_the_summary_is_split_from_the_rest(docstring: str, summary: str, rest: str) -> None:
    """A summary left in the document makes retrieval a string match."""
    assert split_docstring(docstring) == (summary, rest)


def test_long_texts_are_cut_between_words() -> None:
    """A document cut inside a word ends in a token that no query has."""
    _, rest = split_docstring("Summary of it all.\n\n" + "word " * 500)
    assert len(rest) <= MAX_TEXT
    assert set(rest.split()) == {"word"}


def test_public_members_with_enough_to_say(tmp_path: Path) -> None:
    """Private, nested and test code, short texts and boilerplate are not what people search for."""
    collection = package(
        tmp_path,
        good=function("public", "Sum all the parts given.")
        + function("_private", "Sum the private parts given.")
        + function("short", "Sum the short parts given.", "Too short.")
        + function("terse", "Sum.")
        + function("boilerplate", "Return self with all its parts.")
        + "class Box:\n    'Hold things in one place.'\n"
        + "".join(
            f"    {line}\n" for line in function("open", "Open the box for its owner.", BODY + " Boxed.").splitlines()
        )
        + "def outer():\n"
        + "".join(f"    {line}\n" for line in function("inner", "Sum the inner parts given.").splitlines()),
        _hidden=function("f", "Sum the hidden parts given."),
        tests__in__mod=function("f", "Sum the tested parts given."),
        broken="def f(:\n",
    )
    documents = {document.doc_id: document for document in collection.documents()}
    assert set(documents) == {"pkg.good.public", "pkg.good.Box.open"}
    assert documents["pkg.good.public"].content == f"pkg.good.public(a, *, b=1) {BODY}"
    assert collection.queries()["q:pkg.good.Box.open"] == "Open the box for its owner"


def test_code_is_read_and_never_run(tmp_path: Path) -> None:
    """Importing what is installed runs it, takes minutes and may do anything."""
    source = "raise SystemExit('ran')\nimport torch\n" + function("f", "Sum all the parts given.")
    assert [d.doc_id for d in package(tmp_path, mod=source).documents()] == ["pkg.mod.f"]


def test_the_same_text_or_query_counts_once(tmp_path: Path) -> None:
    """Two documents that answer one query, of which one is judged wrong, would punish a right answer."""
    other = BODY.replace("length", "LENGTH  still")
    collection = package(
        tmp_path,
        b=function("f", "Sum all the parts given.", other) + function("g", "Join all the parts given."),
        a=function("f", "sum ALL the parts given.") + function("g", "Sum all the parts given."),
    )
    assert [document.doc_id for document in collection.documents()] == ["pkg.a.f"]


def test_the_cap_keeps_a_stable_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which documents stay must not hang on which others there are, beyond making room."""
    sources = {f"m{i}": function("f", f"Sum all the {i} parts given.", f"{BODY} {i}") for i in range(30)}
    monkeypatch.setattr(python_docs, "MAX_DOCUMENTS", 10)
    small = {document.doc_id for document in package(tmp_path, **sources).documents()}
    monkeypatch.setattr(python_docs, "MAX_DOCUMENTS", 11)
    larger = {document.doc_id for document in package(tmp_path, **sources).documents()}
    assert len(small) == 10
    assert small < larger


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    """An embedded Python without sources would give an empty table of results."""
    with pytest.raises(DataError, match="no docstrings in 1 source files"):
        list(package(tmp_path, mod="x = 1\n").documents())


@pytest.fixture(scope="module")
def asyncio_docs() -> PythonDocs:
    return PythonDocs({"": STDLIB / "asyncio", "concurrent": STDLIB / "concurrent", "email": STDLIB / "email"})


def test_every_query_has_one_document_and_one_split(asyncio_docs: PythonDocs) -> None:
    """The splits must part the queries; each judged id must exist."""
    judged: dict[str, str] = {}
    for split in asyncio_docs.splits():
        for query_id, grades in asyncio_docs.qrels(split).items():
            assert query_id not in judged
            ((doc_id, grade),) = grades.items()
            assert grade == 1
            judged[query_id] = doc_id
    assert set(judged) == set(asyncio_docs.queries())
    assert set(judged.values()) == {document.doc_id for document in asyncio_docs.documents()}
    assert set(training_queries(asyncio_docs)) == set(asyncio_docs.qrels("train"))


def test_no_document_contains_its_query(asyncio_docs: PythonDocs) -> None:
    """The definition of the task, on real docstrings."""
    texts = {document.doc_id: normalised(document.text) for document in asyncio_docs.documents()}
    for query_id, query in asyncio_docs.queries().items():
        assert normalised(query) not in texts[query_id.removeprefix("q:")]


def test_unknown_ids_and_splits(asyncio_docs: PythonDocs) -> None:
    """As every collection."""
    with pytest.raises(DataError, match="python-docs: no document 'nope'"):
        asyncio_docs.contents(["nope"])
    with pytest.raises(DataError, match="python-docs: no split 'dve'; it has train, dev, test"):
        asyncio_docs.qrels("dve")


def test_the_same_in_every_process(asyncio_docs: PythonDocs) -> None:
    """An order taken from a set changes with the hash seed, and so would every cache key."""
    script = (
        "import sys, sysconfig; from pathlib import Path; from retrieval_kd.collections.python_docs import PythonDocs;"
        "lib = Path(sysconfig.get_path('stdlib'));"
        "c = PythonDocs({'': lib / 'asyncio', 'concurrent': lib / 'concurrent', 'email': lib / 'email'});"
        "sys.stdout.write(c.fingerprint);"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'bm25s', 'ir_datasets'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for seed in ("0", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == asyncio_docs.fingerprint


@pytest.mark.slow
def test_the_installed_collection_is_of_the_size_it_says() -> None:
    """The demo's time rests on the cap; too few documents would make the task a guess."""
    collection = PythonDocs()
    documents = list(collection.documents())
    assert 1_500 <= len(documents) <= MAX_DOCUMENTS
    assert 300 <= sum(len(document.content) for document in documents) / len(documents) <= 800
    shares = {split: len(collection.qrels(split)) / len(documents) for split in collection.splits()}
    assert shares == pytest.approx({"train": 0.8, "dev": 0.08, "test": 0.12}, abs=0.02)
