"""Updates between builds: durable, visible at once, and folded in; a log torn at every byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_helpers import KINDS, Documents, brute_force, card, clustered, corpus

from index import delta as delta_module
from index import updates as updates_module
from index.build import build_index, retune
from index.delta import Delta
from index.filters import Eq, Filter, Range
from index.search import Searcher
from index.store import IndexStore
from index.updates import UPDATES, Update, UpdateLog, summed
from index.vectors import StoredVectors
from index.verify import inspect, verify
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.recipes.schema import IndexSpec

TESTS = Path(__file__).resolve().parents[1]
BASE = corpus(clustered(1, 200, 8))
NEWS = clustered(5, 40, 8)
ASKED = clustered(7, 15, 8)


def log_of(searcher: Searcher, store: Path) -> UpdateLog:
    return UpdateLog.of(store, searcher.version)


def with_changes(documents: EncodedCorpus, upserts: dict[str, np.ndarray], deleted: set[str]) -> EncodedCorpus:
    """Return the corpus as it would be had it always been so."""
    all_vectors = {**dict(zip(documents.ids, documents.vectors, strict=True)), **upserts}
    kept = {doc_id: vector for doc_id, vector in all_vectors.items() if doc_id not in deleted}
    return corpus(np.stack(list(kept.values())), ids=list(kept))


@pytest.mark.parametrize("name", KINDS)
def test_searching_after_updates_is_searching_the_changed_corpus(name: str, tmp_path: Path) -> None:
    """A replaced document found by its old vector, or a deleted one found at all, is a broken promise."""
    build_index(BASE, KINDS[name], tmp_path)
    with Searcher.open(tmp_path) as searcher:
        gone = set(BASE.ids[5:60:5])
        searcher.upsert([*BASE.ids[:10], *(f"e{i}" for i in range(10))], NEWS[:20])
        searcher.delete(sorted({*gone, "e3", "never-there"}))
        searcher.upsert(["e3", BASE.ids[5]], NEWS[20:22])
        upserts = dict(zip([*BASE.ids[:10], *(f"e{i}" for i in range(10))], NEWS[:20], strict=True))
        upserts |= {"e3": NEWS[20], BASE.ids[5]: NEWS[21]}
        expected = with_changes(BASE, upserts, gone - {BASE.ids[5]})
        assert searcher.count == len(expected.ids)
        found = searcher.search(ASKED, 10)
        together = searcher.search(ASKED, 300)
        for query, ranking, whole in zip(ASKED, found, together, strict=True):
            assert set(whole.doc_ids) == set(expected.ids)
            right = brute_force(expected, query, 10)
            if searcher.storage == "float32":
                assert len(set(ranking.doc_ids) & set(right)) >= (10 if name == "exact" else 9)
                assert list(whole.doc_ids) == brute_force(expected, query, 300)
            assert ranking.doc_ids == searcher.search(query[None], 10)[0].doc_ids
            assert not set(ranking.doc_ids) & (gone - {BASE.ids[5]})


MANY = corpus(clustered(1, 2000, 32))
MANY_ASKED = clustered(7, 12, 32)


def opened_with_places(folder: Path, name: str) -> Searcher:
    collection = Documents({doc_id: {"place": i} for i, doc_id in enumerate(MANY.ids)})
    build_index(collection.owned(MANY), KINDS[name], folder, collection=collection, fields=["place"])
    return Searcher.open(folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_deleted_document_does_not_make_every_search_read_all_vectors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One update made each search of a small index twenty times as slow: all that was left was scored."""
    read = [0]
    rows = StoredVectors.rows

    def counted(self: StoredVectors, wanted: Any) -> np.ndarray:
        found = rows(self, wanted)
        read[0] += len(found)
        return found

    def rows_read(wanted: Filter | None) -> int:
        read[0] = 0
        searcher.search(MANY_ASKED[:1], 10, filter=wanted)
        return read[0]

    monkeypatch.setattr(StoredVectors, "rows", counted)
    with opened_with_places(tmp_path, name) as searcher:
        most = Range("place", ge=20)
        before = rows_read(None)
        assert before < len(MANY.ids) / 2
        assert rows_read(most) < 1.3 * before + 50
        searcher.delete([MANY.ids[1000]])
        assert rows_read(None) < 1.05 * before + 10
        assert rows_read(most) < 1.3 * before + 50
        searcher.delete(MANY.ids[0:2000:40])
        assert rows_read(None) < 1.3 * before + 50
        few = Range("place", lt=20)
        assert {*searcher.search(MANY_ASKED[:1], 2000, filter=few)[0].doc_ids} == {*MANY.ids[1:20]}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("gone", [8, 90, 700])
