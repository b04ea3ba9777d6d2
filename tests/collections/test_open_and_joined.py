"""From a spec to a collection, and distractors beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from collection_files import write_beir, write_msmarco

from retrieval_kd.collections import open_collection
from retrieval_kd.collections.beir import BeirCollection
from retrieval_kd.collections.msmarco import MsMarcoCollection
from retrieval_kd.collections.python_docs import PythonDocs
from retrieval_kd.errors import DataError
from retrieval_kd.recipes.schema import CollectionSpec


def test_the_layout_is_detected(tmp_path: Path) -> None:
    """Users name a folder, not a format."""
    assert isinstance(open_collection(CollectionSpec(str(write_beir(tmp_path / "a")))), BeirCollection)
    assert isinstance(open_collection(CollectionSpec(str(write_msmarco(tmp_path / "b")))), MsMarcoCollection)
    assert isinstance(open_collection(CollectionSpec("python-docs")), PythonDocs)


@pytest.mark.parametrize(("name", "part"), [("absent", "no such folder"), (".", "neither of the layouts")])
def test_an_unknown_path_says_which_layouts_there_are(tmp_path: Path, name: str, part: str) -> None:
    """The message is the documentation people read."""
    with pytest.raises(DataError) as error:
        open_collection(CollectionSpec(str(tmp_path / name)))
    assert part in str(error.value)
    for layout in ("corpus.jsonl (BEIR)", "collection.tsv (MS MARCO)", "irds:<ir_datasets id>", "python-docs"):
        assert layout in str(error.value)


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A shell variable that was never set would measure whatever lies below the current folder."""
    monkeypatch.chdir(write_beir(tmp_path / "a"))
    for spec in (CollectionSpec(path), CollectionSpec(".", (path,))):
        with pytest.raises(DataError, match=r"the path '.?' is empty; name a folder"):
            open_collection(spec)
    assert open_collection(CollectionSpec(".")).name == "a"


def test_distractors_join_the_corpus_and_nothing_else(tmp_path: Path) -> None:
    """The same ids in both corpora must stay two documents; only the base's queries count."""
    spec = CollectionSpec(str(write_beir(tmp_path / "base")), (str(write_beir(tmp_path / "other")),))
    joined, base = open_collection(spec), open_collection(CollectionSpec(spec.path))
    assert joined.name == "base+other"
    assert [d.doc_id for d in joined.documents()] == ["d1", "d2", "d3", "other:d1", "other:d2", "other:d3"]
    assert list(joined.contents(["other:d2", "d1"]).items()) == [("other:d2", "dogs bark"), ("d1", "Cats purr a lot")]
    assert joined.queries() == base.queries()
    assert joined.splits() == base.splits()
    assert joined.qrels("test") == base.qrels("test")


def test_the_fingerprint_covers_every_part(tmp_path: Path) -> None:
    """A changed distractor corpus changes every index over the union."""
    base, other = write_beir(tmp_path / "base"), write_beir(tmp_path / "other")
    spec = CollectionSpec(str(base), (str(other),))
    before = open_collection(spec)
    fingerprints = (before.fingerprint, before.corpus_fingerprint)
    (other / "queries.jsonl").write_text('{"_id": "q1", "text": "changed"}\n')
    same = open_collection(spec)
    assert (same.fingerprint, same.corpus_fingerprint) == fingerprints
    (other / "corpus.jsonl").write_text('{"_id": "d1", "text": "changed"}\n')
    changed = open_collection(spec)
    assert changed.fingerprint != fingerprints[0]
    assert changed.corpus_fingerprint != fingerprints[1]
    assert open_collection(CollectionSpec(str(base))).corpus_fingerprint != fingerprints[1]


def test_names_that_clash_are_refused(tmp_path: Path) -> None:
    """Two folders of one name would share a prefix; a collection joined with itself doubles the answers."""
    base, twin = write_beir(tmp_path / "base"), write_beir(tmp_path / "elsewhere/base")
    with pytest.raises(DataError, match="'base' joins twice"):
        open_collection(CollectionSpec(str(base), (str(twin),)))


def test_a_distractor_named_with_white_space_is_refused(tmp_path: Path) -> None:
    """Its name is part of its ids, and a TREC file with such an id reads back as seven columns."""
    base, spaced = write_beir(tmp_path / "base"), write_beir(tmp_path / "my corpus")
    with pytest.raises(DataError, match="'my corpus' has white space"):
        open_collection(CollectionSpec(str(base), (str(spaced),)))


def test_a_base_id_that_looks_like_a_distractor_is_refused(tmp_path: Path) -> None:
    """It would be looked up in the wrong corpus."""
    base = write_beir(tmp_path / "base", {"other:d1": ("", "x")}, qrels={"test": [("q1", "other:d1", 1)]})
    joined = open_collection(CollectionSpec(str(base), (str(write_beir(tmp_path / "other")),)))
    with pytest.raises(DataError, match="document id 'other:d1' could be a distractor's"):
        list(joined.documents())


def test_unknown_ids_are_named(tmp_path: Path) -> None:
    """From whichever corpus the id claims to be."""
    spec = CollectionSpec(str(write_beir(tmp_path / "base")), (str(write_beir(tmp_path / "other")),))
    for doc_id, part in (("d9", "base/corpus.jsonl: no document 'd9'"), ("other:d9", "no document 'd9'")):
        with pytest.raises(DataError) as error:
            open_collection(spec).contents([doc_id])
        assert part in str(error.value)
