"""The ir_datasets adapter, on a dataset registered here: no network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrieval_kd.collections import open_collection
from retrieval_kd.collections.irds import IrdsCollection
from retrieval_kd.errors import DataError
from retrieval_kd.recipes.schema import CollectionSpec

ir_datasets = pytest.importorskip("ir_datasets", reason="ir_datasets is an extra")


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Register pets, pets/train and pets/validation, and take them away again."""
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "home"))
    (tmp_path / "docs.tsv").write_text("d1\tcats purr\nd2\tdogs bark\n")
    names = []

    def register(name: str, queries: str = "", qrels: str = "") -> None:
        files = {"docs_tsv": str(tmp_path / "docs.tsv")}
        for kind, text in (("queries_tsv", queries), ("qrels_trec", qrels)):
            if text:
                path = tmp_path / f"{name.replace('/', '-')}.{kind}"
                path.write_text(text)
                files[kind] = str(path)
        ir_datasets.registry.register(name, ir_datasets.create_dataset(**files))
        names.append(name)

    register("pets")
    register("pets/train", "q1\twhat purrs\n", "q1 0 d1 1\n")
    register("pets/validation", "q2\twhat barks\n", "q2 0 d2 2\n")
    register("pets/test", "q3\tnot judged\n")
    register("pets/bad/test", "q1\twhat purrs\n", "q1 0 d9 1\n")
    yield tmp_path
    for name in names:
        ir_datasets.registry._registered.pop(name)


def test_sub_datasets_become_splits(pets: Path) -> None:
    """A dev set called validation must be found; a part without judgements is no split."""
    collection = open_collection(CollectionSpec("irds:pets"))
    assert collection.name == "irds:pets"
    assert collection.splits() == ("train", "dev")
    assert collection.qrels("dev") == {"q2": {"d2": 2}}
    assert dict(collection.queries()) == {"q1": "what purrs", "q2": "what barks"}
    assert [document.content for document in collection.documents()] == ["cats purr", "dogs bark"]
    assert collection.contents(["d2", "d1"]) == {"d2": "dogs bark", "d1": "cats purr"}


def test_a_leaf_is_one_split_named_after_itself(pets: Path) -> None:
    """``pets/validation`` alone must not be reported as a test split."""
    assert IrdsCollection("pets/validation").splits() == ("dev",)


def test_the_fingerprint_is_of_the_content(pets: Path) -> None:
    """The same id may be fetched again in another version."""
    one, leaf = IrdsCollection("pets"), IrdsCollection("pets/train")
    assert one.corpus_fingerprint == leaf.corpus_fingerprint
    assert one.fingerprint != leaf.fingerprint
    (pets / "docs.tsv").write_text("d1\tcats purr\nd2\tdogs bark!\n")
    assert IrdsCollection("pets").corpus_fingerprint != one.corpus_fingerprint


@pytest.mark.parametrize(
    ("dataset_id", "part"),
    [
        ("pets/trian", "irds:pets/trian: ir_datasets has no such id, did you mean 'pets/train'?"),
        ("pets/test", "irds:pets/test: has no judgements"),
    ],
)
def test_ids_that_are_no_collection(pets: Path, dataset_id: str, part: str) -> None:
    """The library raises a bare KeyError."""
    with pytest.raises(DataError) as error:
        IrdsCollection(dataset_id)
    assert part in str(error.value)


def test_wrong_rows_and_ids_are_named(pets: Path) -> None:
    """Judgements of documents that are not there would lower recall in silence."""
    with pytest.raises(DataError, match="irds:pets/bad/test test qrels: row 1: document 'd9' is not in the corpus"):
        IrdsCollection("pets/bad/test").qrels("test")
    with pytest.raises(DataError, match="no document 'd9'"):
        IrdsCollection("pets").contents(["d9"])
    with pytest.raises(DataError, match="irds:pets: no split 'test'; it has train, dev"):
        IrdsCollection("pets").qrels("test")


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError from within a run tells nobody which extra it is."""
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(DataError, match=r"ir_datasets is not installed; pip install 'retrieval-kd\[eval\]'"):
        IrdsCollection("pets")
