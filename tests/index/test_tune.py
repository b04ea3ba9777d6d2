from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from index_helpers import KINDS, Documents, card, clustered, corpus

from index import build as build_module
from index import tune as tune_module
from index.build import build_index, retune
from index.kinds import Effort
from index.manifest import IndexManifest
from index.search import Opened, Searcher
from index.store import IndexStore
from index.verify import inspect, verify
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import DataError, EncoderMismatch
from retrieval_kd.recipes.schema import IndexSpec

TUNABLE = [name for name in KINDS if not name.startswith("exact")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "_TIMED", 5)


@pytest.fixture(scope="module")
def documents() -> EncodedCorpus:
    return corpus(clustered(1, 800, 16))


@pytest.fixture(scope="module")
def queries() -> EncodedCorpus:
    return corpus(clustered(2, 60, 16))


def recall(searcher: Searcher, asked: np.ndarray, effort: Effort | None = None) -> float:
    pairs = zip(searcher.search(asked, 10, effort=effort), searcher.search(asked, 10, exact=True), strict=True)
    return float(np.mean([len(set(a.doc_ids) & set(b.doc_ids)) / 10 for a, b in pairs]))


@pytest.mark.parametrize("name", TUNABLE)
@pytest.mark.parametrize("target", [0.9])
def test_tuned_effort_reaches_the_target_and_less_does_not(
    name: str, target: float, documents: EncodedCorpus, queries: EncodedCorpus, tmp_path: Path
) -> None:
    """An effort that is too small loses documents; one that is too large loses the speed the index was built for."""
    spec = IndexSpec(KINDS[name].kind, KINDS[name].storage, neighbours=8, ef_construction=40, target_recall=target)
    build_index(documents, spec, tmp_path, queries=queries)
    with Searcher.open(tmp_path) as searcher:
        effort = searcher.effort
        assert recall(searcher, queries.vectors) >= target
        for knob in ("ef_search", "probes", "oversample"):
            value = getattr(effort, knob)
            used = {"ef_search": name.startswith("hnsw"), "probes": name.startswith("ivf")}
            if used.get(knob, not name.startswith("hnsw")) and value > 1:
                less = Effort(**{**vars_of(effort), knob: value - 1})
                assert recall(searcher, queries.vectors, less) < target, (knob, value)
        tuning = inspect(tmp_path)["tuning"]
        assert (tuning["target"], tuning["queries"], tuning["depth"]) == (target, 60, 10)
        assert tuning["recall"] == pytest.approx(recall(searcher, queries.vectors))
        chosen = next(point for point in tuning["curve"] if point["effort"] == vars_of(effort))
        assert chosen["recall"] == tuning["recall"]
        assert all(point["milliseconds"] > 0 for point in tuning["curve"])


def vars_of(effort: Effort) -> dict[str, int]:
    return {"ef_search": effort.ef_search, "probes": effort.probes, "oversample": effort.oversample}


def test_a_target_out_of_reach_is_refused(documents: EncodedCorpus, queries: EncodedCorpus, tmp_path: Path) -> None:
    """An index that misses its target in silence is found out by its users."""
    spec = IndexSpec("hnsw", neighbours=2, ef_construction=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tune_module, "_MOST_NODES", 12)
        with pytest.raises(DataError, match=r"index kind hnsw finds 0\.\d+ of the exact ten at its hardest"):
            build_index(documents, spec, tmp_path, queries=queries)
    assert not (tmp_path / "CURRENT").exists()


def test_tuning_again_shares_the_files(documents: EncodedCorpus, queries: EncodedCorpus, tmp_path: Path) -> None:
    """A new target for a hundred gigabytes must neither copy nor build them."""
    spec = IndexSpec("hnsw", neighbours=4, ef_construction=8, target_recall=0.7)
    first = build_index(documents, spec, tmp_path, queries=queries)
    second = retune(tmp_path, queries, 0.97)
    assert second == IndexStore(tmp_path).current() != first
    for name in ("vectors.npy", "ann.faiss", "ids.arrow"):
        assert (first / name).samefile(second / name)
    with Searcher.open(first) as low, Searcher.open(second) as high:
        assert high.effort.ef_search > low.effort.ef_search
        assert recall(high, queries.vectors) >= 0.97
        high.self_test()
    assert retune(tmp_path, queries, 0.97) == second
    assert IndexManifest.load(second).content.requested.target_recall == 0.97
    IndexStore(tmp_path).collect(keep=1)
    assert verify(tmp_path) == [second.name]


