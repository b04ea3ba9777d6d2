"""Filters against a reference in plain Python, and every kind under every selectivity against brute force."""

from __future__ import annotations

import difflib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_helpers import KINDS, Documents, brute_force, clustered, corpus

from index import search as search_module
from index.build import build_index
from index.documents import field_types, record_batch
from index.filters import And, Eq, Filter, In, Not, Or, Range, filter_from_json, matches, terms
from index.search import Searcher
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import DataError, did_you_mean

COUNT = 2000
# A value below SELECTED[name] is held by that share of the documents.
SELECTED = {"50 %": 1000, "10 %": 200, "1 %": 20, "0.1 %": 2, "none": 0}


def reference(wanted: Filter, fields: dict[str, Any]) -> bool:
    """Say what a filter means, in as few words as possible."""
    match wanted:
        case Not():
            return not reference(wanted.filter, fields)
        case And():
            return all(reference(part, fields) for part in wanted.filters)
        case Or():
            return any(reference(part, fields) for part in wanted.filters)
    held = fields.get(wanted.field)
    values = [] if held is None else held if isinstance(held, list) else [held]
    if isinstance(wanted, Range):
        return any(all(_holds(name, value, bound) for name, bound in wanted.bounds.items()) for value in values)
    return any(value in ((wanted.value,) if isinstance(wanted, Eq) else wanted.values) for value in values)


def _holds(name: str, value: Any, bound: Any) -> bool:
    return bool({"gt": value > bound, "ge": value >= bound, "lt": value < bound, "le": value <= bound}[name])


_NUMBERS = st.integers(-3, 3) | st.sampled_from([-1.5, 0.5, 2.0, 2.5])
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "year": st.integers(-3, 3),
    "price": _NUMBERS,
    "open": st.booleans(),
    "language": st.sampled_from(["de", "en", "fr", "", "ü", "\U0001f600"]),
    "tags": st.lists(st.sampled_from(["a", "b", "c"]), max_size=3),
}
_OPERANDS: dict[str, st.SearchStrategy[Any]] = {
    **_VALUES,
    "year": _NUMBERS,
    "tags": st.sampled_from(["a", "b", "c", "d"]),
}
_DOCUMENTS = st.lists(st.fixed_dictionaries({}, optional=_VALUES), min_size=1, max_size=12)
# Types are decided by all values, so one document has one of each.
_FULL = {"year": 1, "price": 0.5, "open": True, "language": "de", "tags": ["a"]}


def _comparisons() -> st.SearchStrategy[Filter]:
    def of(name: str) -> st.SearchStrategy[Filter]:
        operand = _OPERANDS[name]
        equal = st.builds(Eq, st.just(name), operand) | st.builds(
            In, st.just(name), st.lists(operand, min_size=1, max_size=3).map(tuple)
        )
        if name == "open":
            return equal
        bounds = st.fixed_dictionaries({}, optional=dict.fromkeys(("gt", "ge", "lt", "le"), operand)).filter(bool)
        return equal | bounds.map(lambda given: Range(name, **given))

    return st.sampled_from(sorted(_OPERANDS)).flatmap(of)


