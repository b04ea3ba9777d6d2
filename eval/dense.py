"""An encoder over a collection, searched exhaustively; vectors are made once and kept by fingerprint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.latency import encode_latency, latency
from eval.results import Facts
from retrieval_kd.artifacts import Spec, build
from retrieval_kd.collections.base import Collection
from retrieval_kd.collections.joined import JoinedCollection
from retrieval_kd.encoders.base import Encoder, Vectors
from retrieval_kd.encoders.card import require_same_space
from retrieval_kd.encoders.corpus import (
    IDS,
    VECTORS,
    EncodedCorpus,
    encode_corpus,
    map_vectors,
    read_ids,
    write_ids,
    write_vectors,
)
from retrieval_kd.encoders.matryoshka import truncated
from retrieval_kd.exact import exact_search
from retrieval_kd.progress import silence
from retrieval_kd.runs import Run

_BLOCK_ROWS = 16384


class DenseSystem:
    """A query encoder over encoded documents, compared with every one of them."""

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        corpus: EncodedCorpus,
        role: str = "bi-encoder",
        document_encoder: Encoder | None = None,
    ) -> None:
        """Put a query encoder before vectors; the document encoder is kept for benches only.

        Raises:
            EncoderMismatch: the encoder's vectors do not lie in the documents' space.
        """
        require_same_space(encoder.card, corpus.card)
        self.name = name
        self.role = role
        self.encoder = encoder
        self.corpus = corpus
        self.document_encoder = document_encoder

    def run(self, queries: Mapping[str, str], depth: int) -> Run:
        """Encode the queries and compare them with every document."""
        return exact_search(list(queries), self.encoder.encode(list(queries.values()), "query"), self.corpus, depth)

    def staged(self, text: str, depth: int) -> dict[str, float]:
        """Answer one query and return the seconds of its stages."""
        start = time.perf_counter()
        vectors = self.encoder.encode([text], "query")
        done = time.perf_counter()
        exact_search(["query"], vectors, self.corpus, depth)
        return {"encode": done - start, "search": time.perf_counter() - done}

    def facts(self, queries: Mapping[str, str], depth: int) -> Facts:
        """Time encoding alone, and encoding with exhaustive search."""
        encoding = encode_latency(self.encoder, list(queries.values()))
        with silence():
            whole = latency(lambda item: self.run(dict([item]), depth), list(queries.items()))
        return Facts(
            params=self.encoder.card.parameters,
            encode_ms_p50=encoding.p50_ms,
            query_ms_p50=whole.p50_ms,
            query_ms_p95=whole.p95_ms,
            bytes_per_doc=float(self.corpus.vectors.itemsize * self.corpus.card.dimension),
        )


def encoded(encoder: Encoder, collection: Collection, cache: Path) -> EncodedCorpus:
    """Return a collection's vectors, encoding only corpora that no earlier call has encoded.

    The parts of a collection with distractors are kept one by one: a corpus that is the base of one
    collection and a distractor of the next is encoded once.

    Args:
        encoder: The document encoder.
        collection: The documents.
        cache: Where vectors are kept, named by encoder and corpus.
    """
    if isinstance(collection, JoinedCollection):
        parts = [(prefix, encoded(encoder, part, cache)) for prefix, part in collection.parts]
        return _joined(parts, collection.corpus_fingerprint, cache)
    card = encoder.card
    inputs = {"encoder": card.fingerprint, "space": card.space, "corpus": collection.corpus_fingerprint}
    folder = cache / f"encode-{Spec('encode', {}, inputs).fingerprint[:12]}"
    encode_corpus(encoder, collection, folder)
    return EncodedCorpus.load(folder)


def truncated_corpus(corpus: EncodedCorpus, dimension: int, cache: Path) -> EncodedCorpus:
    """Return the vectors' first ``dimension`` numbers, kept in ``cache`` under their own identity."""
    card = corpus.card.truncated(dimension)
    spec = Spec("truncate", {"dimension": dimension}, {"vectors": corpus.fingerprint})

    def work(folder: Path) -> Mapping[str, Any]:
        blocks = (
            truncated(corpus.vectors[start : start + _BLOCK_ROWS], dimension, card.normalize)
            for start in range(0, len(corpus.ids), _BLOCK_ROWS)
        )
        write_vectors(folder / VECTORS, blocks, (len(corpus.ids), dimension))
        return {"texts": len(corpus.ids), "dimension": dimension}

    folder = cache / f"truncate-{spec.fingerprint[:12]}"
    artifact = build(folder, spec, work)
    artifact.verify()
    return EncodedCorpus(
        corpus.ids, map_vectors(folder / VECTORS), card, artifact.fingerprint, corpus.texts_fingerprint
    )


def _joined(parts: Sequence[tuple[str, EncodedCorpus]], texts_fingerprint: str, cache: Path) -> EncodedCorpus:
    """Put the vectors of several corpora together under prefixed ids, in ascending order of id."""
    inputs = {f"part {prefix}": part.fingerprint for prefix, part in parts}
    spec = Spec("join-vectors", {}, inputs)
    card = parts[0][1].card

    def work(folder: Path) -> Mapping[str, Any]:
        ids = [prefix + doc_id for prefix, part in parts for doc_id in part.ids]
        order = np.asarray(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
        shape = (len(ids), card.dimension)
        write_vectors(folder / VECTORS, _gathered([part.vectors for _, part in parts], order), shape)
        write_ids(folder / IDS, (ids[row] for row in order))
        return {"texts": len(ids), "dimension": card.dimension}

    folder = cache / f"join-vectors-{spec.fingerprint[:12]}"
    artifact = build(folder, spec, work)
    artifact.verify()
    ids = read_ids(folder / IDS)
    return EncodedCorpus(ids, map_vectors(folder / VECTORS), card, artifact.fingerprint, texts_fingerprint)


def _gathered(parts: Sequence[Vectors], order: npt.NDArray[np.int64]) -> Iterator[Vectors]:
    ends = np.cumsum([len(part) for part in parts])
    for start in range(0, len(order), _BLOCK_ROWS):
        rows = order[start : start + _BLOCK_ROWS]
        block = np.empty((len(rows), parts[0].shape[1]), dtype=np.float32)
        owner = np.searchsorted(ends, rows, side="right")
        for number in np.unique(owner):
            mine = owner == number
            block[mine] = parts[number][rows[mine] - (ends[number] - len(parts[number]))]
        yield block