def test_where_the_nearest_were_deleted_the_next_are_found(name: str, gone: int, tmp_path: Path) -> None:
    """A topic is deleted as a whole, and all that a kind proposes for a question on it is among the deleted."""
    with opened_with_places(tmp_path, name) as searcher:
        deleted = {doc_id for best in searcher.search(MANY_ASKED[:3], gone, exact=True) for doc_id in best.doc_ids}
        searcher.delete(sorted(deleted))
        living = with_changes(MANY, {}, deleted)
        together = searcher.search(MANY_ASKED, 10)
        found = 0
        for query, ranking in zip(MANY_ASKED, together, strict=True):
            assert len(ranking) == 10
            assert not deleted.intersection(ranking.doc_ids)
            alone = searcher.search(query[None], 10)[0]
            assert (alone.doc_ids, alone.scores.tobytes()) == (ranking.doc_ids, ranking.scores.tobytes())
            (exact,) = searcher.search(query[None], 10, exact=True)
            if searcher.storage == "float32":
                assert list(exact.doc_ids) == brute_force(living, query, 10)
            if name.startswith("exact"):
                assert ranking.doc_ids == exact.doc_ids
            found += len({*exact.doc_ids} & {*ranking.doc_ids})
        assert found >= 0.97 * 10 * len(MANY_ASKED)


def test_updates_are_there_after_reopening_and_in_other_searchers(tmp_path: Path) -> None:
    """What only the process that wrote it can see is neither durable nor shared by the workers of one server."""
    build_index(BASE, IndexSpec(), tmp_path)
    with Searcher.open(tmp_path) as writer, Searcher.open(tmp_path) as other:
        writer.upsert(["new"], ASKED[:1])
        assert other.search(ASKED[:1], 1)[0].doc_ids == ("new",)
        other.delete(["new"])
        assert writer.search(ASKED[:1], 1)[0].doc_ids != ("new",)
        writer.upsert(["newer"], ASKED[:1])
    with Searcher.open(tmp_path) as again:
        assert again.search(ASKED[:1], 1)[0].doc_ids == ("newer",)
        again.self_test()
    assert inspect(tmp_path)["updates"] == 2


def opened_with_fields(folder: Path, storage: list[str] | None = None) -> tuple[Searcher, EncodedCorpus, Documents]:
    fields = {
        doc_id: {"title": f"title of {doc_id}", "year": 2000 + i % 5, "price": i / 2}
        for i, doc_id in enumerate(BASE.ids)
    }
    collection = Documents(fields)
    owned = collection.owned(BASE)
    build_index(owned, IndexSpec(), folder, collection=collection, fields=storage or ["title", "year"])
    return Searcher.open(folder), owned, collection


def test_fields_and_filters_follow_the_updates(tmp_path: Path) -> None:
    """A filter that still sees the old year of a replaced document, or an old title shown with a new vector."""
    searcher, _, _ = opened_with_fields(tmp_path)
    searcher.upsert([BASE.ids[0], "new"], ASKED[:2], [{"title": "changed", "year": 1999, "text": "not kept"}, {}])
    assert searcher.fields(["new", BASE.ids[0], BASE.ids[1]], ["year", "title"]) == [
        {},
        {"year": 1999, "title": "changed"},
        {"year": 2001, "title": f"title of {BASE.ids[1]}"},
    ]
    assert searcher.search(ASKED[:1], 5, filter=Eq("year", 1999))[0].doc_ids == (BASE.ids[0],)
    assert BASE.ids[0] not in searcher.search(ASKED[:1], 300, filter=Eq("year", 2000))[0].doc_ids
    searcher.delete([BASE.ids[0]])
    assert len(searcher.search(ASKED[:1], 5, filter=Eq("year", 1999))[0]) == 0
    with pytest.raises(DataError, match=f"no document '{BASE.ids[0]}'"):
        searcher.fields([BASE.ids[0]], ["year"])


@pytest.mark.parametrize(
    ("ids", "vectors", "fields", "message"),
    [
        (["a"], NEWS[:1, :7], None, r"vectors of shape \(1, 7\)"),
        (["a", "b"], NEWS[:1], None, "2 ids, vectors of shape"),
        (["a"], NEWS[:1], [{}, {}], "2 sets of fields"),
        (["a", "a"], NEWS[:2], None, "document 'a' comes twice"),
        ([""], NEWS[:1], None, "id is empty"),
        (["a b"], NEWS[:1], None, "white space"),
        (["a"], NEWS[:1] * np.nan, None, "text 'a': its vector is not finite"),
        (["a"], NEWS[:1], [{"year": "soon"}], "field 'year' holds int"),
        (["a"], NEWS[:1], [{"yaer": 3}], "no field 'yaer' is stored, did you mean 'year'"),
        (["a"], NEWS[:1], [{"title": "\ud800"}], "not valid Unicode"),
        (["a"], NEWS[:1], [{"price": float("nan")}], "a field holds NaN or infinity"),
    ],
)
def test_unusable_updates_change_nothing(
    tmp_path: Path, ids: list[str], vectors: np.ndarray, fields: list[dict[str, Any]] | None, message: str
) -> None:
    """A log with a record that cannot be read again would make every later start fail."""
    searcher, _, _ = opened_with_fields(tmp_path, ["title", "year", "price"])
    with pytest.raises(DataError, match=message):
        searcher.upsert(ids, vectors, fields)
    assert log_of(searcher, tmp_path).state[1] == 0
    assert searcher.count == len(BASE.ids)


