from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_helpers import KINDS, brute_force, card, clustered, corpus, query_card

from index import search as search_module
from index.build import build_index, retune
from index.search import Searcher
from index.store import IndexStore
from index.vectors import StoredVectors
from retrieval_kd.artifacts import file_sha256
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import DataError, EncoderMismatch
from retrieval_kd.recipes.schema import IndexSpec
from retrieval_kd.runs import Ranking

EXACT, HNSW = IndexSpec("exact"), IndexSpec("hnsw", neighbours=16, ef_construction=40, ef_search=64)


def searcher(documents: EncodedCorpus, spec: IndexSpec, folder: Path) -> Searcher:
    build_index(documents, spec, folder / "store")
    return Searcher.open(folder / "store")


def same(left: Ranking, right: Ranking) -> bool:
    return left.doc_ids == right.doc_ids and left.scores.tobytes() == right.scores.tobytes()


@pytest.fixture(scope="module")
def big() -> EncodedCorpus:
    return corpus(clustered(1, 2000, 32))


@pytest.fixture(scope="module", params=list(KINDS.values()), ids=list(KINDS))
def opened(request: pytest.FixtureRequest, big: EncodedCorpus) -> Iterator[Searcher]:
    with tempfile.TemporaryDirectory() as folder:
        yield searcher(big, request.param, Path(folder))


