"""What has changed since a version was built, in memory, searched exactly beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from index.ann import Selection
from index.documents import record_batch
from index.filters import Filter, matches
from index.ids import DocumentIds
from index.manifest import IndexContent
from index.scoring import Scored, Scorer
from index.updates import Update
from index.vectors import Rows, StoredVectors
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.matryoshka import truncated


@dataclass(frozen=True)
class Delta:
    """The state after some updates; never changed, replaced by the next.

    Attributes:
        rows: Place of each added or replaced document among the delta's vectors.
        fields: What is stored with each of them.
        touched: Every document that an update names; the version's own vector of it is no longer searched.
        base: The documents of the version that are still searched; None when all are.
        hidden: How many are not.
        scorer: Scores the delta's documents.
        batch: Their fields as Arrow columns, for filters.
    """

    rows: Mapping[str, int]
    fields: Sequence[Mapping[str, Any]]
    touched: frozenset[str]
    base: Selection | None
    hidden: int
    scorer: Scorer
    batch: pa.RecordBatch

    @classmethod
    def of(cls, whole: Update, content: IndexContent, ids: DocumentIds) -> Delta:
        """Return what the sum of all updates makes of a version."""
        card = content.document_encoder
        stored = truncated(whole.vectors, content.dimension, card.normalize)
        longest = float(np.linalg.norm(stored.astype(np.float64), axis=1).max(initial=0.0))
        touched = frozenset((*whole.doc_ids, *whole.deleted))
        hidden = [row for doc_id in touched if (row := ids.row(doc_id)) is not None]
        base = None
        if hidden:
            mask = np.ones(content.count, dtype=bool)
            mask[hidden] = False
            base = Selection(mask, by_filter=False)

        doc_ids = whole.doc_ids

        def ids_at(rows: Rows) -> list[str]:
            return [doc_ids[row] for row in rows.tolist()]

        return cls(
            rows={doc_id: row for row, doc_id in enumerate(doc_ids)},
            fields=whole.fields,
            touched=touched,
            base=base,
            hidden=len(hidden),
            scorer=Scorer(StoredVectors(stored, "float32"), longest, ids_at),
            batch=record_batch(whole.fields, content.fields) if content.fields else pa.record_batch({}),
        )

    def search(self, queries: Vectors, k: int, wanted: Filter | None, types: Mapping[str, str]) -> list[Scored]:
        """Return each query's best ``k`` of the delta's documents that match."""
        rows = np.arange(len(self.rows))
        if wanted is not None:
            rows = rows[matches(wanted, self.batch, types)]
        return list(self.scorer.outright(queries, rows, k))