def test_vectors_of_another_length_are_refused_under_a_card_that_normalises(tmp_path: Path) -> None:
    """A vector twice as long is the best answer to every question."""
    from dataclasses import replace

    unit = replace(BASE, card=replace(BASE.card, normalize=True))
    build_index(unit, IndexSpec(), tmp_path)
    with Searcher.open(tmp_path) as searcher, pytest.raises(DataError, match="not of unit length"):
        searcher.upsert(["a"], NEWS[:1] * 2)


def test_only_the_current_version_takes_updates(tmp_path: Path) -> None:
    """An update to a version that nobody opens any more would be acknowledged and lost."""
    build_index(BASE, IndexSpec(), tmp_path)
    with Searcher.open(tmp_path) as old:
        build_index(BASE, IndexSpec("hnsw"), tmp_path)
        with pytest.raises(ArtifactError, match="is current, not 0000000001-"):
            old.upsert(["a"], NEWS[:1])


def test_the_next_build_folds_updates_in_and_the_one_after_keeps_them(tmp_path: Path) -> None:
    """A nightly build from a corpus that does not know of the updates would silently undo them."""
    searcher, owned, collection = opened_with_fields(tmp_path)
    names = ["title", "year"]
    searcher.upsert([BASE.ids[3], "new"], ASKED[:2], [{"title": "changed", "year": 1}, {"year": 2}])
    searcher.delete([BASE.ids[4]])
    before = searcher.search(ASKED, 300)
    second = build_index(owned, IndexSpec(), tmp_path, collection=collection, fields=names)
    assert second.name != searcher.version
    with Searcher.open(tmp_path) as folded:
        assert folded.count == len(BASE.ids) == searcher.count
        assert all(a.doc_ids == b.doc_ids for a, b in zip(folded.search(ASKED, 300), before, strict=True))
        assert all(
            a.scores.tobytes() == b.scores.tobytes() for a, b in zip(folded.search(ASKED, 300), before, strict=True)
        )
        assert folded.fields(["new", BASE.ids[3]], names) == [{"year": 2}, {"title": "changed", "year": 1}]
        assert log_of(folded, tmp_path).state[1] == 0
        assert build_index(owned, IndexSpec(), tmp_path, collection=collection, fields=names) == second
        folded.upsert(["newest"], NEWS[:1])
    third = build_index(owned, IndexSpec("hnsw"), tmp_path, collection=collection, fields=names)
    with Searcher.open(third) as folded:
        assert folded.fields(["new", "newest"], ["year"]) == [{"year": 2}, {}]
        assert folded.count == len(BASE.ids) + 1
    fresh = build_index(owned, IndexSpec(), tmp_path, collection=collection, fields=names, discard_updates=True)
    with Searcher.open(fresh) as bare:
        assert bare.fields([BASE.ids[3], BASE.ids[4]], ["year"]) == [{"year": 2003}, {"year": 2004}]
        assert bare.count == len(BASE.ids)
    assert searcher.count == len(BASE.ids)
    assert len(verify(tmp_path)) == 3


def test_updates_that_come_while_a_build_runs_are_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build takes minutes; what is acknowledged meanwhile must be in the version that follows."""
    build_index(BASE, IndexSpec(), tmp_path)
    searcher = Searcher.open(tmp_path)
    searcher.upsert(["early"], ASKED[:1])
    write = IndexStore._seal

    def sealing(self: IndexStore, *arguments: Any) -> str:
        searcher.upsert(["late"], ASKED[1:2])
        searcher.delete(["early"])
        return write(self, *arguments)

    monkeypatch.setattr(IndexStore, "_seal", sealing)
    build_index(BASE, IndexSpec("hnsw"), tmp_path)
    with Searcher.open(tmp_path) as after:
        assert after.version != searcher.version
        assert after.search(ASKED[1:2], 1)[0].doc_ids == ("late",)
        assert "early" not in after.search(ASKED[:1], 300)[0].doc_ids
        assert inspect(tmp_path)["updates"] == 2
        monkeypatch.undo()
        retuned = retune(tmp_path, corpus(ASKED), 0.5)
        with Searcher.open(retuned) as again:
            assert again.search(ASKED[1:2], 1)[0].doc_ids == ("late",)


def during_the_build(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Let something happen just before the next version's files are sealed, once."""
    seal = IndexStore._seal

    def sealing(self: IndexStore, *arguments: Any) -> str:
        monkeypatch.setattr(IndexStore, "_seal", seal)
        work()
        return seal(self, *arguments)

    monkeypatch.setattr(IndexStore, "_seal", sealing)


def two_versions(store: Path) -> tuple[Path, Path]:
    """Return an older version with an update of its own and the current one, which has it folded in."""
    first = build_index(BASE, IndexSpec(), store)
    with Searcher.open(store) as searcher:
        searcher.upsert(["first"], ASKED[:1])
    return first, build_index(BASE, IndexSpec(), store)


def upsert(store: Path, doc_id: str) -> None:
    with Searcher.open(store) as searcher:
        searcher.upsert([doc_id], NEWS[:1])