def _filters() -> st.SearchStrategy[Filter]:
    def wider(inner: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
        some = st.lists(inner, min_size=1, max_size=3).map(tuple)
        return st.builds(Not, inner) | st.builds(And, some) | st.builds(Or, some)

    return st.recursive(_comparisons(), wider, max_leaves=6)


@settings(max_examples=120, deadline=None)
@given(documents=_DOCUMENTS, wanted=_filters())
def test_filters_mean_what_plain_python_says(documents: list[dict[str, Any]], wanted: Filter) -> None:
    """A missing field, a list, an int against a float: each is a place where a column store thinks otherwise."""
    documents = [_FULL, *documents]
    types = field_types(documents, list(_FULL))
    found = matches(wanted, record_batch(documents, types), types)
    assert found.tolist() == [reference(wanted, fields) for fields in documents]


def as_json(wanted: Filter) -> dict[str, Any]:
    match wanted:
        case Not():
            return {"not": as_json(wanted.filter)}
        case And() | Or():
            return {type(wanted).__name__.lower(): [as_json(part) for part in wanted.filters]}
        case Eq():
            return {"eq": {wanted.field: wanted.value}}
        case In():
            return {"in": {wanted.field: list(wanted.values)}}
    return {"range": {wanted.field: wanted.bounds}}


@settings(max_examples=40, deadline=None)
@given(wanted=_filters())
def test_json_gives_the_same_filter(wanted: Filter) -> None:
    """The command line and the server read filters from JSON."""
    assert filter_from_json(as_json(wanted)) == wanted
    assert all(isinstance(term, Eq | In | Range) for term in terms(wanted))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "filter: {} is not an object with one key"),
        ([], "not an object with one key"),
        ({"eq": {"a": 1}, "not": {}}, "not an object with one key"),
        ({"eqq": {"a": 1}}, "key 'eqq', did you mean 'eq'"),
        ({"eq": {"a": None}}, "filter.eq.a: None is neither text, number, true nor false"),
        ({"eq": {"a": [1]}}, r"filter.eq.a: \[1\] is neither"),
        ({"in": {"a": "abc"}}, "filter.in.a: 'abc' is not a list of values"),
        ({"in": {"a": []}}, "filter in on 'a': no values"),
        ({"range": {"a": {}}}, "filter range on 'a': no bounds"),
        ({"range": {"a": 3}}, "filter.range.a: 3 is not an object of bounds"),
        ({"range": {"a": {"gte": 3}}}, "filter.range.a: bound 'gte', did you mean 'gt'"),
        ({"and": []}, "filter and: no filters"),
        ({"or": {"eq": {}}}, "filter.or: .* is not a list of filters"),
        ({"and": [{"eq": {"a": 1}}, {"not": 3}]}, "filter.and.1.not: 3 is not an object"),
    ],
)
def test_malformed_filters_are_refused_by_place(raw: Any, message: str) -> None:
    """A filter that is half understood selects other documents than were asked for."""
    with pytest.raises(DataError, match=message):
        filter_from_json(raw)


@pytest.mark.parametrize("key", ["and", "or", "not"])
def test_a_filter_may_be_as_deep_as_the_limit_says(key: str) -> None:
    """Levels counted by the dots of a place would let lists of filters go half as deep as servers promise."""

    def nested(levels: int) -> dict[str, Any]:
        raw: dict[str, Any] = {"eq": {"a.b": 1}}
        for _ in range(levels - 1):
            raw = {key: raw if key == "not" else [raw]}
        return raw

    assert list(terms(filter_from_json(nested(32)))) == [Eq("a.b", 1)]
    with pytest.raises(DataError, match="more than 32 levels deep"):
        filter_from_json(nested(33))


