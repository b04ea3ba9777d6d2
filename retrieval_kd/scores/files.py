"""Scores that others made: whatever ranks can be a teacher, if it writes down its scores."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_kd.artifacts import file_sha256
from retrieval_kd.collections.files import Line, read_lines
from retrieval_kd.errors import DataError
from retrieval_kd.scores.preferences import SCHEMA as PREFERENCES
from retrieval_kd.scores.preferences import PreferenceStore
from retrieval_kd.scores.store import SCHEMA, ScoreStore

_TREC_COLUMNS = 6
_TSV_COLUMNS = 3
_SCORE = "score"
# Arrow's own errors, what it makes of the system's, and text that is not UTF-8.
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
_LOGARITHMS = PREFERENCES.set(3, pa.field("logp", pa.float32(), nullable=False))


def read_scores(path: Path, *, finite: bool = True) -> ScoreStore:
    """Read a teacher's scores, as they are; ties of a run stay ties.

    Args:
        path: A score store's folder; a Parquet file with the columns ``query_id``, ``doc_id`` and ``score``; a TREC
            run (six columns: query Q0 document rank score tag); or a TSV file (three columns: query, document,
            score, with or without a first line of names whose third is ``score``).
        finite: Refuse scores that are not; a report on them wants to count them.

    Raises:
        ArtifactError: a folder that is not a whole store.
        DataError: a file of another form or without any score, a score that is not a finite number, or a pair that
            occurs twice; names file, and line or pair.
    """
    store = _store(path, finite)
    if not len(store):
        raise DataError(f"{path}: no scores; a teacher has one for each pair of query and document")
    return store


def _store(path: Path, finite: bool) -> ScoreStore:
    if path.is_dir():
        return ScoreStore.open(path, finite=finite)
    if path.suffix == ".parquet":
        table = _parquet(path, SCHEMA)
        return ScoreStore(path, file_sha256(path), table, lambda _: str(path), finite=finite)
    queries, documents, scores = [], [], []
    for _, query_id, doc_id, score in _text_rows(path):
        queries.append(query_id)
        documents.append(doc_id)
        scores.append(score)
    with np.errstate(over="ignore"):
        # What no float32 can hold becomes infinite, and is refused as such.
        values = np.array(scores, dtype=np.float32)
    columns = [pa.array(queries, pa.string()), pa.array(documents, pa.string()), values]
    return ScoreStore(
        path,
        file_sha256(path),
        pa.table(columns, schema=SCHEMA),
        lambda row: next(islice(_text_rows(path), row, None))[0].where,
        finite=finite,
    )


def read_preferences(path: Path) -> PreferenceStore:
    """Read a pairwise teacher's preferences.

    Args:
        path: A preference store's folder, or a Parquet file with the columns ``query_id``, ``doc_i``, ``doc_j`` and
            ``p``, the probability that i is more relevant, or ``logp``, its natural logarithm.

    Raises:
        ArtifactError: a folder that is not a whole store.
        DataError: a file of another form, a value that is no probability, or a pair in one order twice.
    """
    if path.is_dir():
        return PreferenceStore.open(path)
    logarithmic = "logp" in _column_names(path)
    table = _parquet(path, _LOGARITHMS if logarithmic else PREFERENCES)
    if logarithmic:
        with np.errstate(over="ignore"):
            probabilities = np.exp(table["logp"].to_numpy())
        table = pa.table([*table.columns[:3], probabilities], schema=PREFERENCES)
    return PreferenceStore(path, file_sha256(path), table, lambda _: str(path))


def _column_names(path: Path) -> list[str]:
    try:
        names: list[str] = pq.read_schema(path).names
    except _UNREADABLE as error:
        raise DataError(
            f"{path}: not a Parquet file ({_first_line(error)}); give one, or a file of another suffix"
        ) from None
    return names


def _first_line(error: Exception) -> str:
    """Return what Arrow says, without the traces that it sometimes adds in further lines."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _parquet(path: Path, schema: pa.Schema) -> pa.Table:
    names = _column_names(path)
    for name in schema.names:
        if names.count(name) != 1:
            wrong = f"{names.count(name)} columns {name!r}" if name in names else f"no column {name!r}"
            raise DataError(f"{path}: {wrong}; such a file has {schema.names}")
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=schema.names).select(schema.names)
        # Arrow reads text without a look at its bytes.
        table.validate(full=True)
    except _UNREADABLE as error:
        raise DataError(f"{path}: damaged ({_first_line(error)}); copy or write the file again") from None
    empty = [name for name in schema.names if table[name].null_count]
    if empty:
        raise DataError(f"{path}: column {empty[0]!r} has empty values; give every row its own")
    try:
        # Not safe: a double that no float32 can hold exactly is still the score, and one too large is found later.
        return table.cast(schema, safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path}: {_first_line(error)}; such a file has {schema.names}, text and a number") from None


def _text_rows(path: Path) -> Iterator[tuple[Line, str, str, float]]:
    number = 0
    for number, line in enumerate(read_lines(path)):
        columns = line.text.split("\t") if line.text.count("\t") == _TSV_COLUMNS - 1 else line.text.split()
        if len(columns) == _TREC_COLUMNS:
            query_id, _, doc_id, _, text, _ = columns
        elif len(columns) == _TSV_COLUMNS:
            query_id, doc_id, text = columns
        else:
            raise DataError(
                f"{line.where}: {len(columns)} columns; a TREC run has 6 (query Q0 document rank score tag), a score "
                "file 3 (query, document, score)"
            )
        try:
            yield line, query_id, doc_id, float(text)
        except ValueError:
            # Anything else that the first line holds is a pair whose score went wrong, such as 1,5.
            if number > 0 or len(columns) == _TREC_COLUMNS or text.strip().lower() != _SCORE:
                raise DataError(f"{line.where}: score {text!r} is not a number; mend the line") from None
