"""Searching an index version: candidates first, then one exact way of scoring them.

faiss sums in another order when it gets twenty queries than when it gets one (faiss#563), so its
scores only choose candidates. Every candidate is then scored in float64, row by row, rounded to
float32 and ordered by :func:`retrieval_kd.runs.rank`: a query's ranking never depends on its company.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt

from index.manifest import GRAPH, IndexManifest, check_files
from index.store import VERSIONS, IndexStore
from index.threads import faiss_threads
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, require_same_space
from retrieval_kd.encoders.corpus import IDS, VECTORS, map_vectors, read_ids
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.runs import Ranking, Scores, rank

Rows = npt.NDArray[np.int64]

_MARGIN = 32
_RESCORED_AT_ONCE = 4096
_UNIT_ROUNDOFF = 2.0**-24


class Searcher:
    """An index version opened for searching; any number of threads may search at once."""

    def __init__(
        self, version: str, manifest: IndexManifest, ids: list[str], vectors: Vectors, graph: Any | None, threads: int
    ) -> None:
        """Hold an opened version; use :meth:`open`."""
        self._version = version
        self._manifest = manifest
        self._ids = ids
        self._vectors = vectors
        self._graph = graph
        self._threads = threads

    @classmethod
    def open(cls, path: Path, threads: int = 1) -> Searcher:
        """Check every byte of a version and map it.

        Args:
            path: A version's folder, or a store, whose current version is opened.
            threads: Threads of one call. One suits a server, which runs calls side by side; a lone
                caller with many queries may give the number of cores.

        Raises:
            ArtifactError: nothing is published, or a file is missing, torn or changed; names the file.
        """
        folder = path if path.parent.name == VERSIONS else IndexStore(path).current()
        manifest = IndexManifest.load(folder)
        check_files(folder, manifest)
        content = manifest.content
        ids, vectors = read_ids(folder / IDS), np.asarray(map_vectors(folder / VECTORS))
        graph = _map_graph(folder / GRAPH) if content.index.kind == "hnsw" else None
        shapes = [(len(ids), content.dimension), vectors.shape]
        if graph is not None:
            shapes.append((graph.ntotal, graph.d))
        if any(shape != (content.count, content.dimension) for shape in shapes):
            raise ArtifactError(f"{folder}: ids, vectors and graph are of different sizes; build the index again")
        return cls(folder.name, manifest, ids, vectors, graph, threads)

    @property
    def version(self) -> str:
        """Return the version's name."""
        return self._version

    @property
    def kind(self) -> Literal["flat", "hnsw"]:
        """Return how the index is searched."""
        return self._manifest.content.index.kind

    @property
    def count(self) -> int:
        """Return the number of documents."""
        return self._manifest.content.count

    @property
    def dimension(self) -> int:
        """Return the width of the vectors."""
        return self._manifest.content.dimension

    @property
    def card(self) -> EncoderCard:
        """Return the document encoder's card."""
        return self._manifest.content.document_encoder

    @property
    def bytes_per_doc(self) -> float:
        """Return the size of the version's files for each document, in bytes."""
        return self._manifest.bytes / self.count

    def check_query_encoder(self, card: EncoderCard) -> None:
        """Refuse a query encoder whose vectors do not lie in the documents' space.

        Raises:
            EncoderMismatch: names both encoders.
        """
        require_same_space(card, self.card)

    def search(self, vectors: Vectors, k: int) -> list[Ranking]:
        """Return the best documents for each query vector.

        ``flat`` is exact: the ranking is that of all float64 dot products rounded to float32, ties by
        id. ``hnsw`` ranks the candidates of its graph in the same way.

        Args:
            vectors: float32 ``[n, dimension]``, finite.
            k: Documents wanted; all there are when it is larger.

        Returns:
            One ranking for each row, of ``min(k, count)`` documents.

        Raises:
            DataError: vectors of another shape, or not finite, or ``k`` below 1.
        """
        queries = self._checked(vectors)
        if k < 1:
            raise DataError(f"k is {k}; ask for at least one document")
        k = min(k, self.count)
        with faiss_threads(self._threads):
            return self._exact(queries, k) if self._graph is None else self._walk(self._graph, queries, k)

    def _checked(self, vectors: Vectors) -> Vectors:
        queries = np.ascontiguousarray(vectors, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise DataError(
                f"query vectors of shape {queries.shape}, the index takes [n, {self.dimension}]; "
                f"encode queries for {self.card.name!r}"
            )
        if not np.isfinite(queries).all():
            row = int(np.argmin(np.isfinite(queries).all(axis=1)))
            raise DataError(f"query vector {row} is not finite; mend the encoder that made it")
        return queries

    def _exact(self, queries: Vectors, k: int) -> list[Ranking]:
        """Widen the candidates of each query until no document outside them can enter its ranking."""
        rankings: dict[int, Ranking] = {}
        open_queries = np.arange(len(queries))
        # The bound of a float32 dot product summed in any order (Higham 2002, section 3.1), and of its rounding.
        slack = 2 * (self.dimension + 2) * _UNIT_ROUNDOFF * self._manifest.content.largest_norm
        slacks = slack * np.linalg.norm(queries.astype(np.float64), axis=1)
        width = k + _MARGIN
        while len(open_queries) > 0:
            width = min(width, self.count)
            bounds, candidates = faiss.knn(
                queries[open_queries], self._vectors, width, metric=faiss.METRIC_INNER_PRODUCT
            )
            scores = self._rescored(queries[open_queries], candidates)
            undecided = []
            for i, query in enumerate(open_queries.tolist()):
                worst_kept = np.partition(scores[i], width - k)[width - k]
                if width == self.count or bounds[i, -1] + slacks[query] < worst_kept:
                    rankings[query] = self._ranked(candidates[i], scores[i], k)
                else:
                    undecided.append(query)
            open_queries = np.asarray(undecided, dtype=np.int64)
            width *= 4
        return [rankings[query] for query in range(len(queries))]

    def _walk(self, graph: Any, queries: Vectors, k: int) -> list[Ranking]:
        """Rescore all that the walk has found: a longer ranking then begins with the shorter one."""
        width = min(max(k, self._manifest.content.index.ef_search), self.count)
        parameters = faiss.SearchParametersHNSW(efSearch=width)  # type: ignore[attr-defined]  # faiss's stubs lack it
        _, candidates = graph.search(queries, width, params=parameters)
        scores = self._rescored(queries, candidates)
        rankings = []
        for i in range(len(queries)):
            found = candidates[i] >= 0
            # A walk cannot reach nodes that the graph has cut off; the ranking is as long as promised all the same.
            if np.count_nonzero(found) < k:
                rankings += self._exact(queries[i : i + 1], k)
            else:
                rankings.append(self._ranked(candidates[i][found], scores[i][found], k))
        return rankings

    def _rescored(self, queries: Vectors, candidates: Rows) -> Scores:
        """Return float32 ``[n, width]`` dot products, each summed in float64 in an order that only its row decides."""
        width = candidates.shape[1]
        rows = candidates.ravel()
        scores = np.empty(rows.shape, dtype=np.float32)
        for part in _slices(len(rows)):
            documents = self._vectors[rows[part]].astype(np.float64)
            documents *= queries[np.arange(part.start, part.stop) // width]
            scores[part] = documents.sum(axis=1)
        return scores.reshape(candidates.shape)

    def _ranked(self, rows: Rows, scores: Scores, k: int) -> Ranking:
        return rank([self._ids[row] for row in rows.tolist()], scores, k)


def _slices(count: int) -> Iterator[slice]:
    for start in range(0, count, _RESCORED_AT_ONCE):
        yield slice(start, min(start + _RESCORED_AT_ONCE, count))


def _map_graph(path: Path) -> Any:
    """Open a graph without reading it; faiss calls this flag temporary, so it stands here alone."""
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: not a graph faiss can read ({reason}); build the index again") from None
