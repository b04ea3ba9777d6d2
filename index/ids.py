"""Document ids by row: a mapped Arrow file in ascending order, so that finding an id is a bisection."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from index.files import sound
from index.vectors import Rows
from retrieval_kd.artifacts import atomic_write
from retrieval_kd.collections.files import checked_id
from retrieval_kd.errors import ArtifactError, DataError

IDS = "ids.arrow"
_SCHEMA = pa.schema([("id", pa.large_string())])


def write_ids(path: Path, ids: Sequence[str]) -> None:
    """Write ids in ascending order.

    Raises:
        DataError: ids out of order or twice; names the first.
    """
    for before, after in itertools.pairwise(ids):
        if before >= after:
            raise DataError(f"document id {after!r} comes after {before!r}; give ids in ascending order, each once")
    with atomic_write(path, "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        writer.write_batch(pa.record_batch([pa.array(ids, type=pa.large_string())], schema=_SCHEMA))


class DocumentIds:
    """The ids of an index version."""

    def __init__(self, column: Any) -> None:
        """Hold an opened column; use :meth:`open`."""
        self._column = column
        # An arrow scalar for each id took as long as scoring ten documents.
        _, offsets, text = column.buffers()
        self._ends = np.frombuffer(offsets, dtype="<i8")[column.offset :]
        self._text = memoryview(text or b"")

    @classmethod
    def open(cls, path: Path) -> DocumentIds:
        """Map a file of ids.

        Raises:
            ArtifactError: the file is missing or not what was written.
        """
        with sound(path, "not a file of ids", pa.ArrowInvalid):
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        if batch.schema != _SCHEMA:
            found = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)
            raise ArtifactError(f"{path}: not a file of ids (it has {found}); build the index again")
        return cls(batch.column(0))

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> str:
        if row < 0:
            raise IndexError(row)
        return str(self._text[self._ends[row] : self._ends[row + 1]], "utf-8")

    def at(self, rows: Rows) -> list[str]:
        """Return the ids of rows."""
        if rows.min(initial=0) < 0:
            raise IndexError(rows.min())
        spans = zip(self._ends[rows].tolist(), self._ends[rows + 1].tolist(), strict=True)
        return [str(self._text[start:end], "utf-8") for start, end in spans]

    def __iter__(self) -> Iterator[str]:
        return iter(self._column.to_pylist())

    def row(self, doc_id: str) -> int | None:
        """Return the row of an id; None when the index has no such document."""
        row = bisect.bisect_left(range(len(self)), doc_id, key=self.__getitem__)
        return row if row < len(self) and self[row] == doc_id else None

    def rows(self, doc_ids: Iterable[str]) -> list[int]:
        """Return the row of each id.

        Raises:
            DataError: the index has no such document; names it.
        """
        rows = []
        for doc_id in doc_ids:
            row = self.row(doc_id)
            if row is None:
                raise DataError(f"the index has no document {doc_id!r}")
            rows.append(row)
        return rows


def require_ids(doc_ids: Sequence[str]) -> None:
    """Refuse ids that no document can have, or that come twice.

    Raises:
        DataError: names the id.
    """
    seen = set()
    for doc_id in doc_ids:
        checked_id(doc_id, "update", "document")
        if doc_id in seen:
            raise DataError(f"update: document {doc_id!r} comes twice; give each once")
        seen.add(doc_id)