def test_queries_of_another_space_tune_nothing(
    documents: EncodedCorpus, queries: EncodedCorpus, tmp_path: Path
) -> None:
    """An effort tuned to another encoder's queries is a number without a meaning."""
    build_index(documents, IndexSpec(), tmp_path)
    stranger = EncodedCorpus(queries.ids, queries.vectors, card(16, weights="other"), "x", "y")
    with pytest.raises(EncoderMismatch, match="cannot search documents"):
        retune(tmp_path, stranger, 0.9)


def small_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "EXACT_BELOW", 100)
    monkeypatch.setattr(tune_module, "_SAMPLE", 500)


def test_auto_takes_exact_while_it_is_fast(queries: EncodedCorpus, tmp_path: Path) -> None:
    """Measuring kinds over a thousand documents would choose by noise."""
    build_index(corpus(clustered(1, 60, 16)), IndexSpec("auto"), tmp_path)
    seen = inspect(tmp_path)
    assert (seen["requested"]["kind"], seen["index"]["kind"]) == ("auto", "exact")
    (considered,) = seen["tuning"]["considered"]
    assert (considered["kind"], considered["verdict"]) == ("exact", "chosen")


@pytest.mark.parametrize("storage", ["float32", "float16", "sq8"])
def test_the_memory_limit_holds_for_few_documents_as_well(storage: str, tmp_path: Path) -> None:
    """Below twenty thousand documents nothing was compared with the limit, and 2.6 MiB were published for 1 MiB."""
    many = corpus(clustered(1, 10_000, 64))
    collection = Documents({doc_id: {"title": "a title " * 10} for doc_id in many.ids})
    titled = {"collection": collection, "fields": ["title"]}
    for store, options, least in ((tmp_path / "bare", {}, 0), (tmp_path / "titled", titled, 1)):
        need = {"float32": 3, "float16": 2, "sq8": 1}[storage] + least
        build_index(collection.owned(many), IndexSpec("auto", storage, memory_mib=need), store, **options)
        seen = inspect(store)
        small = {"manifest.json", "probes.npz"}
        taken = sum(one["bytes"] for one in seen["files"] if one["path"] not in small)
        assert need - 1 < taken / 2**20 <= need
        (considered,) = seen["tuning"]["considered"]
        assert considered["bytes"] == pytest.approx(taken, rel=0.01)
        if need > 1:
            with pytest.raises(DataError, match=rf"exact, the smallest kind, takes {need} MiB, more than {need - 1};"):
                build_index(
                    collection.owned(many), IndexSpec("auto", storage, memory_mib=need - 1), store / "no", **options
                )
            assert not (store / "no" / "CURRENT").exists()