def test_a_name_too_long_to_be_near_is_compared_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing takes the product of the lengths: two requests of 12 MB held up every other search for ten seconds."""
    monkeypatch.setattr(difflib, "get_close_matches", lambda *_, **__: pytest.fail("compared"))
    assert did_you_mean("year" * 4, ["year"]) == "; known: year"


def test_an_error_lists_no_thousand_names() -> None:
    """Without it a mistyped name of ir_datasets fills the screen with all of its ids."""
    names = [f"collection-{i:04}" for i in range(1041)]
    said = did_you_mean("nope", names)
    assert said.startswith("; known: collection-0000, ")
    assert said.endswith(", collection-0039 and 1,001 more")
    assert did_you_mean("nope", names[:40]).endswith(", collection-0039")


def test_a_filter_of_many_levels_is_refused() -> None:
    """A request of ten thousand brackets would otherwise end the process."""
    raw: dict[str, Any] = {"eq": {"a": 1}}
    for _ in range(10_000):
        raw = {"not": raw}
    with pytest.raises(DataError, match="levels deep"):
        filter_from_json(raw)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Eq("yaer", 1), "no field 'yaer' is stored, did you mean 'year'"),
        (Eq("year", "1"), "field 'year' holds int, so it cannot be compared with '1'"),
        (Eq("year", True), "holds int, so it cannot be compared with True"),
        (Range("language", gt=3), "field 'language' holds text, so it cannot be compared with 3"),
        (In("open", (True, 1)), "field 'open' holds bool, so it cannot be compared with 1"),
        (Eq("odd", "x"), "field 'odd' holds JSON of mixed types"),
    ],
)
def test_filters_that_cannot_be_answered_are_refused(wanted: Filter, message: str) -> None:
    """Comparing a number with text matches nothing, which looks like an answer."""
    documents = [{**_FULL, "odd": 1}, {"odd": "x"}]
    types = field_types(documents, [*_FULL, "odd"])
    with pytest.raises(DataError, match=message):
        matches(wanted, record_batch(documents, types), types)


_EXTREME_INTS = [n + d for n in (0, 2**53, -(2**53), 2**60) for d in (-1, 0, 1)] + [2**63 - 1, 2**63 - 513, -(2**63)]
_EXTREME_FLOATS = [0.0, -0.0, 0.5, 1e-320, 2.0**53, 2.0**53 + 2, -(2.0**60), 2.0**63, 1e16, 1e300, math.inf, -math.inf]
_OPERANDS_BEYOND = [2**63, 2**63 + 1, -(2**63) - 1, 2**64, 2**70, -(2**70), 10**300, -(10**300), 10**308]


@pytest.mark.parametrize("held", [_EXTREME_INTS, _EXTREME_FLOATS], ids=["int", "float"])
@pytest.mark.parametrize("operand", [*_EXTREME_INTS, *_EXTREME_FLOATS, *_OPERANDS_BEYOND])
def test_extreme_numbers_compare_as_in_plain_python(held: list[Any], operand: Any) -> None:
    """Between 64-bit integers and floats a column store rounds one of the two, or gives up with its own error."""
    documents = [{"n": value} for value in held]
    types = field_types(documents, ["n"])
    batch = record_batch(documents, types)
    comparisons = [Range("n", **{name: operand}) for name in ("gt", "ge", "lt", "le")]
    for wanted in (*comparisons, Range("n", ge=operand, le=operand), Eq("n", operand), In("n", (operand, 7))):
        assert matches(wanted, batch, types).tolist() == [reference(wanted, fields) for fields in documents], wanted


@pytest.mark.parametrize("held", [1, 0.5])
@pytest.mark.parametrize("value", [10**400, -(10**5000), math.nan], ids=["large", "huge", "nan"])
def test_numbers_that_nothing_can_be_compared_with_are_refused(held: float, value: float) -> None:
    """Python's own error on them is no message, and to the caller of a service a fault of the server."""
    types = field_types([{"n": held}], ["n"])
    batch = record_batch([{"n": held}], types)
    for wanted in (Eq("n", value), In("n", (1, value)), Range("n", gt=value)):
        with pytest.raises(DataError, match="field 'n' is compared with NaN or an integer beyond all floats"):
            matches(wanted, batch, types)


def test_text_that_is_not_unicode_is_refused() -> None:
    """JSON can escape half of a surrogate pair, which the column store has no bytes for."""
    types = {"t": "text"}
    for wanted in (Eq("t", "\ud800"), Range("t", gt="\ud800")):
        with pytest.raises(DataError, match="field 't' cannot be compared"):
            matches(wanted, record_batch([{"t": "a"}], types), types)


@dataclass(frozen=True)
class Filtered:
    name: str
    searcher: Searcher
    places: np.ndarray
    documents: EncodedCorpus


@pytest.fixture(scope="module", params=list(KINDS))
def filtered(request: pytest.FixtureRequest) -> Iterator[Filtered]:
    documents = corpus(clustered(1, COUNT, 32))
    places = np.random.default_rng(4).permutation(COUNT)
    collection = Documents({doc_id: {"place": int(p)} for doc_id, p in zip(documents.ids, places, strict=True)})
    with tempfile.TemporaryDirectory() as folder:
        build_index(
            collection.owned(documents), KINDS[request.param], Path(folder), collection=collection, fields=["place"]
        )
        with Searcher.open(Path(folder)) as searcher:
            yield Filtered(request.param, searcher, places, documents)