@settings(max_examples=30, deadline=None)
@given(
    grid=st.sampled_from([1, 2, 50]),
    count=st.integers(1, 90),
    queries=st.integers(1, 30),
    k=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_flat_is_brute_force_with_ties_by_id(grid: int, count: int, queries: int, k: int, seed: int) -> None:
    """A coarse grid is full of duplicates and ties at the k-th place, where candidate lists lose documents."""
    rng = np.random.default_rng(seed)
    documents = corpus(
        rng.integers(-grid, grid + 1, size=(count, 3)) / 7, ids=[f"d{i}" for i in rng.permutation(count)]
    )
    asked = (rng.integers(-grid, grid + 1, size=(queries, 3)) / 3).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        found = searcher(documents, EXACT, Path(folder))
        together = found.search(asked, k)
        for query, ranking in zip(asked, together, strict=True):
            assert list(ranking.doc_ids) == brute_force(documents, query, k)
            assert same(ranking, found.search(query[None], k)[0])


def test_more_duplicates_than_any_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four hundred equal documents, stored with the smallest ids last: faiss keeps the first rows it sees."""
    monkeypatch.setattr(search_module, "_MARGIN", 0)
    vectors = np.vstack([np.tile([1.0, 0.0], (400, 1)), np.tile([0.5, 0.5], (100, 1))])
    found = searcher(corpus(vectors, ids=[f"d{i:03d}" for i in reversed(range(500))]), EXACT, tmp_path)
    assert found.search(np.asarray([[1.0, 0.0]], np.float32), 3)[0].doc_ids == ("d100", "d101", "d102")


def test_near_ties_below_float32_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores closer than faiss's own rounding: only the bound, not faiss's order, may decide who is rescored."""
    monkeypatch.setattr(search_module, "_MARGIN", 0)
    rng = np.random.default_rng(3)
    base = rng.normal(size=256)
    documents = corpus(base * (1 + rng.normal(size=(300, 256)) * 2e-8) + rng.normal(size=(300, 256)) * 2e-8)
    found = searcher(documents, EXACT, tmp_path)
    asked = clustered(5, 40, 256)
    asked[:20] = (base / np.linalg.norm(base)).astype(np.float32)
    for query, ranking in zip(asked, found.search(asked, 5), strict=True):
        assert list(ranking.doc_ids) == brute_force(documents, query, 5)
        assert same(ranking, found.search(query[None], 5)[0])


def test_queries_and_documents_whose_squares_underflow(tmp_path: Path) -> None:
    """Their length would count as 0 in float32 and the bound with it, and a document be lost to another's rounding."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=384)
    documents = corpus(base + rng.normal(size=(300, 384)) * 1e-7)
    asked = (clustered(5, 20, 384) + base / np.linalg.norm(base)).astype(np.float32) * np.float32(1e-25)
    found = searcher(documents, EXACT, tmp_path)
    for query, ranking in zip(asked, found.search(asked, 5), strict=True):
        assert list(ranking.doc_ids) == brute_force(documents, query, 5)
    enormous = asked * np.float32(1e25) * np.float32(1e20)
    assert [ranking.doc_ids for ranking in found.search(enormous, 5)] == [
        tuple(brute_force(documents, query, 5)) for query in enormous
    ]


def test_alone_in_a_batch_and_in_threads_is_bit_for_bit_the_same(opened: Searcher) -> None:
    """A cached or batched answer that differs from a lone one makes every comparison meaningless."""
    asked = clustered(2, 64, 32)
    together = opened.search(asked, 10)
    assert all(same(opened.search(query[None], 10)[0], ranking) for query, ranking in zip(asked, together, strict=True))
    assert all(same(a, b) for a, b in zip(opened.search(asked[::-1], 10)[::-1], together, strict=True))
    with ThreadPoolExecutor(8) as pool:
        for rankings in pool.map(lambda _: opened.search(asked, 10), range(16)):
            assert all(same(a, b) for a, b in zip(rankings, together, strict=True))


def test_threads_of_a_call_change_nothing(big: EncodedCorpus, tmp_path: Path) -> None:
    """A machine with more cores must not rank otherwise."""
    build_index(big, HNSW, tmp_path / "store")
    asked = clustered(2, 64, 32)
    one, two = (Searcher.open(tmp_path / "store", threads=n).search(asked, 10) for n in (1, 2))
    assert all(same(a, b) for a, b in zip(one, two, strict=True))


def test_every_kind_finds_nearly_all(opened: Searcher) -> None:
    """An index built for another metric, or searched too narrowly, still returns ten plausible documents."""
    asked = clustered(4, 200, 32)
    pairs = zip(opened.search(asked, 10), opened.search(asked, 10, exact=True), strict=True)
    recall = np.mean([len(set(a.doc_ids) & set(b.doc_ids)) / 10 for a, b in pairs])
    assert recall >= 0.97


def test_shorter_ranking_begins_the_longer_one(opened: Searcher) -> None:
    """Paging through results must not reshuffle those already seen."""
    asked = clustered(6, 5, 32)
    for short, long in zip(opened.search(asked, 3), opened.search(asked, 10), strict=True):
        assert same(short, long.top(3))


def test_k_above_count_gives_all(opened: Searcher) -> None:
    """An index must answer, not fail, when asked for more than it has."""
    ranking = opened.search(clustered(2, 1, 32), 10**6)[0]
    assert len(ranking) == 2000
    assert same(ranking, opened.search(clustered(2, 1, 32), 2000, exact=True)[0])


@pytest.mark.parametrize("name", ["exact", "hnsw"])
def test_fewer_documents_than_any_default(name: str, tmp_path: Path) -> None:
    """The first index a user builds has seven documents."""
    small = searcher(corpus(clustered(1, 7, 4)), KINDS[name], tmp_path)
    assert len(small.search(clustered(2, 1, 4), 100)[0]) == 7


def test_too_few_documents_to_train_on_is_refused(tmp_path: Path) -> None:
    """The library would raise from C++ with the name of a source file."""
    with pytest.raises(DataError, match="index kind fastscan needs 16 documents, there are 7; use exact"):
        build_index(corpus(clustered(1, 7, 4)), IndexSpec("fastscan"), tmp_path)
    with pytest.raises(DataError, match=r"index.lists: 50 lists for 20 documents"):
        build_index(corpus(clustered(1, 20, 4)), IndexSpec("ivf", lists=50), tmp_path)


def test_kinds_that_need_a_gpu_say_so(tmp_path: Path) -> None:
    """A missing device is a message and not a missing attribute."""
    import faiss

    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("there is a GPU here")
    with pytest.raises(DataError, match="gpu-exact needs faiss-gpu and a GPU"):
        build_index(corpus(clustered(1, 20, 4)), IndexSpec("gpu-exact"), tmp_path)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("exact")])
def test_scores_are_those_of_the_stored_numbers(name: str, tmp_path: Path) -> None:
    """Exact means exact: every storage's ranking is that of float64 sums over what it stores, ties by id."""
    documents = corpus(np.vstack([clustered(1, 150, 12)] * 2) * 3)
    found = searcher(documents, KINDS[name], tmp_path)
    stored = replace(
        documents, vectors=StoredVectors.open(IndexStore(tmp_path / "store").current(), found.storage).rows(slice(None))
    )
    assert (
        np.abs(stored.vectors - documents.vectors).max() <= {"float32": 0, "float16": 2e-3, "sq8": 2e-2}[found.storage]
    )
    asked = clustered(5, 25, 12)
    for query, ranking in zip(asked, found.search(asked, 21), strict=True):
        assert list(ranking.doc_ids) == brute_force(stored, query, 21)


def test_a_number_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    """Stored as infinity it would be the first answer to every question."""
    with pytest.raises(DataError, match="too large for float16"):
        build_index(corpus(np.full((20, 4), 7e4)), IndexSpec(storage="float16"), tmp_path)


def test_matryoshka_cut_is_the_ranking_of_the_cut_vectors(tmp_path: Path) -> None:
    """Vectors cut but not made unit length again favour documents whose rest was short."""
    whole = corpus(clustered(1, 300, 16))
    nested = replace(whole, card=replace(whole.card, dimensions=(16, 8), normalize=True, similarity="cosine"))
    asked = clustered(2, 20, 16)
    found = searcher(nested, IndexSpec(dimension=8), tmp_path)
    assert found.dimension == 16
    cut = whole.vectors[:, :8].astype(np.float64)
    cut /= np.linalg.norm(cut, axis=1, keepdims=True)
    for query, ranking in zip(asked, found.search(asked, 10), strict=True):
        short = query[:8].astype(np.float64)
        scores = cut @ (short / np.linalg.norm(short))
        assert list(ranking.doc_ids) == [whole.ids[i] for i in np.argsort(-scores)[:10]]
        np.testing.assert_allclose(ranking.scores, np.sort(scores)[::-1][:10], atol=1e-6)
    with pytest.raises(DataError, match=r"index.dimension: encoder 'documents' has no 9; it has 16, 8"):
        build_index(nested, IndexSpec(dimension=9), tmp_path)


def test_hnsw_of_duplicates_still_fills_the_ranking(tmp_path: Path) -> None:
    """A graph over equal vectors has nodes that no walk reaches; the ranking is as long as promised."""
    vectors = np.vstack([np.tile([1.0, 0.0], (300, 1)), np.tile([-1.0, 0.0], (300, 1))])
    spec = IndexSpec("hnsw", neighbours=2, ef_construction=1, ef_search=1)
    found = searcher(corpus(vectors), spec, tmp_path)
    for k in (1, 50, 600):
        rankings = found.search(np.asarray([[1.0, 0.0], [-1.0, 0.0]], np.float32), k)
        assert [len(ranking) for ranking in rankings] == [k, k]


def test_no_queries_no_rankings(opened: Searcher) -> None:
    """An empty batch is not an error."""
    assert opened.search(np.empty((0, 32), np.float32), 3) == []


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((1, 31), np.float32), r"shape \(1, 31\), the index takes \[n, 32\]"),
        (np.zeros(32, np.float32), r"shape \(32,\)"),
        (np.full((1, 32), np.nan, np.float32), "query vector 0 is not finite"),
        (np.vstack([np.zeros(32), np.full(32, np.inf)]), "query vector 1 is not finite"),
    ],
)
def test_unusable_queries_are_refused(opened: Searcher, vectors: np.ndarray, message: str) -> None:
    """The library reads past a short row and sorts NaN anywhere; neither raises."""
    with pytest.raises(DataError, match=message):
        opened.search(vectors, 3)