def test_updates_to_a_version_that_became_current_during_the_build_are_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the log of the version it began with was read, so what was acknowledged after a rollback was lost."""
    store = tmp_path

    def rolled_back() -> None:
        upsert(store, "before")
        IndexStore(store).rollback()
        upsert(store, "after")

    two_versions(store)
    during_the_build(monkeypatch, rolled_back)
    build_index(BASE, IndexSpec("hnsw"), store)
    with Searcher.open(store) as searcher:
        assert searcher.count == len(BASE.ids) + 3
        assert searcher.fields(["first", "before", "after"], []) == [{}] * 3


def test_the_version_a_build_began_with_is_not_collected_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log went with it, and an update that was acknowledged during the build was in no version any more."""
    first, second = two_versions(tmp_path)
    third = build_index(BASE, IndexSpec("hnsw"), tmp_path)
    store = IndexStore(tmp_path)
    store.publish_existing(second.name)

    def left_and_collected() -> None:
        upsert(tmp_path, "late")
        store.publish_existing(third.name)
        assert store.collect(keep=1) == [first.name]

    during_the_build(monkeypatch, left_and_collected)
    build_index(BASE, IndexSpec("fastscan"), tmp_path)
    with Searcher.open(tmp_path) as searcher:
        assert searcher.fields(["late"], []) == [{}]
    assert store.collect(keep=1) == [second.name, third.name]


@pytest.mark.parametrize("again", ["build", "tune"])
def test_what_was_rolled_back_does_not_return_with_a_version_of_the_same_content(tmp_path: Path, again: str) -> None:
    """A build after a rollback published the version that was left once more, the mistaken deletions in its log too."""
    first = build_index(BASE, IndexSpec("hnsw"), tmp_path)
    upsert(tmp_path, "first")

    def next_version() -> Path:
        return build_index(BASE, IndexSpec(), tmp_path) if again == "build" else retune(tmp_path, corpus(ASKED), 0.5)

    second = next_version()
    with Searcher.open(tmp_path) as mistaken:
        mistaken.delete(BASE.ids[:3])
    assert IndexStore(tmp_path).rollback() == first
    third = next_version()
    assert third not in (first, second)
    with Searcher.open(tmp_path) as searcher:
        assert searcher.fields(["first", *BASE.ids[:3]], []) == [{}] * 4
    assert next_version() == third
    IndexStore(tmp_path).publish_existing(second.name)
    with Searcher.open(tmp_path) as searcher:
        assert searcher.count == len(BASE.ids) - 2, "what was acknowledged stays with its version"


def test_discarding_does_not_guess_which_updates_came_during_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corpus has the updates of one version; those of another would be forgotten, or undo the corpus."""
    first, _ = two_versions(tmp_path)
    during_the_build(monkeypatch, IndexStore(tmp_path).rollback)
    hnsw = IndexSpec("hnsw")
    with pytest.raises(ArtifactError, match=f"{first.name} became current during the build, so which updates"):
        build_index(BASE, hnsw, tmp_path, discard_updates=True)
    assert IndexStore(tmp_path).current() == first
    upsert(tmp_path, "late")
    built = IndexStore(tmp_path).versions()[-1]
    assert build_index(BASE, hnsw, tmp_path, discard_updates=True) == built
    with Searcher.open(tmp_path) as searcher:
        assert searcher.count == len(BASE.ids)


def test_late_updates_that_do_not_fit_the_new_version_stop_its_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version whose log it cannot read would become current, and no server could open it."""
    searcher, _, _ = opened_with_fields(tmp_path)
    collection = Documents({doc_id: {"year": f"about {i}"} for i, doc_id in enumerate(BASE.ids)})
    owned = collection.owned(BASE)
    during_the_build(monkeypatch, lambda: searcher.upsert(["late"], NEWS[:1], [{"year": 7}]))
    with pytest.raises(DataError, match="field 'year' holds text, but 7 is none"):
        build_index(owned, IndexSpec(), tmp_path, collection=collection, fields=["year"])
    assert IndexStore(tmp_path).current().name == searcher.version
    build_index(owned, IndexSpec(), tmp_path, collection=collection, fields=["year"])
    with Searcher.open(tmp_path) as again:
        assert again.fields(["late"], ["year"]) == [{"year": 7}]


def test_damage_of_folded_updates_is_found_and_named(tmp_path: Path) -> None:
    """The next build reads them; a flipped bit would become a document's vector."""
    build_index(BASE, IndexSpec(), tmp_path)
    with Searcher.open(tmp_path) as searcher:
        searcher.upsert(["new"], NEWS[:1])
    version = build_index(BASE, IndexSpec(), tmp_path)
    content = bytearray((version / "updates.log").read_bytes())
    content[-2] ^= 4
    (version / "updates.log").chmod(0o644)
    (version / "updates.log").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"updates\.log: bytes differ"):
        Searcher.open(tmp_path)


def test_updates_by_another_encoder_are_not_folded_in(tmp_path: Path) -> None:
    """Vectors of two spaces in one index are confident nonsense."""
    build_index(BASE, IndexSpec(), tmp_path)
    with Searcher.open(tmp_path) as searcher:
        searcher.upsert(["new"], NEWS[:1])
    other = EncodedCorpus(BASE.ids, BASE.vectors, card(8, weights="other"), "x", "y")
    with pytest.raises(DataError, match="its updates were encoded by 'documents', the corpus by 'documents'"):
        build_index(other, IndexSpec(), tmp_path)
    build_index(other, IndexSpec(), tmp_path, discard_updates=True)


