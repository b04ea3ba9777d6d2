"""Stored fields: what an index returns about a document and what filters compare.

``docs.arrow`` is an Arrow IPC file, mapped, with a column for each field and the documents in the order in
which their collection streams them, so that a corpus larger than memory is written in one pass;
``positions.npy`` has the place of each row of the index in it. A column's type follows from all its values:
``bool``, ``int``, ``float``, ``text``, or a list of one of these; whatever else JSON can hold (objects, mixed
types) is kept as JSON text under the type ``json``, returned but not compared.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from index.files import sound
from index.filters import Filter, Mask, matches
from retrieval_kd.artifacts import atomic_write
from retrieval_kd.collections.base import Document
from retrieval_kd.errors import DataError, did_you_mean

DOCUMENTS = "docs.arrow"
POSITIONS = "positions.npy"
Fields = Mapping[str, Any]
"""A document's stored fields by name; JSON values."""

_BATCH_ROWS = 4096
_ARROW = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string(), "json": pa.string()}
_LIST = "list of "


def field_types(documents: Iterable[Fields], names: Sequence[str]) -> dict[str, str]:
    """Return what each field holds, from all its values; a field that no document has is left out."""
    seen: dict[str, set[str]] = {name: set() for name in names}
    for fields in documents:
        for name in names:
            if fields.get(name) is not None:
                seen[name].add(_type_of(fields[name]))
    return {name: _common(types) for name, types in seen.items() if types}


def finite_fields(documents: Iterable[tuple[str, Fields]], names: Sequence[str]) -> Iterator[Fields]:
    """Stream the fields of documents.

    Raises:
        DataError: one of those named holds NaN or infinity, which no client could read; names document and field.
    """
    for doc_id, fields in documents:
        for name in names:
            if not _is_finite(fields.get(name)):
                raise DataError(
                    f"document {doc_id!r}: field {name!r} holds NaN or infinity, which JSON has not; leave it out"
                )
        yield fields


def document_fields(document: Document) -> dict[str, Any]:
    """Return everything a document has to store: title, text, and its metadata."""
    return {**document.metadata, "title": document.title, "text": document.text}


def write_documents(
    folder: Path, documents: Iterable[tuple[str, Fields]], types: Mapping[str, str], row_of: Mapping[str, int]
) -> None:
    """Write ``docs.arrow`` and ``positions.npy``; one batch of documents is in memory at a time.

    Args:
        folder: Where they go.
        documents: Every document's id and fields, each id once.
        types: What each field holds; from :func:`field_types`.
        row_of: Each document's row in the index.

    Raises:
        DataError: a document is not in the index, comes twice, or is missing; names it.
    """
    positions = np.full(len(row_of), -1, dtype="<i8")
    stream = enumerate(documents)
    with atomic_write(folder / DOCUMENTS, "wb") as file, pa.ipc.new_file(file, _schema(types)) as writer:
        while window := list(itertools.islice(stream, _BATCH_ROWS)):
            for position, (doc_id, _) in window:
                row = row_of.get(doc_id)
                if row is None or positions[row] >= 0:
                    what = "is not among the vectors" if row is None else "comes twice"
                    raise DataError(f"document {doc_id!r} {what}; encode this collection again")
                positions[row] = position
            writer.write_batch(record_batch([fields for _, (_, fields) in window], types))
    if (positions < 0).any():
        row = int(np.argmin(positions))
        doc_id = next(doc_id for doc_id, at in row_of.items() if at == row)
        raise DataError(f"document {doc_id!r} has a vector but no fields; encode this collection again")
    with atomic_write(folder / POSITIONS, "wb") as file:
        np.save(file, positions)


def record_batch(documents: Sequence[Fields], types: Mapping[str, str]) -> pa.RecordBatch:
    """Return fields of documents as Arrow columns of the given types.

    Raises:
        DataError: a value of another type than its field's; names the field.
    """
    columns = []
    for name, holds in types.items():
        try:
            columns.append(pa.array(_stored(documents, name, holds), type=_arrow_type(holds)))
        except UnicodeEncodeError:
            # JSON can escape half of a surrogate pair.
            raise DataError(f"field {name!r}: a value is not valid Unicode; mend its \\u escapes") from None
        except pa.ArrowInvalid as error:
            raise DataError(f"field {name!r} holds {holds}, and a value does not fit ({error}); mend it") from None
    return pa.record_batch(columns, schema=_schema(types))


