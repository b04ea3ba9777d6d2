"""Building an index version from an encoded corpus."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

from index.manifest import GRAPH, IndexContent
from index.store import IndexStore
from index.threads import faiss_threads
from retrieval_kd.artifacts import atomic_write
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, require_same_space
from retrieval_kd.encoders.corpus import IDS, VECTORS, EncodedCorpus, write_ids, write_vectors
from retrieval_kd.errors import DataError
from retrieval_kd.progress import progress
from retrieval_kd.recipes.schema import IndexSpec

_BLOCK_ROWS = 1024


def build_index(corpus: EncodedCorpus, spec: IndexSpec, store: Path, query_card: EncoderCard | None = None) -> Path:
    """Build an index version and make it the store's current one; do nothing if it is there already.

    ``flat`` compares a query with ``vectors.npy`` itself; ``hnsw`` adds the graph ``ann.faiss``
    (Malkov and Yashunin, arXiv 1603.09320), built by one thread because a graph built by several
    differs from run to run (faiss#2548).

    Args:
        corpus: The documents' vectors.
        spec: How they will be searched.
        store: The store's folder, made if absent.
        query_card: The encoder that will search; checked when given.

    Returns:
        The folder of the version.

    Raises:
        EncoderMismatch: queries would not lie in the documents' space.
        DataError: no documents, or a vector that is not finite; names the document.
        ArtifactError: the store cannot be written; what was published stays.
    """
    if query_card is not None:
        require_same_space(query_card, corpus.card)
    if corpus.card.similarity == "cosine" and not corpus.card.normalize:
        raise DataError(
            f"encoder {corpus.card.name!r} compares by cosine but does not normalise, and an index compares by "
            "dot product; set normalize in its card and encode again"
        )
    content = IndexContent(
        index=spec,
        count=len(corpus.ids),
        dimension=corpus.card.dimension,
        largest_norm=_largest_norm(corpus),
        document_encoder=corpus.card,
        encoding_fingerprint=corpus.fingerprint,
        corpus_fingerprint=corpus.texts_fingerprint,
    )

    def write(folder: Path) -> None:
        write_ids(folder / IDS, corpus.ids)
        write_vectors(folder / VECTORS, _blocks(corpus.vectors), (content.count, content.dimension))
        if spec.kind == "hnsw":
            _write_graph(folder / GRAPH, corpus.vectors, spec)

    return IndexStore(store).publish(content, write)


def _largest_norm(corpus: EncodedCorpus) -> float:
    if not corpus.ids:
        raise DataError("no documents to index; encode a corpus that has some")
    largest = 0.0
    for start, block in zip(itertools.count(0, _BLOCK_ROWS), _blocks(corpus.vectors), strict=False):
        norms = np.linalg.norm(block.astype(np.float64), axis=1)
        if not np.isfinite(norms).all():
            row = start + int(np.argmin(np.isfinite(norms)))
            raise DataError(f"document {corpus.ids[row]!r}: its vector is not finite; encode the corpus again")
        largest = max(largest, float(norms.max()))
    return largest


def _write_graph(path: Path, vectors: Vectors, spec: IndexSpec) -> None:
    graph = faiss.IndexHNSWFlat(vectors.shape[1], spec.neighbours, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = spec.ef_construction
    graph.hnsw.efSearch = spec.ef_search
    with faiss_threads(1), progress("link the graph", len(vectors), "documents") as advance:
        for block in _blocks(vectors):
            graph.add(block)
            advance(len(block))
    # faiss's own file writer loses an error of the last flush; a callback raises it.
    with atomic_write(path, "wb") as file:
        writer = faiss.PyCallbackIOWriter(file.write)  # type: ignore[attr-defined]  # faiss's stubs lack it
        faiss.write_index(graph, writer)


def _blocks(vectors: Vectors) -> Iterator[Vectors]:
    for start in range(0, len(vectors), _BLOCK_ROWS):
        yield np.ascontiguousarray(vectors[start : start + _BLOCK_ROWS])