def test_deleting_everything_leaves_nothing_to_find_or_build(tmp_path: Path) -> None:
    """The last document of an index is deleted like any other."""
    build_index(BASE, IndexSpec("hnsw"), tmp_path)
    with Searcher.open(tmp_path) as searcher:
        searcher.delete(BASE.ids)
        assert searcher.count == 0
        assert len(searcher.search(ASKED[:1], 5)[0]) == 0
        with pytest.raises(DataError, match="the updates delete every document"):
            build_index(BASE, IndexSpec("hnsw"), tmp_path)
        searcher.upsert(["new"], NEWS[:1])
        assert searcher.search(ASKED[:1], 5)[0].doc_ids == ("new",)


def test_collected_versions_take_their_logs_along(tmp_path: Path) -> None:
    """Logs of versions that are gone would stay for ever."""
    first = build_index(BASE, IndexSpec(), tmp_path)
    with Searcher.open(tmp_path) as searcher:
        searcher.upsert(["new"], NEWS[:1])
        log = log_of(searcher, tmp_path).path
    build_index(BASE, IndexSpec("hnsw"), tmp_path)
    assert log.exists()
    assert IndexStore(tmp_path).collect(keep=1) == [first.name]
    assert not log.exists()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from("abcde"), max_size=3), st.sets(st.sampled_from("abcde"), max_size=2)),
        min_size=1,
        max_size=6,
    )
)
def test_the_sum_of_updates_is_their_sequence(steps: list[tuple[set[str], set[str]]]) -> None:
    """What a restart replays must be what was seen before it, in whatever portions it was read."""
    updates, state, touched = [], dict[str, float](), set[str]()
    for number, (upserted, deleted) in enumerate(steps):
        ids = sorted(upserted - deleted)
        vectors = np.full((len(ids), 2), number, dtype=np.float32)
        updates.append(Update(tuple(ids), vectors, tuple({"n": number} for _ in ids), tuple(sorted(deleted))))
        for doc_id in deleted:
            state.pop(doc_id, None)
        state.update(dict.fromkeys(ids, float(number)))
        touched |= upserted | deleted
    whole = summed(updates)
    assert dict(zip(whole.doc_ids, whole.vectors[:, 0].tolist(), strict=True)) == state
    assert [fields["n"] for fields in whole.fields] == [state[doc_id] for doc_id in whole.doc_ids]
    assert {*whole.doc_ids, *whole.deleted} == touched
    for cut in range(len(updates) + 1):
        parts = summed([summed(updates[:cut]), *updates[cut:]])
        assert (parts.doc_ids, parts.deleted) == (whole.doc_ids, whole.deleted)
        assert parts.vectors.tobytes() == whole.vectors.tobytes()


def small_log(path: Path) -> tuple[UpdateLog, list[Update]]:
    log = UpdateLog(path)
    updates = [
        Update(("a", "ü"), NEWS[:2], ({"title": "x\ny"}, {})),
        Update((), np.empty((0, 8), np.float32), (), ("a",)),
        Update(("b",), NEWS[2:3], ({"n": 1},), ("c",)),
    ]
    for update in updates:
        log.append(update)
    return log, updates


def same(left: list[Update], right: list[Update]) -> bool:
    return [one.to_bytes() for one in left] == [one.to_bytes() for one in right]


def test_a_log_torn_at_every_byte_gives_its_whole_records_and_goes_on(tmp_path: Path) -> None:
    """Power can fail after any byte; what was acknowledged before stays, and the next record must be readable."""
    log, updates = small_log(tmp_path / "whole.log")
    whole = log.path.read_bytes()
    ends = [0]
    for count in range(1, 4):
        other = UpdateLog(tmp_path / f"{count}.log")
        for update in updates[:count]:
            other.append(update)
        ends.append(other.state[1])
    assert ends[-1] == len(whole)
    for cut in range(len(whole) + 1):
        for padding in (b"", b"\0" * 13):
            torn = UpdateLog(tmp_path / "torn.log")
            torn.path.write_bytes(whole[:cut] + (padding if cut < len(whole) else b""))
            complete = sum(end <= cut for end in ends[1:])
            read, place, _ = torn.read()
            assert same(read, updates[:complete]), cut
            assert place.end == (ends[complete] or place.end)
            torn.append(updates[1])
            assert same(torn.read()[0], [*updates[:complete], updates[1]]), cut


def test_a_flipped_bit_in_the_log_is_never_read_as_an_update(tmp_path: Path) -> None:
    """Every bit of a record is under its checksum; before the last record it is an error that names the file."""
    log, updates = small_log(tmp_path / "some.log")
    whole = log.path.read_bytes()
    last = UpdateLog(tmp_path / "two.log")
    for update in updates[:2]:
        last.append(update)
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        log.path.write_bytes(flipped)
        try:
            read = log.read().updates
        except ArtifactError as error:
            assert "some.log" in str(error)  # noqa: PT017
            continue
        assert same(read, updates[: len(read)]), at
        # Only the last record can pass for a torn one.
        assert len(read) == 2, at
        assert at >= last.state[1]


