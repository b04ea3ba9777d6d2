"""A corpus with the updates since its last build folded in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from index.documents import Fields, document_fields
from index.updates import Update
from index.vectors import BLOCK_ROWS, Rows
from retrieval_kd.artifacts import fingerprint
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.pages import forget_pages

NO_UPDATE = Update((), np.empty((0, 0), dtype=np.float32), ())


class MergedCorpus:
    """Encoded documents, some of them replaced, added or removed; rows in ascending order of the ids."""

    def __init__(self, corpus: EncodedCorpus, update: Update = NO_UPDATE) -> None:
        """Lay an update over a corpus."""
        touched = {*update.doc_ids, *update.deleted}
        placed = [(doc_id, row) for row, doc_id in enumerate(corpus.ids) if doc_id not in touched]
        placed += [(doc_id, -1 - i) for i, doc_id in enumerate(update.doc_ids)]
        placed.sort()
        self.ids = [doc_id for doc_id, _ in placed]
        self._places = np.asarray([place for _, place in placed], dtype=np.int64)
        self._corpus = corpus
        self._update = update
        self._touched = touched

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Return each id's row."""
        return {doc_id: row for row, doc_id in enumerate(self.ids)}

    def fingerprints(self) -> tuple[str, str]:
        """Return the identities of the vectors and of the documents."""
        own = (self._corpus.fingerprint, self._corpus.texts_fingerprint)
        if not self._touched:
            return own
        body = self._update.to_bytes().hex()
        return fingerprint([own[0], body]), fingerprint([own[1], body])

    def rows(self, rows: Rows | slice) -> Vectors:
        """Return float32 ``[len(rows), d]``; the pages of a large mapped corpus are let go again."""
        places = self._places[rows]
        vectors = np.empty((len(places), self._corpus.card.dimension), dtype=np.float32)
        old = places >= 0
        vectors[old] = self._corpus.vectors[places[old]]
        if not old.all():
            vectors[~old] = self._update.vectors[-1 - places[~old]]
        forget_pages(self._corpus.vectors)
        return vectors

    def blocks(self) -> Iterator[Vectors]:
        """Return all rows, a block at a time."""
        return (self.rows(slice(start, start + BLOCK_ROWS)) for start in range(0, len(self.ids), BLOCK_ROWS))

    def fields(self, collection: Collection) -> Iterator[tuple[str, Fields]]:
        """Return what there is to store with each document, in the collection's order, what was added last."""
        for document in collection.documents():
            if document.doc_id not in self._touched:
                yield document.doc_id, document_fields(document)
        yield from zip(self._update.doc_ids, self._update.fields, strict=True)
