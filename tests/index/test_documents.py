from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_helpers import Documents, clustered, corpus

from index import documents as documents_module
from index.build import build_index
from index.documents import field_types, record_batch
from index.filters import Eq
from index.search import Searcher
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.recipes.schema import IndexSpec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "_BATCH_ROWS", 3)


def opened(folder: Path, fields: dict[str, dict[str, Any]], names: list[str]) -> Searcher:
    vectors = corpus(clustered(1, len(fields), 4), ids=list(fields))
    collection = Documents(fields)
    build_index(collection.owned(vectors), IndexSpec(), folder, collection=collection, fields=names)
    return Searcher.open(folder)


def test_stored_fields_are_no_part_of_an_indexs_size_for_each_document(tmp_path: Path) -> None:
    """Without it an index that also stores long texts would look like a worse one in every comparison."""
    fields = {f"d{i}": {"text": "word " * 100} for i in range(9)}
    with opened(tmp_path / "with", fields, ["text"]) as stored, opened(tmp_path / "without", fields, []) as plain:
        assert stored.bytes_per_doc == plain.bytes_per_doc > 0


@settings(max_examples=25, deadline=None)
@given(values=st.lists(JSON, min_size=1, max_size=9))
def test_whatever_json_holds_comes_back(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    """A column of one type that swallows another turns 1 into 1.0, or true into 1, on its way to the user."""
    fields = {f"d{i}": {"value": value} for i, value in enumerate([*values, "x"])}
    if any(isinstance(value, float) for value in values) and any(type(value) is int for value in values):
        fields["e"] = {"value": "no column of numbers"}
    with opened(tmp_path_factory.mktemp("store"), fields, ["value"]) as searcher:
        found = searcher.fields(list(fields), ["value"])
        for got, held in zip(found, fields.values(), strict=True):
            assert json.dumps(got) == json.dumps({} if held["value"] is None else held)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([True, False, None], "bool"),
        ([1, 2**63 - 1], "int"),
        ([1, 2**63], "json"),
        ([1, 0.5], "float"),
        (["a", ""], "text"),
        ([True, 1], "json"),
        (["a", 1], "json"),
        ([["a"], []], "list of text"),
        ([[], [1]], "list of int"),
        ([[1], [0.5]], "list of float"),
        ([[]], "list of text"),
        ([["a"], [1]], "json"),
        ([["a"], "a"], "json"),
        ([[["a"]]], "json"),
        ([{"a": 1}], "json"),
    ],
)
def test_types_follow_from_all_values(values: list[Any], expected: str) -> None:
    """A type guessed from the first document refuses or mangles the millionth."""
    assert field_types([{"v": value} for value in values], ["v"]) == {"v": expected}


def test_fields_are_those_of_the_document_asked_for(tmp_path: Path) -> None:
    """Documents stream in another order than their ids; an index that mixes the two shows strangers' titles."""
    fields = {f"d{i:02d}": {"title": f"title {i}", "text": "", "year": 2000 + i} for i in range(11)}
    del fields["d04"]["year"]
    with opened(tmp_path, fields, ["title", "text", "year"]) as searcher:
        asked = list(np.random.default_rng(1).permutation(list(fields)))
        assert searcher.fields(asked, ["year", "title"]) == [
            {key: fields[doc_id][key] for key in ("year", "title") if key in fields[doc_id]} for doc_id in asked
        ]
        assert searcher.fields(["d04"], ["text"]) == [{"text": ""}]
        assert searcher.fields([], ["text"]) == []
        assert searcher.fields(["d01"], []) == [{}]
        assert searcher.field_types == {"title": "text", "text": "text", "year": "int"}
        with pytest.raises(DataError, match="no field 'yaer' is stored, did you mean 'year'"):
            searcher.fields(["d01"], ["yaer"])
        with pytest.raises(DataError, match="no document 'd99'"):
            searcher.fields(["d01", "d99"], ["year"])


def test_without_fields_nothing_is_stored(tmp_path: Path) -> None:
    """Texts in an index that nobody asked for are a leak."""
    vectors = corpus(clustered(1, 20, 4))
    version = build_index(vectors, IndexSpec(), tmp_path)
    assert not (version / "docs.arrow").exists()
    with Searcher.open(tmp_path) as searcher:
        assert searcher.fields(["d00001"], []) == [{}]
        with pytest.raises(DataError, match="no field 'title' is stored; the index was built without --fields"):
            searcher.fields(["d00001"], ["title"])