@pytest.mark.parametrize("record", range(3))
@pytest.mark.parametrize("bit", range(32))
def test_a_flipped_bit_of_a_length_loses_nothing(tmp_path: Path, record: int, bit: int) -> None:
    """A length that reaches past the end looks like a torn write, and the next append cut the whole log off there."""
    log, updates = small_log(tmp_path / "some.log")
    content = bytearray(log.path.read_bytes())
    begins = 8 + sum(8 + len(update.to_bytes()) for update in updates[:record])
    content[begins + bit // 8] ^= 1 << bit % 8
    log.path.write_bytes(content)
    for use in (UpdateLog(log.path).read, lambda: UpdateLog(log.path).append(updates[0])):
        with pytest.raises(ArtifactError, match=rf"some\.log: damaged at byte {begins}"):
            use()
    assert log.path.read_bytes() == content


def test_damage_of_many_bytes_before_a_whole_record_is_no_torn_write(tmp_path: Path) -> None:
    """A bad sector takes a length and more; the updates after it were acknowledged as well."""
    log, updates = small_log(tmp_path / "some.log")
    content = bytearray(log.path.read_bytes())
    content[8:40] = b"\xff" * 32
    log.path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged at byte 8"):
        UpdateLog(log.path).append(updates[0])


def test_a_reader_goes_on_from_where_it_was(tmp_path: Path) -> None:
    """Reading the whole log again for each update would make the thousandth a thousand times as dear."""
    log = UpdateLog(tmp_path / "log")
    first = Update(("a",), NEWS[:1], ({},))
    log.append(first)
    _, place, _ = log.read()
    assert log.read(place) == ([], place, False)
    log.append(Update((), np.empty((0, 8), np.float32), (), ("a",)))
    news, end, anew = log.read(place)
    assert [one.deleted for one in news] == [("a",)]
    assert (end.end, anew) == (log.state[1], False)


@pytest.mark.parametrize("others", [0, 1, 2, 40])
@pytest.mark.parametrize("how", ["renamed", "same file number"])
def test_a_log_that_is_replaced_is_read_from_its_beginning(tmp_path: Path, others: int, how: str) -> None:
    """Without it a reader goes on at a place of the old log: in the middle of a record, or past what it missed."""
    version = build_index(BASE, IndexSpec(), tmp_path).name
    log = UpdateLog.of(tmp_path, version)
    updates = [Update((f"new-{i}",), NEWS[i : i + 1], ({},)) for i in range(others)]
    with Searcher.open(tmp_path) as reader:
        reader.upsert(["old", "older"], NEWS[:2])
        assert reader.count == len(BASE.ids) + 2
        if how == "renamed":
            log.replace(updates)
        else:
            other = UpdateLog(tmp_path / "other.log")
            for update in updates:
                other.append(update)
            log.path.write_bytes(other.path.read_bytes() if others else b"")
        assert reader.count == len(BASE.ids) + others
        reader.upsert(["newest"], NEWS[:1])
        assert reader.count == len(BASE.ids) + others + 1
    assert {doc_id for one in log.read().updates for doc_id in one.doc_ids} == {
        "newest",
        *(f"new-{i}" for i in range(others)),
    }


def test_a_writer_reads_only_what_others_wrote_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it each upsert reads the whole log: the thousandth takes a thousand times as long as the first."""
    read = []
    take = Update.from_bytes.__func__

    def counted(cls: type[Update], body: bytes) -> Update:
        read.append(take(cls, body))
        return read[-1]

    monkeypatch.setattr(Update, "from_bytes", classmethod(counted))
    mine, theirs = UpdateLog(tmp_path / "log"), UpdateLog(tmp_path / "log")
    for i in range(10):
        mine.append(Update((), np.empty((0, 8), np.float32), (), (f"mine-{i}",)))
    assert read == []
    theirs.append(Update((), np.empty((0, 8), np.float32), (), ("theirs",)))
    read.clear()
    mine.append(Update((), np.empty((0, 8), np.float32), (), ("last",)))
    assert [one.deleted for one in read] == [("theirs",)]
    assert [one.deleted[0] for one in mine.read().updates] == [*(f"mine-{i}" for i in range(10)), "theirs", "last"]


def test_a_full_disk_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    """An update that fails must leave a log that the next one can be added to."""
    build_index(BASE, IndexSpec(), tmp_path)
    script = """
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from index.search import Searcher
        from index.updates import UpdateLog
        from retrieval_kd.errors import ArtifactError

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = Path(sys.argv[1])
        searcher = Searcher.open(store)
        vector = np.ones((1, 8), dtype=np.float32)
        searcher.upsert(["kept"], vector)
        log = UpdateLog.of(store, searcher.version)
        size = log.state[1]
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for room in (0, 5, 40):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, hard))
            try:
                searcher.upsert(["lost"], vector)
                raise SystemExit("written")
            except ArtifactError as error:
                assert "cannot write the update" in str(error), error
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert log.state[1] == size
        searcher.upsert(["later"], vector)
        assert [one.doc_ids for one in log.read()[0]] == [("kept",), ("later",)]
    """
    run_script(script, str(tmp_path))


def run_script(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stderr


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Acknowledged means on disk: a writer killed at any moment leaves every update it spoke of, and no half one."""
    build_index(BASE, IndexSpec(), tmp_path)
    script = """
        import sys
        from pathlib import Path
        import numpy as np
        from index.search import Searcher

        searcher = Searcher.open(Path(sys.argv[1]))
        for number in range(10**6):
            ids = [f"{sys.argv[2]}-{number}-{i}" for i in range(3)]
            searcher.upsert(ids, np.full((3, 8), number, dtype=np.float32))
            sys.stdout.write(f"{number}\\n")
            sys.stdout.flush()
    """
    acknowledged = 0
    for run in range(3):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), f"run{run}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline() for _ in range(20)]
            os.kill(writer.pid, signal.SIGKILL)
            said += writer.stdout.readlines()
        numbers = [int(line) for line in said if line.endswith("\n")]
        acknowledged += len(numbers)
        with Searcher.open(tmp_path) as searcher:
            assert numbers
            found = log_of(searcher, tmp_path).read()[0]
            ours = [one for one in found if one.doc_ids[0].startswith(f"run{run}-")]
            assert len(ours) >= len(numbers)
            assert all(len(one.doc_ids) == 3 and (one.vectors == i).all() for i, one in enumerate(ours))
            assert len(found) >= acknowledged


