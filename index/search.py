"""Searching an index version: a kind proposes documents, then one exact way of scoring them.

faiss sums in another order when it gets twenty queries than when it gets one (faiss#563), and codes give scores
of their own, so a kind only proposes. Whatever of its proposals can be among the best is scored in float64, row by
row, rounded to float32 and ordered by :func:`retrieval_kd.runs.rank`: a query's ranking never depends on its
company.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from index.ann import faiss, selector
from index.documents import StoredDocuments, require_stored
from index.filters import Filter, Mask
from index.ids import IDS, DocumentIds
from index.kinds import Effort, Proposer
from index.manifest import IndexContent, IndexManifest, check_files, check_sizes
from index.probes import PROBE_DEPTH, Probes
from index.store import VERSIONS, IndexStore, Lease, hold
from index.threads import faiss_threads
from index.vectors import Rows, Storage, StoredVectors
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, require_same_space
from retrieval_kd.encoders.matryoshka import truncated
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.runs import Ranking, Scores, rank

_MARGIN = 32
_BLOCK_ROWS = 16384
_QUERIES_AT_ONCE = 64
# Below this many documents, or multiply-adds, scoring all that a filter selects is faster than walking around it.
_SCORED_OUTRIGHT = 10_000
_BUDGET = 1 << 23
# The least share of the probes' documents that must be found again, and how far a score may lie off.
_PROBES_FOUND = 0.95
_PROBE_TOLERANCE = 1e-4


class Opened:
    """The files of a version, mapped, and what may be asked of them."""

    def __init__(self, folder: Path, content: IndexContent) -> None:
        """Map the files of a folder.

        Raises:
            ArtifactError: a file is missing, not what was written, or of another size than the rest.
        """
        self.content = content
        self.ids = DocumentIds.open(folder / IDS)
        self.vectors = StoredVectors.open(folder, content.index.storage)
        self.proposer = Proposer.open(folder, self.vectors, content.index)
        self.documents = StoredDocuments.open(folder) if content.fields else None
        shapes = [(len(self.ids), content.dimension), self.vectors.array.shape]
        if self.documents is not None:
            shapes.append((self.documents.count, content.dimension))
        if any(shape != (content.count, content.dimension) for shape in shapes):
            raise ArtifactError(f"{folder}: ids, vectors and fields are of different sizes; build the index again")

    def search(self, queries: Vectors, k: int, exact: bool, mask: Mask | None, effort: Effort) -> list[Ranking]:
        """Return a ranking for each row of float32 ``[n, d]``, ``d`` as stored, of at most ``k`` documents.

        Args:
            queries: The queries.
            k: Documents wanted, at least 1.
            exact: Leave nothing to a kind's proposals.
            mask: bool ``[count]``, the documents that may be ranked; all when None.
            effort: How hard the kind looks.
        """
        if mask is not None:
            selected = np.flatnonzero(mask)
            if len(selected) <= max(_SCORED_OUTRIGHT, _BUDGET // self.content.dimension):
                return self._score_all(queries, selected, min(k, len(selected)))
            k = min(k, len(selected))
        k = min(k, self.content.count)
        if exact or self.proposer is None:
            return self._scan(queries, k, mask)
        return self._proposed(self.proposer, queries, k, mask, effort)

    def _proposed(
        self, proposer: Proposer, queries: Vectors, k: int, mask: Mask | None, effort: Effort
    ) -> list[Ranking]:
        scores, rows = proposer.propose(queries, k, effort, mask)
        found = rows >= 0
        enough = np.count_nonzero(found, axis=1) >= k
        if not proposer.scores_are_dots:
            scores = self._float32_dots(queries, np.where(found, rows, 0))
        scores = np.where(found, scores, -np.inf)
        rankings = self._ranked(queries, scores, rows, k, self._bound(queries))
        # A walk cannot reach nodes that the graph has cut off; the ranking is as long as promised all the same.
        for i in np.flatnonzero(~enough).tolist():
            rankings[i] = self._scan(queries[i : i + 1], k, mask)[0]
        return rankings

    def _scan(self, queries: Vectors, k: int, mask: Mask | None) -> list[Ranking]:
        """Widen the candidates of each query until no document outside them can enter its ranking."""
        rankings: dict[int, Ranking] = {}
        open_queries = np.arange(len(queries))
        bounds = self._bound(queries)
        selected = self.content.count if mask is None else int(np.count_nonzero(mask))
        parameters = None if mask is None else faiss.SearchParameters(sel=selector(mask))
        width = k + _MARGIN
        while len(open_queries) > 0:
            width = min(width, selected)
            scores, rows = self.vectors.scan.search(queries[open_queries], width, params=parameters)
            kth = scores[:, k - 1]
            decided = (scores[:, -1] < kth - 2 * bounds[open_queries]) | (width == selected)
            done = open_queries[decided]
            ranked = self._ranked(queries[done], scores[decided], rows[decided], k, bounds[done])
            rankings.update(zip(done.tolist(), ranked, strict=True))
            open_queries = open_queries[~decided]
            width *= 4
        return [rankings[query] for query in range(len(queries))]

    def _score_all(self, queries: Vectors, selected: Rows, k: int) -> list[Ranking]:
        if k == 0:
            return [rank([], np.empty(0, np.float32))] * len(queries)
        rankings: list[Ranking] = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            some = queries[start : start + _QUERIES_AT_ONCE]
            scores = np.empty((len(some), len(selected)), dtype=np.float32)
            for first in range(0, len(selected), _BLOCK_ROWS):
                part = slice(first, first + _BLOCK_ROWS)
                np.matmul(some, self.vectors.rows(selected[part]).T, out=scores[:, part])
            rows = np.broadcast_to(selected, scores.shape)
            rankings += self._ranked(some, scores, rows, k, self._bound(some))
        return rankings

    def _ranked(self, queries: Vectors, scores: Scores, rows: Rows, k: int, bounds: Any) -> list[Ranking]:
        """Rank the best ``k`` of each query's candidates, given their scores to within a bound."""
        width = scores.shape[1]
        kth = np.partition(scores, width - k, axis=1)[:, width - k]
        floor = np.nextafter((kth - 2 * bounds).astype(np.float32), np.float32(-np.inf))
        of_query, places = np.nonzero(scores >= floor[:, None])
        kept = rows[of_query, places]
        known = kept >= 0
        of_query, kept = of_query[known], kept[known]
        exact = self.vectors.dots(queries, kept, of_query)
        ends = np.cumsum(np.bincount(of_query, minlength=len(queries))).tolist()
        doc_ids = [self.ids[row] for row in kept.tolist()]
        return [rank(doc_ids[a:b], exact[a:b], k) for a, b in itertools.pairwise([0, *ends])]

    def _float32_dots(self, queries: Vectors, rows: Rows) -> Scores:
        scores = np.empty(rows.shape, dtype=np.float32)
        for i, query in enumerate(queries):
            np.dot(self.vectors.rows(rows[i]), query, out=scores[i])
        return scores

    def _bound(self, queries: Vectors) -> Any:
        return self.vectors.error_bound(queries, self.content.largest_norm)