def test_k_below_one_is_refused(opened: Searcher) -> None:
    """Zero documents is a caller's mistake."""
    with pytest.raises(DataError, match="k is 0"):
        opened.search(np.zeros((1, 32), np.float32), 0)


def test_only_encoders_of_the_space_may_search(opened: Searcher) -> None:
    """Vectors of another space have the right width and give confident nonsense."""
    opened.check_query_encoder(query_card(card(32)))
    opened.check_query_encoder(card(32))
    with pytest.raises(EncoderMismatch, match="cannot search documents encoded by 'documents'"):
        opened.check_query_encoder(card(32, weights="other"))
    with pytest.raises(EncoderMismatch, match="document side only"):
        opened.check_query_encoder(replace(card(32), role="document"))


def test_another_query_encoder_than_the_recorded_one_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every student of a space may search, but the recall in the manifest is that of one."""
    documents = corpus(clustered(1, 30, 8))
    right = query_card(documents.card)
    other = replace(right, weights_hash="other", query_prefix="query: ")
    build_index(documents, IndexSpec(), tmp_path, right)
    with Searcher.open(tmp_path) as searcher:
        assert searcher.query_encoder == right.fingerprint
        searcher.check_query_encoder(right)
        assert searcher.is_tuned_for(right)
        assert caplog.messages == []
        for number, one in enumerate((other, replace(right, weights_hash="of the graph", precision="int8-dynamic")), 1):
            searcher.check_query_encoder(one)
            assert not searcher.is_tuned_for(one)
            assert len(caplog.messages) == number
        assert "was made for query encoder" in caplog.text
        assert "run `rkd index tune`" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("query_prefix", "", "has query_prefix '' instead of 'query: '"),
        ("query_prefix", "query:", "has query_prefix 'query:' instead of 'query: '"),
        ("pooling", "cls", "has pooling 'cls' instead of 'mean'"),
        ("max_length", 16, "has max_length 16 instead of 32"),
        ("normalize", True, "has normalize True instead of False"),
    ],
)
def test_the_right_model_with_another_prefix_is_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    """Its vectors lie in the space and every ranking looks sound; ten points of nDCG are gone in silence."""
    documents = corpus(clustered(1, 30, 8))
    right = replace(query_card(documents.card), query_prefix="query: ")
    wrong = replace(right, **{key: value})
    build_index(documents, IndexSpec(), tmp_path, right)
    with Searcher.open(tmp_path) as searcher, pytest.raises(EncoderMismatch, match=message):
        searcher.check_query_encoder(wrong)
    asked = replace(corpus(clustered(2, 20, 8)), card=wrong)
    retuned = retune(tmp_path, asked, 0.5)
    with Searcher.open(retuned) as searcher:
        searcher.check_query_encoder(wrong)
        with pytest.raises(EncoderMismatch, match=f"{key} .* instead of"):
            searcher.check_query_encoder(right)


def test_a_version_without_the_card_of_its_query_encoder_still_opens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Versions of earlier releases hold its fingerprint alone; a server that refused them would be an outage."""
    documents = corpus(clustered(1, 30, 8))
    student = query_card(documents.card)
    for asker, wrong in ((student, replace(student, query_prefix="query: ")), (documents.card, None)):
        version = build_index(documents, IndexSpec(), tmp_path, asker)
        path = version / "manifest.json"
        raw = json.loads(path.read_text())
        assert raw["content"].pop("query_card")["fingerprint"] == asker.fingerprint
        path.chmod(0o644)
        path.write_text(json.dumps(raw))
        old = version.rename(version.with_name(f"{version.name[:11]}{file_sha256(path)[:8]}"))
        with Searcher.open(old) as searcher:
            assert searcher.query_encoder == asker.fingerprint
            if wrong is not None:
                searcher.check_query_encoder(wrong)
                assert "was made for query encoder" in caplog.text
                continue
            # The documents' own encoder is known all the same.
            kept = replace(asker, query_prefix="query: ", space=asker.space_fingerprint)
            with pytest.raises(EncoderMismatch, match="has query_prefix 'query: ' instead of ''"):
                searcher.check_query_encoder(kept)