def test_writers_of_several_threads_take_turns(tmp_path: Path) -> None:
    """Two records written into one another are two updates lost."""
    build_index(BASE, IndexSpec(), tmp_path)
    searchers = [Searcher.open(tmp_path) for _ in range(3)]

    def write(number: int) -> None:
        for i in range(10):
            searchers[number].upsert([f"t{number}-{i}"], NEWS[i : i + 1])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(searcher.count == len(BASE.ids) + 30 for searcher in searchers)
    assert len(UpdateLog.of(tmp_path, searchers[0].version).read()[0]) == 30


def test_a_stranger_among_the_logs_is_refused(tmp_path: Path) -> None:
    """Another program's file read as updates would be anything."""
    version = build_index(BASE, IndexSpec(), tmp_path)
    (tmp_path / UPDATES).mkdir(exist_ok=True)
    (tmp_path / UPDATES / f"{version.name}.log").write_bytes(b"something else entirely")
    with pytest.raises(ArtifactError, match="not a log of updates"):
        Searcher.open(tmp_path)


def test_nobody_sees_less_while_another_takes_the_news_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller whose upsert has been acknowledged could otherwise search, a moment later, without it."""
    build_index(BASE, IndexSpec(), tmp_path)
    taking_in, go_on = threading.Event(), threading.Event()
    make = Delta.after

    def slowly(self: Delta, update: Update) -> Delta:
        taking_in.set()
        assert go_on.wait(30)
        return make(self, update)

    with Searcher.open(tmp_path) as writer, Searcher.open(tmp_path) as reader, ThreadPoolExecutor(2) as pool:
        writer.upsert(["new"], NEWS[:1])
        monkeypatch.setattr(Delta, "after", slowly)
        first = pool.submit(lambda: reader.count)
        assert taking_in.wait(30)
        second = pool.submit(lambda: reader.count)
        wait([second], 0.2)
        go_on.set()
        assert [first.result(30), second.result(30)] == [len(BASE.ids) + 1] * 2


def test_many_small_updates_are_what_one_reading_of_them_is(tmp_path: Path) -> None:
    """The state grows update by update; a row left behind or counted twice would show only after a restart."""
    rng = np.random.default_rng(3)
    writer, _, _ = opened_with_fields(tmp_path)
    ids = [*BASE.ids[:12], *(f"e{i}" for i in range(12))]
    for step in range(120):
        some = sorted(rng.choice(ids, size=rng.integers(1, 4), replace=False))
        if rng.random() < 0.3:
            writer.delete(some)
        else:
            vectors = NEWS[rng.integers(len(NEWS), size=len(some))]
            writer.upsert(some, vectors, [{"year": 1990 + step % 7, "title": f"{step}"} for _ in some])
        if step % 10 > 0:
            continue
        with Searcher.open(tmp_path) as fresh:
            assert writer.count == fresh.count
            for wanted in (None, Range("year", lt=1994)):
                pairs = zip(
                    writer.search(ASKED, 250, filter=wanted), fresh.search(ASKED, 250, filter=wanted), strict=True
                )
                assert all((a.doc_ids, a.scores.tobytes()) == (b.doc_ids, b.scores.tobytes()) for a, b in pairs)
            (whole,) = fresh.search(ASKED[:1], 250)
            assert writer.fields(whole.doc_ids, ["year", "title"]) == fresh.fields(whole.doc_ids, ["year", "title"])


def test_an_upsert_takes_in_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that had changed was made again for each update: the five-thousandth took sixty times as long."""
    searcher, _, _ = opened_with_fields(tmp_path)
    made = dict.fromkeys(("truncated", "record_batch"), 0)

    def counting(name: str) -> None:
        make = getattr(delta_module, name)

        def counted(rows: Any, *arguments: Any) -> Any:
            made[name] += len(rows)
            return make(rows, *arguments)

        monkeypatch.setattr(delta_module, name, counted)

    for name in made:
        counting(name)
    for i in range(300):
        searcher.upsert([f"new-{i}"], NEWS[i % len(NEWS)][None], [{"year": i}])
    assert searcher.count == len(BASE.ids) + 300
    assert made["truncated"] == 300
    assert made["record_batch"] < 3 * 300


