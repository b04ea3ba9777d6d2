"""The index of a recipe."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_collection_folder

from index.manifest import IndexManifest
from retrieval_kd.cli import pipeline
from retrieval_kd.collections.base import dev_queries
from retrieval_kd.collections.beir import BeirCollection
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.encoders.corpus import EncodedCorpus, encode_corpus, encode_texts
from retrieval_kd.recipes.schema import IndexSpec


class HashEncoder:
    """Vectors from the hashes of words."""

    card = EncoderCard("hash", "bert", 1, 1, "mean", False, (16,), 32, "", "", "dot", "t", "w")

    def encode(self, texts: list[str], side: str) -> np.ndarray:
        words = [[sum(map(ord, word)) % 16 for word in text.split()] for text in texts]
        return np.stack([np.bincount(row, minlength=16).astype(np.float32) for row in words])


@pytest.mark.parametrize(("kind", "tuned"), [("exact", False), ("fastscan", True), ("auto", True)])
def test_a_recipes_index_is_tuned_to_dev(kind: str, tuned: bool, tmp_path: Path) -> None:
    """Without it ``index.kind: auto`` would work from the command line and in no recipe."""
    tiny_collection_folder(tmp_path / "collection")
    collection = BeirCollection(tmp_path / "collection")
    encoder = HashEncoder()
    encode_corpus(encoder, collection, tmp_path / "vectors")
    corpus = EncodedCorpus.load(tmp_path / "vectors")
    workspace = SimpleNamespace(
        recipe=SimpleNamespace(index=IndexSpec(kind)),
        collection=collection,
        root=tmp_path / "artifacts",
        documents_for=lambda _: corpus,
        dev=dev_queries(collection),
        encoded_queries=lambda queries, encoder: encode_texts(encoder, queries, "query", tmp_path / "queries"),
    )
    content = IndexManifest.load(pipeline._version(workspace, encoder)).content
    assert content.requested.kind == kind
    assert bool(content.tuning) == tuned
    if tuned:
        assert content.tuning["queries"] == len(collection.qrels("dev"))
        assert content.tuning["recall"] >= 0.99
