"""Searching an index version: a kind proposes documents, then one exact way of scoring them.

faiss sums in another order when it gets twenty queries than when it gets one (faiss#563), and codes give scores
of their own, so a kind only proposes. What of its proposals can be among the best is scored by
:mod:`index.scoring`, joined with what has changed since the version was built, and ordered by
:func:`retrieval_kd.runs.rank`.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from index.ann import Selection, faiss
from index.delta import Delta
from index.documents import Fields, StoredDocuments, record_batch, require_stored, storable
from index.filters import Filter
from index.ids import IDS, DocumentIds, require_ids
from index.kinds import Effort, Proposer
from index.manifest import IndexContent, IndexManifest, check_files, check_sizes
from index.probes import PROBE_DEPTH, Probes
from index.scoring import NOTHING, Scored, Scorer
from index.store import VERSIONS, IndexStore, Lease, hold
from index.threads import faiss_threads
from index.updates import START, Update, UpdateLog, summed, writing
from index.vectors import Storage, StoredVectors
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, require_same_settings, require_same_space
from retrieval_kd.encoders.corpus import check_vectors
from retrieval_kd.encoders.matryoshka import truncated
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.runs import Ranking

_log = logging.getLogger(__name__)
_MARGIN = 32
# Below this many documents, or multiply-adds, scoring all that a filter selects is faster than walking around it.
_SCORED_OUTRIGHT = 10_000
_BUDGET = 1 << 23
# When a kind has proposed this share in vain, comparing with all is cheaper than going on.
_WIDEST = 8
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
        self.documents = StoredDocuments.open(folder) if content.fields else None
        vectors = StoredVectors.open(folder, content.index.storage)
        self._scorer = Scorer(vectors, content.largest_norm, self.ids.at)
        self._proposer = Proposer.open(folder, vectors, content.index)
        shapes = [(len(self.ids), content.dimension), vectors.array.shape]
        if self.documents is not None:
            shapes.append((self.documents.count, content.dimension))
        if any(shape != (content.count, content.dimension) for shape in shapes):
            raise ArtifactError(f"{folder}: ids, vectors and fields are of different sizes; build the index again")

    def search(
        self, queries: Vectors, k: int, exact: bool, chosen: Selection | None, effort: Effort
    ) -> Sequence[Scored]:
        """Return the best ``k`` for each row of float32 ``[n, d]``, ``d`` as stored.

        Args:
            queries: The queries.
            k: Documents wanted, at least 1.
            exact: Leave nothing to a kind's proposals.
            chosen: The documents that may be ranked; all when None.
            effort: How hard the kind looks.
        """
        k = min(k, self.content.count if chosen is None else chosen.count)
        if k == 0:
            return [NOTHING] * len(queries)
        few = max(_SCORED_OUTRIGHT, _BUDGET // self.content.dimension)
        if chosen is not None and chosen.by_filter and not chosen.most and chosen.count <= few:
            return list(self._scorer.outright(queries, chosen.rows, k))
        if exact or self._proposer is None or k > self._proposer.most:
            return self._scan(queries, k, chosen)
        return self._proposed(self._proposer, queries, k, chosen, effort)

    def _proposed(
        self, proposer: Proposer, queries: Vectors, k: int, chosen: Selection | None, effort: Effort
    ) -> Sequence[Scored]:
        """Let the kind look harder for each query until enough of what it proposes may be ranked."""
        best: dict[int, Scored] = {}
        undecided, harder = np.arange(len(queries)), 1
        while len(undecided) > 0:
            scores, rows, enough = proposer.propose(queries[undecided], k, effort, chosen, harder)
            # A walk cannot reach nodes that the graph has cut off; the ranking is as long as promised all the same.
            long = np.count_nonzero(rows >= 0, axis=1) >= k
            decided = enough & long
            done = undecided[decided]
            scores, rows = scores[decided], rows[decided]
            if not proposer.scores_are_dots:
                scores = self._scorer.float32_dots(queries[done], rows)
            scores[rows < 0] = -np.inf
            best.update(zip(done.tolist(), self._scorer.best(queries[done], scores, rows, k), strict=True))
            lost = ~decided if rows.shape[1] * _WIDEST > self.content.count else enough & ~long
            for query in undecided[lost].tolist():
                best[query] = self._scan(queries[query : query + 1], k, chosen)[0]
            undecided = undecided[~decided & ~lost]
            harder *= 2
        return [best[query] for query in range(len(queries))]

    def _scan(self, queries: Vectors, k: int, chosen: Selection | None) -> Sequence[Scored]:
        """Widen the candidates of each query until no document outside them can be among its best."""
        best: dict[int, Scored] = {}
        undecided = np.arange(len(queries))
        bounds = self._scorer.vectors.error_bound(queries, self.content.largest_norm)
        selected, kept = (None, chosen) if chosen is None or chosen.most else (chosen, None)
        count = self.content.count if selected is None else selected.count
        parameters = None if selected is None else faiss.SearchParameters(sel=selected.selector)
        width = k + _MARGIN
        while len(undecided) > 0:
            width = min(width, count)
            scores, rows = self._scorer.vectors.scan.search(queries[undecided], width, params=parameters)
            last = scores[:, -1].copy()
            if kept is not None:
                scores[~kept.mask[rows]] = -np.inf
            kth = np.partition(scores, -k, axis=1)[:, -k]
            decided = (last < kth - 2 * bounds[undecided]) | (width == count)
            done = undecided[decided]
            scored = self._scorer.best(queries[done], scores[decided], rows[decided], k)
            best.update(zip(done.tolist(), scored, strict=True))
            undecided = undecided[~decided]
            width *= 4
        return [best[query] for query in range(len(queries))]


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
        self._log = UpdateLog.of(folder.parent.parent, folder.name)
        self._refreshing = threading.Lock()
        self._read_to = START
        self._seen = (0, 0, 0)
        self._delta: Delta | None = None
        self._is_snapshot = False
        self._refresh()

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

    def snapshot(self) -> Self:
        """Return a view that sees nothing of later updates, so that fields are those that a search went by.

        It may be asked as long as this searcher is open.
        """
        view = copy.copy(self)
        view._delta, view._is_snapshot = self._refresh(), True
        return view

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
        """Return the number of documents that can be found."""
        delta = self._refresh()
        return self._content.count if delta is None else delta.count

    @property
    def updates(self) -> int:
        """Return how many added or replaced documents every search compares with, until the next build."""
        delta = self._refresh()
        return 0 if delta is None else int(np.count_nonzero(delta.living))

    @property
    def dimension(self) -> int:
        """Return the width of the vectors that :meth:`search` takes: what the encoder makes."""
        return self.card.dimension

    @property
    def card(self) -> EncoderCard:
        """Return the document encoder's card."""
        return self._content.document_encoder

    @property
    def query_encoder(self) -> str:
        """Return the fingerprint of the query encoder it was built or tuned for; empty if none was named."""
        return self._content.query_encoder

    @property
    def bytes_per_doc(self) -> float:
        """Return the size of the version's files for each document, in bytes, without stored fields."""
        return self._manifest.bytes_per_doc

    @property
    def effort(self) -> Effort:
        """Return how hard the index looks unless a search says otherwise; tuned, or the spec's."""
        return Effort.of(self._content.index)

    @property
    def field_types(self) -> dict[str, str]:
        """Return the stored fields by name, and what each holds; see :mod:`index.documents`."""
        return dict(self._content.fields)

    def check_query_encoder(self, card: EncoderCard) -> None:
        """Refuse a query encoder that cannot be meant; warn of another one than the index was made for.

        Not meant is one whose vectors do not lie in the documents' space, or the very model the index was made for with
        another prefix, pooling, length or normalisation.

        Raises:
            EncoderMismatch: names both encoders, or what they differ in.
        """
        require_same_space(card, self.card)
        if not self.is_tuned_for(card):
            if self._content.query_card is not None:
                require_same_settings(card, self._content.query_card)
            elif self.query_encoder == self.card.fingerprint:
                require_same_settings(card, self.card)
            _log.warning(
                "index version %s was made for query encoder %s, not for %r (%s): same space, but other weights or "
                "precision, so its measured recall need not hold; run `rkd index tune` with the new one",
                self.version,
                self.query_encoder[:12],
                card.name,
                card.fingerprint[:12],
            )

    def is_tuned_for(self, card: EncoderCard) -> bool:
        """Return whether a query encoder is the one the index was made for, or none was named."""
        return self.query_encoder in ("", card.fingerprint)

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
        delta = self._refresh()
        chosen = self._chosen(filter, delta)
        with faiss_threads(self._threads):
            best = self._opened.search(queries, k, exact, chosen, effort or self.effort)
        if delta is not None:
            news = delta.search(queries, k, filter, self._content.fields)
            best = [
                Scored(a.doc_ids + b.doc_ids, np.append(a.scores, b.scores)) for a, b in zip(best, news, strict=True)
            ]
        return [scored.ranked(k) for scored in best]

    def fields(self, doc_ids: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the named stored fields of documents, in the order of ``doc_ids``.

        A field that a document lacks is left out.

        Raises:
            DataError: a field that is not stored, or a document that the index does not have; names it.
        """
        require_stored(names, self.field_types)
        delta = self._refresh()
        return [self._fields(doc_id, names, delta) for doc_id in doc_ids]

    def upsert(self, ids: Sequence[str], vectors: Vectors, fields: Sequence[Fields] | None = None) -> None:
        """Add documents or replace them; on return that is on disk and every search sees it.

        The next build folds it in.

        Args:
            ids: The documents, each once.
            vectors: float32 ``[len(ids), dimension]``, as the document encoder makes them.
            fields: What is stored with each; ``title`` and ``text`` are left out where the index does not store them.

        Raises:
            DataError: an id is unusable or comes twice, a vector is of another shape, not finite or not of unit
                length, or a field is not stored or of another type; names it, and nothing is changed.
            ArtifactError: the log cannot be written, or the version is no longer the store's current one.
        """
        given = fields if fields is not None else [{}] * len(ids)
        if vectors.shape != (len(ids), self.dimension) or len(given) != len(ids):
            raise DataError(
                f"upsert: {len(ids)} ids, vectors of shape {vectors.shape}, {len(given)} sets of fields; the index "
                f"takes [n, {self.dimension}]"
            )
        require_ids(ids)
        rows = np.asarray(vectors, dtype=np.float32)
        check_vectors(rows, ids, self.card)
        kept = [storable(one, self.field_types) for one in given]
        if self._content.fields:
            record_batch(kept, self._content.fields)
        self._change(Update(tuple(ids), rows, tuple(kept)))

    def delete(self, ids: Sequence[str]) -> None:
        """Remove documents; on return that is on disk and no search finds them. Unknown ids are no error.

        Raises:
            DataError: an id is unusable or comes twice.
            ArtifactError: the log cannot be written, or the version is no longer the store's current one.
        """
        require_ids(ids)
        self._change(Update((), np.empty((0, self.dimension), np.float32), (), tuple(ids)))

    def self_test(self) -> None:
        """Ask the stored probe queries and compare with the stored answers; also warms the version up.

        Raises:
            ArtifactError: too few of the answers, or other scores.
        """
        probes = Probes.load(self._folder)
        found = wrong = 0
        # The version as it was built, without the updates since.
        with faiss_threads(self._threads):
            best = self._opened.search(self._checked(probes.queries), probes.rows.shape[1], False, None, self.effort)
        for scored, rows, scores in zip(best, probes.rows.tolist(), probes.scores.tolist(), strict=True):
            answer = dict(zip(scored.doc_ids, scored.scores.tolist(), strict=True))
            for row, score in zip(rows, scores, strict=True):
                if (got := answer.get(self._opened.ids[row])) is not None:
                    found += 1
                    wrong += abs(got - score) > _PROBE_TOLERANCE * max(1.0, abs(score))
        if wrong or found < _PROBES_FOUND * probes.rows.size:
            raise ArtifactError(
                f"{self._folder}: self-test failed, {found} of {probes.rows.size} expected documents found, {wrong} of "
                "them with another score; this machine's libraries read the index otherwise, so build it here"
            )

    def _chosen(self, wanted: Filter | None, delta: Delta | None) -> Selection | None:
        """Return which of the version's own documents may be ranked; None for all."""
        unchanged = None if delta is None else delta.base
        if wanted is None:
            return unchanged
        if self._opened.documents is None:
            raise DataError("filter: the index stores no fields; build it with --fields")
        mask = self._opened.documents.mask(wanted)
        return Selection(mask if unchanged is None else mask & unchanged.mask, by_filter=True)

    def _fields(self, doc_id: str, names: Sequence[str], delta: Delta | None) -> dict[str, Any]:
        if delta is not None and (held := delta.held(doc_id)) is not None:
            return {name: held[name] for name in names if held.get(name) is not None}
        (row,) = self._opened.ids.rows([doc_id])
        if delta is not None and delta.hides(row):
            raise DataError(f"the index has no document {doc_id!r}")
        return {} if self._opened.documents is None else self._opened.documents.fields([row], names)[0]

    def _change(self, update: Update) -> None:
        store = self._folder.parent.parent
        try:
            with writing(store):
                current = IndexStore(store).current().name
                if current != self.version:
                    raise ArtifactError(f"{store}: {current} is current, not {self.version}; open it and update that")
                self._log.append(update)
        except OSError as error:
            raise ArtifactError(f"{store}: cannot write updates ({error.strerror or error})") from error
        self._refresh()

    def _refresh(self) -> Delta | None:
        """Return the changes until now, those of other processes included."""
        if self._is_snapshot or self._log.state == self._seen:
            return self._delta
        with self._refreshing:
            state = self._log.state
            news, read_to, anew = self._log.read(self._read_to)
            # Anew when the log was replaced, or a record was taken back because the disk refused it.
            delta = None if anew else self._delta
            if news:
                delta = (delta or Delta.none(self._content, self._opened.ids)).after(summed(news))
            self._delta, self._read_to = delta, read_to
            # Last: who finds it at the log's end does not wait for the lock.
            self._seen = state
            return self._delta

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
    opened, depth = Opened(folder, content), min(PROBE_DEPTH, content.count)
    cut = truncated(queries, content.dimension, content.document_encoder.normalize)
    with faiss_threads(1):
        best = opened.search(cut, depth, False, None, Effort.of(content.index))
    rankings = [scored.ranked(depth) for scored in best]
    rows = np.asarray([opened.ids.rows(ranking.doc_ids) for ranking in rankings], dtype="<i8")
    return Probes(queries, rows, np.stack([ranking.scores for ranking in rankings]).astype("<f4"))


def passes_self_test(version: Path) -> bool:
    """Return whether every byte of a version is as it was published, and understood by this machine's libraries."""
    try:
        with Searcher.open(version) as searcher:
            searcher.self_test()
    except ArtifactError:
        return False
    return True