def test_a_document_that_is_replaced_again_and_again_takes_no_more_room(tmp_path: Path) -> None:
    """A counter kept in a document's fields would fill the memory of every server by and by."""
    build_index(BASE, IndexSpec(), tmp_path)
    with Searcher.open(tmp_path) as searcher:
        for i in range(500):
            searcher.upsert(["same"], NEWS[i % len(NEWS)][None])
        assert searcher.count == len(BASE.ids) + 1
        delta = searcher._refresh()
        assert delta is not None
        assert len(delta.vectors) < 100
        assert len(delta.doc_ids) < 100


def test_who_searches_a_state_sees_nothing_of_the_next(tmp_path: Path) -> None:
    """States share their vectors: a search under way would find a document of an update that came after it began."""
    build_index(BASE, IndexSpec(), tmp_path)
    with Searcher.open(tmp_path) as searcher:
        searcher.upsert(["a", "b"], NEWS[:2])
        before = searcher._refresh()
        assert before is not None
        expected = before.search(ASKED, 9, None, {})
        searcher.upsert(["b", "c", BASE.ids[0]], NEWS[2:5])
        searcher.delete(["a", BASE.ids[1]])
        for ours, theirs in zip(before.search(ASKED, 9, None, {}), expected, strict=True):
            assert (ours.doc_ids, ours.scores.tobytes()) == (theirs.doc_ids, theirs.scores.tobytes())
        assert before.base is None
        assert before.count == len(BASE.ids) + 2


def test_an_update_that_failed_half_way_is_applied_whole_when_it_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short of memory once, a process would otherwise never find the documents of that update again."""
    build_index(BASE, IndexSpec(), tmp_path)
    with Searcher.open(tmp_path) as reader, Searcher.open(tmp_path) as writer:
        writer.upsert(["first"], NEWS[:1])
        assert reader.count == 201
        writer.upsert([BASE.ids[3], "new"], NEWS[1:3])
        norm = np.linalg.norm

        def starved(*_: Any, **__: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(np.linalg, "norm", starved)
        with pytest.raises(MemoryError):
            reader.search(NEWS[1:2], 1)
        monkeypatch.setattr(np.linalg, "norm", norm)
        assert reader.count == writer.count == 202
        assert [ranking.doc_ids for ranking in reader.search(NEWS[1:3], 1)] == [(BASE.ids[3],), ("new",)]


def test_the_name_of_a_log_is_on_disk_before_anything_in_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a log whose folder was never synced is not there, and a discarded one is there again."""
    synced: list[Path] = []
    monkeypatch.setattr(updates_module, "fsync_folder", synced.append)
    update = Update(("a",), NEWS[:1], ({},))
    log = tmp_path / UPDATES / "1.log"
    UpdateLog(log).append(update)
    # Its writer died just before: this one cannot know that the name is safe.
    other = UpdateLog(log)
    synced.clear()
    other.append(update)
    assert log.parent in synced
    synced.clear()
    other.append(update)
    assert synced == []
    other.replace([])
    assert synced == [log.parent]
    other.append(update)
    assert synced.count(log.parent) == 2


def test_a_snapshot_has_the_fields_its_search_went_by(tmp_path: Path) -> None:
    """An upsert between ranking and fields gave hits that their own filter does not match."""
    searcher, _, _ = opened_with_fields(tmp_path)
    own, other, added, gone = BASE.ids[0], BASE.ids[1], "new", "gone"
    untouched = searcher.snapshot()
    searcher.upsert([own, added, gone], NEWS[:3], [{"year": 1}, {"year": 1}, {"year": 1}])
    searcher.delete([gone])
    before = searcher.snapshot()
    searcher.delete([own])
    # Many, so that the states after it have arrays of their own.
    for i in range(100):
        searcher.upsert([other, added, gone], NEWS[i % 9 :][:3], [{"year": 2}, {"year": 2}, {"year": 2}])
    assert before.search(NEWS[:1], 5, filter=Eq("year", 1))[0].doc_ids == (own, added)
    assert before.fields([own, other, added], ["year"]) == [{"year": 1}, {"year": 2001}, {"year": 1}]
    assert untouched.fields([own, other], ["year"]) == [{"year": 2000}, {"year": 2001}]
    assert searcher.fields([other, added, gone], ["year"]) == [{"year": 2}] * 3
    assert [untouched.count, before.count, searcher.count] == [200, 201, 201]
    for state, missing in [(untouched, added), (before, gone), (searcher, own)]:
        with pytest.raises(DataError, match=f"no document '{missing}'"):
            state.fields([missing], ["year"])