def test_a_version_for_another_query_encoder_is_another_version(tmp_path: Path) -> None:
    """Found again by its documents alone, it goes on naming the encoder of the first build."""
    documents = corpus(clustered(1, 30, 8))
    cards = [query_card(documents.card), replace(query_card(documents.card), weights_hash="other")]
    versions = [build_index(documents, IndexSpec(), tmp_path, one) for one in (*cards, None)]
    assert len(set(versions)) == 3
    for version, expected in zip(versions, [cards[0].fingerprint, cards[1].fingerprint, ""], strict=True):
        assert Searcher.open(version).query_encoder == expected
    asked = replace(corpus(clustered(2, 20, 8)), card=cards[0])
    tuned = build_index(documents, IndexSpec("hnsw", target_recall=0.5), tmp_path, queries=asked)
    assert Searcher.open(tuned).query_encoder == cards[0].fingerprint


def test_properties_tell_what_is_open(opened: Searcher, big: EncodedCorpus) -> None:
    """The server advertises these."""
    assert (opened.count, opened.dimension, opened.card) == (2000, 32, big.card)
    assert opened.version.startswith("0000000001-")
    assert opened.bytes_per_doc >= 32 + len("d00000")
    assert opened.bytes_per_doc < 600


def test_a_search_leaves_the_threads_of_others_alone(big: EncodedCorpus, tmp_path: Path) -> None:
    """Without it a search would change how torch sums afterwards, and a resumed training its loss curve."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        opened = searcher(big, HNSW, tmp_path)
        assert faiss.omp_get_max_threads() == 2
        opened.search(big.vectors[:3], 5)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)
