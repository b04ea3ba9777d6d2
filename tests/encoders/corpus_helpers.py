"""A collection and an encoder small enough to be killed a hundred times."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from retrieval_kd.artifacts import fingerprint
from retrieval_kd.collections.base import Document
from retrieval_kd.encoders.card import EncoderCard, Role

DIMENSION = 6


def card(normalize: bool = True, role: Role = "symmetric", weights: str = "w") -> EncoderCard:
    return EncoderCard(
        "fake", "bert", 1, 1, "mean", normalize, (DIMENSION,), 32, "", "", "dot", "t", weights, role=role
    )


class FakeEncoder:
    """Vectors drawn from the hash of each text; counts what it encodes."""

    def __init__(self, its_card: EncoderCard | None = None, spoil: Callable[[np.ndarray], None] | None = None) -> None:
        self.card = its_card or card()
        self.seen: list[str] = []
        self._spoil = spoil

    def encode(self, texts: Sequence[str], side: str) -> np.ndarray:
        self.seen += texts
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) for text in texts]
        vectors = np.stack([np.random.default_rng(seed).normal(size=DIMENSION) for seed in seeds]).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        if self._spoil is not None:
            self._spoil(vectors)
        return vectors


class SlowEncoder(FakeEncoder):
    """Takes a while for each window, so that a run can be killed in its midst."""

    def encode(self, texts: Sequence[str], side: str) -> np.ndarray:
        time.sleep(0.1)
        return super().encode(texts, side)


class FakeCollection:
    """Documents given as pairs of id and text."""

    name = "fake"

    def __init__(self, documents: Sequence[tuple[str, str]]) -> None:
        self._documents = documents
        self.corpus_fingerprint = fingerprint(ascii(list(documents)))

    def documents(self) -> Iterator[Document]:
        return (Document(doc_id, "", text) for doc_id, text in self._documents)


def some_collection(count: int = 11) -> FakeCollection:
    # Ids descend in collection order and sort as strings ("d10" before "d2"): any mix-up of orders shows.
    return FakeCollection([(f"d{i}", f"text {i}") for i in reversed(range(count))])
