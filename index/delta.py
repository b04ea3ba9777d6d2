"""What has changed since a version was built, in memory, searched exactly beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from index.ann import Selection
from index.documents import record_batch
from index.filters import Filter, Mask, matches
from index.ids import DocumentIds
from index.manifest import IndexContent
from index.scoring import Scored, Scorer
from index.updates import Update
from index.vectors import Rows, StoredVectors
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.matryoshka import truncated

_ROOM = 64


@dataclass(frozen=True)
class Delta:
    """The state after some updates; who searches it sees nothing of later ones.

    It shares ids, fields and vectors with the states before and after it, so that an update costs what it holds and not
    what all before it held. Each state looks only at its own part of them, and the next is made of the newest alone.

    Attributes:
        content: What the version holds.
        ids: The version's own documents.
        doc_ids: The document of each row.
        fields: What is stored with it.
        places: The rows of every document that an update names, ascending, those of later states too; none when it was
            only deleted.
        vectors: float32 ``[room, d]``, as the version stores them.
        living: bool ``[rows]``, which rows nothing replaced or deleted.
        longest: No vector is longer.
        batches: The rows' fields as Arrow columns, for filters.
        base: The documents of the version that are still searched; None when all are.
    """

    content: IndexContent
    ids: DocumentIds
    doc_ids: list[str]
    fields: list[Mapping[str, Any]]
    places: dict[str, list[int]]
    vectors: Vectors
    living: Mask
    longest: float = 0.0
    batches: tuple[pa.RecordBatch, ...] = ()
    base: Selection | None = None

    @classmethod
    def none(cls, content: IndexContent, ids: DocumentIds) -> Delta:
        """Return the state of a version that nobody has changed."""
        return cls(content, ids, [], [], {}, np.empty((0, content.dimension), np.float32), np.empty(0, dtype=bool))

    @property
    def count(self) -> int:
        """Return the number of documents that can be found, the version's own included."""
        own = self.content.count if self.base is None else self.base.count
        return own + int(np.count_nonzero(self.living))

    def after(self, update: Update) -> Delta:
        """Return the state after one more update, to be asked of the newest state only."""
        begin = len(self.living)
        end = begin + len(update.doc_ids)
        if end > len(self.vectors):
            return self._with_room(len(update.doc_ids)).after(update)
        stored = truncated(update.vectors, self.content.dimension, self.content.document_encoder.normalize)
        batches = self.batches
        if self.content.fields:
            batches = _joined(batches, record_batch(update.fields, self.content.fields))
        touched = (*update.doc_ids, *update.deleted)
        replaced = [rows[-1] for doc_id in touched if (rows := self.places.get(doc_id))]
        living = np.ones(end, dtype=bool)
        living[:begin] = self.living
        living[replaced] = False
        # By place, for an update that failed half way may come again.
        self.vectors[begin:end] = stored.reshape(end - begin, self.content.dimension)
        self.doc_ids[begin:] = update.doc_ids
        self.fields[begin:] = update.fields
        base = self._base_without([doc_id for doc_id in touched if doc_id not in self.places])
        lengths = np.linalg.norm(stored.astype(np.float64), axis=1)
        # Last: an update that failed half way and comes again would take its own documents for replaced ones.
        for row, doc_id in enumerate(update.doc_ids, begin):
            self.places.setdefault(doc_id, []).append(row)
        for doc_id in update.deleted:
            self.places.setdefault(doc_id, [])
        return replace(
            self, living=living, longest=float(lengths.max(initial=self.longest)), batches=batches, base=base
        )

    def held(self, doc_id: str) -> Mapping[str, Any] | None:
        """Return what is stored with a document that an update added or replaced; None when it is gone, or none did."""
        rows = (row for row in reversed(self.places.get(doc_id, [])) if row < len(self.living) and self.living[row])
        return next((self.fields[row] for row in rows), None)

    def hides(self, row: int) -> bool:
        """Return whether one of the version's own documents is no longer searched."""
        return self.base is not None and not self.base.mask[row]

    def search(self, queries: Vectors, k: int, wanted: Filter | None, types: Mapping[str, str]) -> list[Scored]:
        """Return each query's best ``k`` of the updated documents that match."""
        chosen = self.living
        if wanted is not None and len(chosen) > 0:
            chosen = chosen & np.concatenate([matches(wanted, batch, types) for batch in self.batches])
        return list(self._scorer.outright(queries, np.flatnonzero(chosen), k))

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(StoredVectors(self.vectors[: len(self.living)], "float32"), self.longest, self._ids_at)

    def _ids_at(self, rows: Rows) -> list[str]:
        return [self.doc_ids[row] for row in rows.tolist()]

    def _base_without(self, doc_ids: Sequence[str]) -> Selection | None:
        hidden = [row for doc_id in doc_ids if (row := self.ids.row(doc_id)) is not None]
        if not hidden:
            return self.base
        mask = np.ones(self.content.count, dtype=bool) if self.base is None else self.base.mask.copy()
        mask[hidden] = False
        return Selection(mask, by_filter=False)

    def _with_room(self, wanted: int) -> Delta:
        """Return the same state over arrays of its own, without the rows that are no longer searched."""
        kept = np.flatnonzero(self.living).tolist()
        room = max(_ROOM, 2 * (len(kept) + wanted))
        vectors = np.empty((room, self.content.dimension), dtype=np.float32)
        vectors[: len(kept)] = self.vectors[kept]
        doc_ids, fields = [self.doc_ids[row] for row in kept], [self.fields[row] for row in kept]
        places: dict[str, list[int]] = {doc_id: [] for doc_id in self.places}
        places |= {doc_id: [row] for row, doc_id in enumerate(doc_ids)}
        batches = (record_batch(fields, self.content.fields),) if self.content.fields else ()
        return replace(
            self,
            doc_ids=doc_ids,
            fields=fields,
            places=places,
            vectors=vectors,
            living=np.ones(len(kept), dtype=bool),
            batches=batches,
        )


def _joined(batches: tuple[pa.RecordBatch, ...], last: pa.RecordBatch) -> tuple[pa.RecordBatch, ...]:
    """Return the batches with one more, each longer than those after it together, so that there are few."""
    while batches and batches[-1].num_rows <= last.num_rows:
        last = pa.concat_batches([batches[-1], last])
        batches = batches[:-1]
    return (*batches, last)