class Searcher:
    """An index version opened for searching; any number of threads may search at once.

    It keeps its version from being collected until it is closed or forgotten.
    """

    def __init__(self, folder: Path, manifest: IndexManifest, lease: Lease, threads: int) -> None:
        """Map a version that is held; use :meth:`open`."""
        self._folder = folder
        self._manifest = manifest
        self._content = manifest.content
        self._lease = lease
        self._threads = threads
        self._opened = Opened(folder, manifest.content)

    @classmethod
    def open(cls, path: Path, threads: int = 1, *, check: Literal["full", "sizes"] = "full") -> Searcher:
        """Check a version and map it.

        Args:
            path: A version's folder, or a store, whose current version is opened.
            threads: Threads of one call. One suits a server, which runs calls side by side; a lone
                caller with many queries may give the number of cores.
            check: ``full`` reads every byte and compares its sha256; ``sizes`` only the files' sizes, for a
                version that was checked on this machine before.

        Raises:
            ArtifactError: nothing is published, or a file is missing, torn or changed; names the file.
        """
        folder = path if path.parent.name == VERSIONS else IndexStore(path).current()
        lease = hold(folder)
        try:
            manifest = IndexManifest.load(folder)
            (check_files if check == "full" else check_sizes)(folder, manifest)
            return cls(folder, manifest, lease, threads)
        except BaseException:
            lease.release()
            raise

    def close(self) -> None:
        """Let the version be collected; nobody may be searching, and nobody may search again."""
        self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def version(self) -> str:
        """Return the version's name."""
        return self._folder.name

    @property
    def kind(self) -> str:
        """Return how the index is searched."""
        return self._content.index.kind

    @property
    def storage(self) -> Storage:
        """Return how the vectors are kept."""
        return self._content.index.storage

    @property
    def count(self) -> int:
        """Return the number of documents."""
        return self._content.count

    @property
    def dimension(self) -> int:
        """Return the width of the vectors that :meth:`search` takes: what the encoder makes."""
        return self.card.dimension

    @property
    def card(self) -> EncoderCard:
        """Return the document encoder's card."""
        return self._content.document_encoder

    @property
    def bytes_per_doc(self) -> float:
        """Return the size of the version's files for each document, in bytes."""
        return self._manifest.bytes / self.count

    @property
    def effort(self) -> Effort:
        """Return how hard the index looks unless a search says otherwise; tuned, or the spec's."""
        return Effort.of(self._content.index)

    @property
    def field_types(self) -> dict[str, str]:
        """Return the stored fields by name, and what each holds; see :mod:`index.documents`."""
        return dict(self._content.fields)

    def check_query_encoder(self, card: EncoderCard) -> None:
        """Refuse a query encoder whose vectors do not lie in the documents' space.

        Raises:
            EncoderMismatch: names both encoders.
        """
        require_same_space(card, self.card)

    def search(
        self,
        vectors: Vectors,
        k: int,
        *,
        exact: bool = False,
        filter: Filter | None = None,  # noqa: A002  the field's own word
        effort: Effort | None = None,
    ) -> list[Ranking]:
        """Return the best documents for each query vector.

        Kind ``exact`` is exact: the ranking is that of all float64 dot products rounded to float32, ties by
        id. The other kinds rank what they propose in the same way.

        Args:
            vectors: float32 ``[n, dimension]``, finite.
            k: Documents wanted; all there are when it is larger.
            exact: Compare with every document, whatever the kind.
            filter: Rank only documents that match. Few are compared outright; for many the kind looks harder,
                by as much as the filter leaves out.
            effort: How hard the kind looks; :attr:`effort` when None.

        Returns:
            One ranking for each row, of ``min(k, documents that match)`` documents.

        Raises:
            DataError: vectors of another shape, or not finite, ``k`` below 1, or a filter on a field that is not
                stored or holds other values.
        """
        queries = self._checked(vectors)
        if k < 1:
            raise DataError(f"k is {k}; ask for at least one document")
        if len(queries) == 0:
            return []
        mask = None if filter is None else self._mask(filter)
        with faiss_threads(self._threads):
            return self._opened.search(queries, k, exact, mask, effort or self.effort)

    def fields(self, doc_ids: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the named stored fields of documents, in the order of ``doc_ids``.

        A field that a document lacks is left out.

        Raises:
            DataError: a field that is not stored, or a document that the index does not have; names it.
        """
        require_stored(names, self.field_types)
        rows = self._opened.ids.rows(doc_ids)
        return [{} for _ in rows] if self._opened.documents is None else self._opened.documents.fields(rows, names)

    def self_test(self) -> None:
        """Ask the stored probe queries and compare with the stored answers; also warms the version up.

        Raises:
            ArtifactError: too few of the answers, or other scores.
        """
        probes = Probes.load(self._folder)
        found = wrong = 0
        rankings = self.search(probes.queries, probes.rows.shape[1])
        for ranking, rows, scores in zip(rankings, probes.rows.tolist(), probes.scores.tolist(), strict=True):
            answer = dict(zip(ranking.doc_ids, ranking.scores.tolist(), strict=True))
            for row, score in zip(rows, scores, strict=True):
                if (got := answer.get(self._opened.ids[row])) is not None:
                    found += 1
                    wrong += abs(got - score) > _PROBE_TOLERANCE * max(1.0, abs(score))
        if wrong or found < _PROBES_FOUND * probes.rows.size:
            raise ArtifactError(
                f"{self._folder}: self-test failed, {found} of {probes.rows.size} expected documents found, {wrong} of "
                "them with another score; this machine's libraries read the index otherwise, so build it here"
            )

    def _mask(self, wanted: Filter) -> Mask:
        if self._opened.documents is None:
            raise DataError("filter: the index stores no fields; build it with --fields")
        return self._opened.documents.mask(wanted)

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
        return truncated(queries, self._content.dimension, self.card.normalize)


def make_probes(folder: Path, content: IndexContent, queries: Vectors) -> Probes:
    """Answer queries from a folder that is not yet a version, for its own later self-tests."""
    opened = Opened(folder, content)
    cut = truncated(queries, content.dimension, content.document_encoder.normalize)
    with faiss_threads(1):
        rankings = opened.search(cut, min(PROBE_DEPTH, content.count), False, None, Effort.of(content.index))
    rows = np.asarray([opened.ids.rows(ranking.doc_ids) for ranking in rankings], dtype="<i8")
    return Probes(queries, rows, np.stack([ranking.scores for ranking in rankings]).astype("<f4"))