class StoredDocuments:
    """The fields of an index version's documents, mapped."""

    def __init__(
        self, batches: Sequence[pa.RecordBatch], types: Mapping[str, str], positions: npt.NDArray[np.int64]
    ) -> None:
        """Hold opened files; use :meth:`open`."""
        self._batches = batches
        self._positions = positions
        self.types = types

    @classmethod
    def open(cls, folder: Path) -> StoredDocuments:
        """Map the two files of a version.

        Raises:
            ArtifactError: one of them is missing or not what was written; names it.
        """
        path = folder / DOCUMENTS
        with sound(path, "not a file of stored fields", pa.ArrowInvalid, KeyError, TypeError):
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            types = {field.name: field.metadata[b"holds"].decode() for field in reader.schema}
        with sound(folder / POSITIONS, "cannot map it", ValueError):
            positions = np.load(folder / POSITIONS, mmap_mode="r", allow_pickle=False)
        return cls(batches, types, np.asarray(positions))

    @property
    def count(self) -> int:
        """Return the number of documents."""
        return len(self._positions)

    def fields(self, rows: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the named fields of some rows; a field that a document lacks is left out."""
        return [self._row(int(self._positions[row]), names) for row in rows]

    def mask(self, wanted: Filter) -> Mask:
        """Return which rows a filter matches, bool ``[count]``.

        Raises:
            DataError: as :func:`index.filters.matches`.
        """
        stored = np.concatenate([matches(wanted, batch, self.types) for batch in self._batches])
        found: Mask = stored[self._positions]
        return found

    def documents(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Stream every document's row and fields in the order of the file."""
        for position, row in enumerate(self._rows.tolist()):
            yield row, self._row(position, list(self.types))

    @cached_property
    def _rows(self) -> npt.NDArray[np.int64]:
        return np.argsort(self._positions)

    def _row(self, position: int, names: Sequence[str]) -> dict[str, Any]:
        batch, at = self._batches[position // _BATCH_ROWS], position % _BATCH_ROWS
        found = {}
        for name in names:
            value = batch.column(name)[at].as_py()
            if value is not None:
                found[name] = json.loads(value) if self.types[name] == "json" else value
        return found


def require_stored(names: Iterable[str], types: Mapping[str, str]) -> None:
    """Refuse a field that the index does not store.

    Raises:
        DataError: names the field and those there are.
    """
    for name in names:
        if name not in types:
            known = did_you_mean(name, types) if types else "; the index was built without --fields"
            raise DataError(f"no field {name!r} is stored{known}")


def storable(fields: Fields, types: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that an index stores; every document has a title and a text, stored or not.

    Raises:
        DataError: another field that the index does not store, or a number its field cannot hold; names it.
    """
    require_stored((name for name in fields if name not in ("title", "text")), types)
    return {name: _fitting(value, name, types[name]) for name, value in fields.items() if name in types}


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        items = {_type_of(item) for item in value}
        inner = _common(items) if items else ""
        return "json" if inner == "json" or inner.startswith(_LIST) else _LIST + inner
    return "json"


def _common(types: set[str]) -> str:
    """Return the one type that holds values of all these types; an empty list is ``list of`` anything."""
    if types and all(holds.startswith(_LIST) for holds in types):
        inner = _common({holds.removeprefix(_LIST) for holds in types} - {""})
        return "json" if inner == "json" else _LIST + inner
    if types == {"int", "float"}:
        return "float"
    return next(iter(types)) if len(types) == 1 else "json" if types else "text"


def _schema(types: Mapping[str, str]) -> pa.Schema:
    return pa.schema([pa.field(name, _arrow_type(holds), metadata={"holds": holds}) for name, holds in types.items()])


def _arrow_type(holds: str) -> pa.DataType:
    return pa.list_(_ARROW[holds.removeprefix(_LIST)]) if holds.startswith(_LIST) else _ARROW[holds]


def _stored(documents: Sequence[Fields], name: str, holds: str) -> list[Any]:
    values = [_fitting(fields.get(name), name, holds) for fields in documents]
    if holds == "json":
        return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    for value in values:
        if value is not None and _common({_type_of(value), holds}) != holds:
            raise DataError(f"field {name!r} holds {holds}, but {value!r} is none; build the index again")
    return values


def _fitting(value: Any, name: str, holds: str) -> Any:
    """Return a value with its integers as floats where the field holds floats."""
    if holds == f"{_LIST}float" and isinstance(value, list):
        return [_fitting(item, name, "float") for item in value]
    if holds != "float" or not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        if (number := float(value)) == value:
            return number
    except OverflowError:
        pass
    digits = str(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"
    raise DataError(
        f"field {name!r} holds float, and no float is exactly {digits}; store the field as text, or round it"
    )