@pytest.mark.parametrize("selected", SELECTED.values(), ids=SELECTED)
def test_filtered_is_brute_force_over_the_selected(filtered: Filtered, selected: int) -> None:
    """A filtered walk that stops early returns fewer documents, or others, and nobody can tell."""
    asked = clustered(7, 12, 32)
    wanted = Range("place", lt=selected)
    rankings = filtered.searcher.search(asked, 10, filter=wanted)
    chosen = {filtered.documents.ids[i] for i in np.flatnonzero(filtered.places < selected)}
    for ranking, whole in zip(rankings, filtered.searcher.search(asked, COUNT, exact=True), strict=True):
        assert list(ranking.doc_ids) == [doc_id for doc_id in whole.doc_ids if doc_id in chosen][:10]
    if filtered.searcher.storage == "float32":
        everything = brute_force(filtered.documents, asked[0], COUNT)
        assert list(rankings[0].doc_ids) == [doc_id for doc_id in everything if doc_id in chosen][:10]


@pytest.mark.parametrize("selected", SELECTED.values(), ids=SELECTED)
def test_filters_pushed_into_the_kind_find_what_brute_force_does(
    filtered: Filtered, selected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the exact threshold a kind looks around the filter, and must still find nearly all and nothing else."""
    asked = clustered(7, 40, 32)
    wanted = Range("place", lt=selected)
    expected = filtered.searcher.search(asked, 10, filter=wanted)
    monkeypatch.setattr(search_module, "_SCORED_OUTRIGHT", 0)
    monkeypatch.setattr(search_module, "_BUDGET", 0)
    rankings = filtered.searcher.search(asked, 10, filter=wanted)
    chosen = {filtered.documents.ids[i] for i in np.flatnonzero(filtered.places < selected)}
    found = 0
    for ranking, exact in zip(rankings, expected, strict=True):
        assert set(ranking.doc_ids) <= chosen
        assert len(ranking) == len(exact)
        found += len(set(ranking.doc_ids) & set(exact.doc_ids))
        if filtered.name.startswith("exact"):
            assert ranking.doc_ids == exact.doc_ids
    assert found >= 0.97 * sum(map(len, expected))
    alone = [filtered.searcher.search(query[None], 10, filter=wanted)[0] for query in asked]
    assert [ranking.doc_ids for ranking in alone] == [ranking.doc_ids for ranking in rankings]


def test_exact_with_a_filter_scans_only_what_matches(filtered: Filtered, monkeypatch: pytest.MonkeyPatch) -> None:
    """``exact`` and ``filter`` together are each other's easiest mistake."""
    monkeypatch.setattr(search_module, "_SCORED_OUTRIGHT", 0)
    monkeypatch.setattr(search_module, "_BUDGET", 0)
    asked = clustered(8, 5, 32)
    for selected in (1000, 3):
        wanted = Range("place", lt=selected)
        one = filtered.searcher.search(asked, 10, filter=wanted, exact=True)
        monkeypatch.setattr(search_module, "_SCORED_OUTRIGHT", 10_000)
        other = filtered.searcher.search(asked, 10, filter=wanted)
        monkeypatch.setattr(search_module, "_SCORED_OUTRIGHT", 0)
        assert [ranking.doc_ids for ranking in one] == [ranking.doc_ids for ranking in other]
        assert all(a.scores.tobytes() == b.scores.tobytes() for a, b in zip(one, other, strict=True))


def test_an_index_without_fields_says_so(tmp_path: Path) -> None:
    """Filtering nothing away would answer another question."""
    build_index(corpus(clustered(1, 20, 4)), KINDS["exact"], tmp_path)
    with (
        Searcher.open(tmp_path) as searcher,
        pytest.raises(DataError, match="stores no fields"),
    ):
        searcher.search(clustered(1, 1, 4), 3, filter=Eq("year", 1))