def test_documents_that_are_not_those_encoded_are_refused(tmp_path: Path) -> None:
    """Fields of another corpus beside the right vectors look right."""
    vectors, collection = corpus(clustered(1, 3, 4), ids=["a", "b", "c"]), Documents({"a": {}, "b": {}, "c": {}})
    with pytest.raises(DataError, match="the collection is not the one that was encoded"):
        build_index(vectors, IndexSpec(), tmp_path, collection=collection, fields=["title"])
    with pytest.raises(DataError, match="the collection is not the one that was encoded"):
        build_index(vectors, IndexSpec(), tmp_path, fields=["title"])
    for fields, message in (
        ({"a": {}, "b": {}, "z": {}}, "document 'z' is not among the vectors"),
        ({"a": {}, "b": {}}, "document 'c' has a vector but no fields"),
    ):
        other = Documents(fields)
        with pytest.raises(DataError, match=message):
            build_index(other.owned(vectors), IndexSpec(), tmp_path, collection=other, fields=["title"])
    owned = collection.owned(vectors)
    with pytest.raises(DataError, match="no document of documents has 'titel', did you mean 'title'"):
        build_index(owned, IndexSpec(), tmp_path, collection=collection, fields=["titel"])
    empty = Documents({name: {"year": None} for name in "abc"})
    with pytest.raises(DataError, match="--fields: 'year' is null in every document of documents; leave it out"):
        build_index(empty.owned(vectors), IndexSpec(), tmp_path, collection=empty, fields=["year"])


@pytest.mark.parametrize("name", ["docs.arrow", "positions.npy", "ids.arrow", "scales.npy"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_of_the_optional_files_is_found_and_named(tmp_path: Path, name: str, damage: str) -> None:
    """A flipped bit in a stored text or a scale is served as if it had been written."""
    fields = {f"d{i:02d}": {"title": f"title {i}"} for i in range(20)}
    vectors, collection = corpus(clustered(1, 20, 4), ids=list(fields)), Documents(fields)
    spec = IndexSpec(storage="sq8")
    version = build_index(collection.owned(vectors), spec, tmp_path, collection=collection, fields=["title"])
    path = version / name
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-1] if damage == "truncate" else content)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        Searcher.open(tmp_path)


@pytest.mark.parametrize("holds", ["text", "json", "list of text"])
def test_text_that_is_no_unicode_is_refused(holds: str) -> None:
    """JSON can escape half a character, which no file takes."""
    value = {"text": "\ud800", "json": {"a": "\ud800"}, "list of text": ["\ud800"]}[holds]
    with pytest.raises(DataError, match="field 'title': a value is not valid Unicode"):
        record_batch([{"title": value}], {"title": holds})


@pytest.mark.parametrize("value", [10**16, 2**60, int(1e300), -(2**53) - 2])
def test_whole_numbers_of_any_size_are_floats_among_floats(tmp_path: Path, value: int) -> None:
    """JSON and the wire write 1e16 as an integer, which the column store does not take beyond 53 bits."""
    with opened(tmp_path, {"a": {"price": 0.5}, "b": {"price": 1e16}}, ["price"]) as searcher:
        searcher.upsert(["c", "d"], clustered(2, 2, 4), [{"price": value}, {"price": 3}])
        assert searcher.fields(["b", "c", "d"], ["price"]) == [{"price": 1e16}, {"price": float(value)}, {"price": 3.0}]
        found = searcher.search(clustered(2, 1, 4), 5, filter=Eq("price", value))
        assert "c" in found[0].doc_ids
    assert record_batch([{"n": [10**16, 0.5]}], {"n": "list of float"}).column("n").to_pylist() == [[1e16, 0.5]]


@pytest.mark.parametrize(("value", "named"), [(2**53 + 1, "9007199254740993"), (10**400, "integer of 1329 bits")])
@pytest.mark.parametrize("listed", [False, True])
def test_a_number_that_no_float_equals_is_refused_among_floats(value: int, named: str, listed: bool) -> None:
    """Rounded in silence it is another number, and the column store's own error names no field."""
    types = {"n": "list of float" if listed else "float"}
    with pytest.raises(DataError, match=f"field 'n' holds float, and no float is exactly .*{named}"):
        record_batch([{"n": [value] if listed else value}], types)


def test_a_build_of_numbers_that_no_type_holds_says_so(tmp_path: Path) -> None:
    """Half an hour into a build, a traceback of the column store tells nobody which field to mend."""
    with pytest.raises(DataError, match="field 'n' holds float, and no float is exactly 9007199254740993"):
        opened(tmp_path, {"a": {"n": 0.5}, "b": {"n": 2**53 + 1}}, ["n"])
