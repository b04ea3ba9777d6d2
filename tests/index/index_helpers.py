"""Small corpora with vectors of our choosing, and the brute force that every index is held against."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from retrieval_kd.artifacts import fingerprint
from retrieval_kd.collections.base import Document, Qrels
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.recipes.schema import IndexSpec

KINDS = {
    "exact": IndexSpec("exact"),
    "exact-float16": IndexSpec("exact", storage="float16"),
    "exact-sq8": IndexSpec("exact", storage="sq8"),
    "fastscan": IndexSpec("fastscan", oversample=20),
    "fastscan-float16": IndexSpec("fastscan", storage="float16", oversample=20),
    "ivf": IndexSpec("ivf", lists=16, probes=12),
    "ivf-pq": IndexSpec("ivf-pq", lists=16, probes=12, oversample=20),
    "ivf-rabitq": IndexSpec("ivf-rabitq", lists=16, probes=12, oversample=60),
    "hnsw": IndexSpec("hnsw", neighbours=16, ef_construction=40, ef_search=64),
    "hnsw-sq8-storage": IndexSpec("hnsw", storage="sq8", neighbours=16, ef_construction=40, ef_search=64),
    "hnsw-sq8": IndexSpec("hnsw-sq8", neighbours=16, ef_construction=40, ef_search=64),
}
"""Every kind that needs no GPU, over every storage that it reads in a way of its own."""


def card(dimension: int, weights: str = "w") -> EncoderCard:
    return EncoderCard("documents", "bert", 1, 1, "mean", False, (dimension,), 32, "", "", "dot", "t", weights)


def query_card(document: EncoderCard) -> EncoderCard:
    return replace(document, name="student", weights_hash="student").in_space_of(document, "query")


def corpus(vectors: np.ndarray, ids: Sequence[str] | None = None) -> EncodedCorpus:
    names = list(ids) if ids is not None else [f"d{i:05d}" for i in range(len(vectors))]
    order = sorted(range(len(names)), key=names.__getitem__)
    names, vectors = [names[i] for i in order], np.ascontiguousarray(vectors[order], dtype=np.float32)
    identity = fingerprint([names, vectors.tobytes().hex()])
    return EncodedCorpus(names, vectors, card(vectors.shape[1]), identity, fingerprint(names))


def clustered(seed: int, count: int, dimension: int, centres: int = 20) -> np.ndarray:
    """Return unit vectors around common centres, as texts of one topic are."""
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(0).normal(size=(centres, dimension))
    vectors = middle[rng.integers(centres, size=count)] + 0.7 * rng.normal(size=(count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def brute_force(documents: EncodedCorpus, query: np.ndarray, k: int) -> list[str]:
    """Return the ids by exact sums rounded to float32, ties by id."""
    scores = [
        float(np.float32(math.fsum(float(a) * float(b) for a, b in zip(row, query, strict=True))))
        for row in documents.vectors
    ]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], documents.ids[i]))
    return [documents.ids[i] for i in order[:k]]


class Documents:
    """A collection of documents that have fields and no text; no queries."""

    name = "documents"

    def __init__(self, fields: Mapping[str, Mapping[str, Any]]) -> None:
        self.fields = fields
        self.corpus_fingerprint = self.fingerprint = fingerprint({key: dict(value) for key, value in fields.items()})

    def owned(self, documents: EncodedCorpus) -> EncodedCorpus:
        """Return the vectors as if they had been encoded from this collection."""
        return replace(documents, texts_fingerprint=self.corpus_fingerprint)

    def documents(self) -> Iterator[Document]:
        # Not in the order of the ids, as real collections are not.
        for doc_id in sorted(self.fields, key=lambda doc_id: doc_id[::-1]):
            own = dict(self.fields[doc_id])
            yield Document(doc_id, own.pop("title", ""), own.pop("text", ""), own)

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        raise NotImplementedError

    def queries(self) -> Mapping[str, str]:
        return {}

    def splits(self) -> tuple[str, ...]:
        return ()

    def qrels(self, split: str) -> Qrels:
        raise NotImplementedError
