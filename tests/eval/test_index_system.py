"""A query encoder over a real index ranks as plain dot products do."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_collection_folder, tiny_encoder

from eval.specs import SystemSpec
from eval.suite import Setup, run_suite
from eval.systems import IndexSystem, assess
from index.build import build_index
from index.search import Searcher
from retrieval_kd.collections import open_collection
from retrieval_kd.encoders.card import EncoderCard, Side
from retrieval_kd.encoders.corpus import EncodedCorpus, encode_corpus, encode_texts
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.errors import DataError, EncoderMismatch
from retrieval_kd.export.onnx_export import export_encoder
from retrieval_kd.export.parity import Probes
from retrieval_kd.recipes.schema import CollectionSpec, ExportSpec, IndexSpec

QUICK = Setup(timed=0)
CARD = EncoderCard("words", "bag", 1, 1234, "mean", True, (16,), 64, "", "", "cosine", "t" * 64, "w" * 64)


class Words:
    """A deterministic encoder: the normalised sum of a random vector for each word."""

    def __init__(self, card: EncoderCard = CARD) -> None:
        self.card = card

    def encode(self, texts: Sequence[str], side: Side) -> np.ndarray:
        """Encode texts."""
        rows = [
            sum(np.random.default_rng(zlib.crc32(word.encode())).normal(size=16) for word in text.split())
            for text in texts
        ]
        vectors = np.asarray(rows, dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncodedCorpus]:
    texts = {f"d{number:02d}": f"document number {number} about topic{number % 7}" for number in range(40)}
    return encode_texts(Words(), texts, "document", tmp_path_factory.mktemp("corpus"))


def test_index_system_ranks_like_dot_products(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """Queries cross several blocks; each must keep its own ranking and cost must be filled in."""
    searcher = Searcher.open(build_index(corpus, IndexSpec(), tmp_path / "store"))
    queries = {f"q{number:03d}": f"topic{number % 7} number {number % 40}" for number in range(130)}
    qrels = {query_id: {f"d{number % 40:02d}": 1} for number, query_id in enumerate(queries)}
    result = assess(IndexSystem("words", "bi-encoder", Words(), searcher), queries, qrels, ["R@5"], depth=5, timed=3)
    assert result.run is not None
    expected = Words().encode(list(queries.values()), "query").astype(np.float64) @ corpus.vectors.astype(np.float64).T
    for row, query_id in enumerate(queries):
        best = expected[row, [corpus.row_of[doc_id] for doc_id in result.run[query_id].doc_ids]]
        np.testing.assert_allclose(best, np.sort(expected[row])[::-1][:5], atol=1e-6)
    assert result.facts.params == 1234
    assert result.facts.bytes_per_doc is not None
    assert result.facts.bytes_per_doc >= 64
    assert result.facts.encode_ms_p50 is not None
    assert result.facts.query_ms_p50 is not None
    assert 0 < result.facts.encode_ms_p50 <= result.facts.query_ms_p50 * 1.5


def test_an_encoder_of_another_space_is_refused(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """Its dot products would be noise and its nDCG would read as a bad student."""
    searcher = Searcher.open(build_index(corpus, IndexSpec(), tmp_path / "store"))
    stranger = Words(replace(CARD, weights_hash="x" * 64))
    with pytest.raises(EncoderMismatch, match="cannot search documents"):
        IndexSystem("stranger", "student", stranger, searcher)


def test_an_index_of_other_texts_is_refused_unless_updates_explain_them(tmp_path: Path) -> None:
    """With the same ids and as many documents, an index of an older corpus was measured as a bad system."""
    collection, other = (tiny_collection_folder(tmp_path / name, seed=seed) for name, seed in (("now", 0), ("old", 1)))
    probes = Probes({"0": "w0"}, {"d": "w0 w1"}, {"0": {"d": 1}})
    export_encoder(tiny_encoder(), tmp_path / "encoder", ExportSpec(), probes)
    encoder = OnnxEncoder.load(tmp_path / "encoder")

    def indexed(name: str, *paths: Path) -> Path:
        base, *distractors = map(str, paths)
        documents = open_collection(CollectionSpec(base, tuple(distractors)))
        encode_corpus(encoder, documents, tmp_path / f"{name}-vectors")
        corpus = EncodedCorpus.load(tmp_path / f"{name}-vectors")
        return build_index(corpus, IndexSpec(), tmp_path / name, collection=documents, fields=["text"])

    def measured(store: Path, setup: Setup = QUICK) -> float:
        specs = [SystemSpec.parse(f"index:{store},encoder={tmp_path / 'encoder'}")]
        (report,) = run_suite([str(collection)], specs, setup, tmp_path / "cache", tmp_path / "out", "rkd eval beir")
        return float(report["systems"][0]["nDCG@10"])

    version, old = indexed("right", collection), indexed("wrong", other)
    good = measured(tmp_path / "right")
    assert measured(version) == good
    assert measured(indexed("more", collection, other).parent.parent, Setup(timed=0, distractors=(str(other),))) > 0
    for store in (tmp_path / "wrong", old):
        with pytest.raises(DataError, match=r"was built from other documents than now has .*; build it again") as error:
            measured(store)
        assert "\n" not in str(error.value)
    texts = {
        document.doc_id: document.content for document in open_collection(CollectionSpec(str(collection))).documents()
    }
    with Searcher.open(old) as searcher:
        fields = [{"text": text} for text in texts.values()]
        searcher.upsert(list(texts), encoder.encode(list(texts.values()), "document"), fields)
    assert measured(old) == good
    indexed("wrong", other)
    assert measured(tmp_path / "wrong") == good