def test_auto_builds_measures_and_remembers(
    documents: EncodedCorpus, queries: EncodedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice that cannot be looked up afterwards cannot be trusted; the same request must not choose again."""
    small_auto(monkeypatch)
    version = build_index(documents, IndexSpec("auto", target_recall=0.9), tmp_path, queries=queries)
    seen = json.loads(json.dumps(inspect(tmp_path)))
    tried = seen["tuning"]["considered"]
    assert [one["kind"] for one in tried] == ["exact", "fastscan", "hnsw", "ivf-pq"]
    (chosen,) = [one for one in tried if one["verdict"] == "chosen"]
    assert chosen["kind"] == seen["index"]["kind"]
    assert chosen["milliseconds"] == min(one["milliseconds"] for one in tried)
    assert seen["tuning"]["recall"] >= 0.9
    assert build_index(documents, IndexSpec("auto", target_recall=0.9), tmp_path, queries=queries) == version


def test_auto_stays_within_memory(
    documents: EncodedCorpus, queries: EncodedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest kind is no use on a machine it does not fit."""
    small_auto(monkeypatch)
    expected = {one.kind: one.bytes for one in considered(documents, queries, tmp_path / "a")}
    assert expected["hnsw"] > expected["fastscan"] > documents.vectors.nbytes
    assert abs(expected["hnsw"] / total(tmp_path / "a", "hnsw", documents) - 1) < 0.1
    monkeypatch.setattr(tune_module, "_MIB", 1)
    limits = {"none": min(expected.values()) - 1, "some": max(expected.values()) - 1}
    with pytest.raises(DataError, match=r"no kind will do \(exact: takes \d+ MiB, more than \d+; fastscan: takes"):
        limited(limits["none"], documents, queries, tmp_path / "b")
    tried = limited(limits["some"], documents, queries, tmp_path / "c")
    assert [one.bytes <= limits["some"] for one in tried] == ["takes" not in one.verdict for one in tried]
    assert [one.verdict for one in tried].count("chosen") == 1


def considered(documents: EncodedCorpus, queries: EncodedCorpus, store: Path) -> list[tune_module.Considered]:
    return limited(0, documents, queries, store)


def limited(mib: int, documents: EncodedCorpus, queries: EncodedCorpus, store: Path) -> list[tune_module.Considered]:
    build_index(documents, IndexSpec("auto", target_recall=0.5, memory_mib=mib), store, queries=queries)
    return [tune_module.Considered(**one) for one in inspect(store)["tuning"]["considered"]]


def total(store: Path, kind: str, documents: EncodedCorpus) -> int:
    version = build_index(documents, IndexSpec(kind), store)
    return sum(path.stat().st_size for path in version.iterdir() if path.name not in ("manifest.json", "probes.npz"))


def test_auto_without_queries_is_refused(
    documents: EncodedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Document vectors would measure how well documents find themselves."""
    small_auto(monkeypatch)
    with pytest.raises(DataError, match="auto: it measures with held-out queries"):
        build_index(documents, IndexSpec("auto"), tmp_path)


def test_auto_falls_back_on_the_next_kind_and_says_why(
    documents: EncodedCorpus, queries: EncodedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kind that did over a sample may not do over all documents: hours of building would end with nothing."""
    small_auto(monkeypatch)
    failed = []

    def over_all(opened: Opened, asked: np.ndarray, target: float) -> tuple[Effort, tune_module.Tuning]:
        if opened.content.index.kind != "exact":
            failed.append(opened.content.index.kind)
            raise DataError(f"index kind {opened.content.index.kind} finds too little")
        return tune_module.tune(opened, asked, target)

    monkeypatch.setattr(build_module, "tune", over_all)
    monkeypatch.setattr(tune_module, "_growth", lambda kind, *_: 1000.0 if kind == "exact" else 1.0)
    version = build_index(documents, IndexSpec("auto", target_recall=0.9), tmp_path, queries=queries)
    seen = inspect(tmp_path)
    assert sorted(failed) == ["fastscan", "hnsw", "ivf-pq"]
    assert seen["index"]["kind"] == "exact"
    assert {one["kind"]: one["verdict"] for one in seen["tuning"]["considered"]} == {
        "exact": "chosen",
        **{kind: f"index kind {kind} finds too little" for kind in failed},
    }
    assert not (version / "ann.faiss").exists()
    with Searcher.open(version) as searcher:
        assert recall(searcher, queries.vectors) == 1


def test_auto_takes_exact_where_only_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise who has little memory is told that no kind will do, though one does."""
    small_auto(monkeypatch)
    many, asked = corpus(clustered(1, 2000, 64)), corpus(clustered(2, 60, 64))
    monkeypatch.setattr(tune_module, "_MIB", 1)
    expected = {one.kind: one.bytes for one in limited(0, many, asked, tmp_path / "a")}
    tried = limited(min(expected[kind] for kind in expected if kind != "exact") - 1, many, asked, tmp_path / "b")
    assert [one.kind for one in tried if one.verdict == "chosen"] == ["exact"]
    assert sum("more than" in one.verdict for one in tried) == 3


def test_auto_says_why_nothing_will_do(
    documents: EncodedCorpus, queries: EncodedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal without a reason leaves the user to guess between recall and memory."""
    small_auto(monkeypatch)
    monkeypatch.setattr(tune_module, "_MOST_NODES", 10)
    monkeypatch.setattr(tune_module, "_MOST_OVERSAMPLE", 1)
    monkeypatch.setattr(tune_module, "_MIB", 1)
    reasons = r"no kind will do \(exact: takes \d+ MiB, more than 1000; fastscan: index kind fastscan finds 0\.\d+"
    with pytest.raises(DataError, match=reasons):
        build_index(documents, IndexSpec("auto", target_recall=1.0, memory_mib=1000), tmp_path, queries=queries)
