"""Per-query values on disk: one line for each judged query, a column for each measure."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from eval.measures import Evaluation
from retrieval_kd.artifacts import atomic_write
from retrieval_kd.collections.files import read_lines
from retrieval_kd.errors import DataError

_FIRST = "query_id"


def write_per_query(path: Path, evaluation: Evaluation) -> None:
    """Write ``query_id`` and the measures between tabs; ``repr`` gives every float back exactly."""
    columns = evaluation.values
    with atomic_write(path) as file:
        file.write("\t".join([_FIRST, *columns]) + "\n")
        for row, query_id in enumerate(evaluation.query_ids):
            file.write("\t".join([query_id, *(repr(float(values[row])) for values in columns.values())]) + "\n")


def read_per_query(path: Path) -> tuple[Evaluation, dict[str, int]]:
    """Read a file of per-query values.

    Returns:
        The values, without knowledge of which queries had no results, and each query's line.

    Raises:
        DataError: no header, another number of columns than the header has, a value that is not a finite
            number, or a query twice; names file and line.
    """
    lines: dict[str, int] = {}
    rows: list[list[float]] = []
    measures: list[str] | None = None
    for line in read_lines(path):
        columns = line.text.split("\t")
        if measures is None:
            if columns[0] != _FIRST or len(columns) < 2:
                raise DataError(f"{line.where}: no header; the first line is {_FIRST} and the measures, between tabs")
            measures = columns[1:]
            continue
        if len(columns) != 1 + len(measures):
            raise DataError(f"{line.where}: {len(columns)} columns, the header has {1 + len(measures)}; mend the line")
        query_id = columns[0]
        if query_id in lines:
            raise DataError(f"{line.where}: query {query_id!r} also stands in line {lines[query_id]}; keep one")
        rows.append([_finite(text, line.where) for text in columns[1:]])
        lines[query_id] = int(line.where.rpartition(":")[2])
    if not rows or measures is None:
        raise DataError(f"{path}: no values; give a per_query file of a report")
    table = np.array(rows, dtype=np.float64)
    values = {measure: table[:, column].copy() for column, measure in enumerate(measures)}
    return Evaluation(tuple(lines), values, ()), lines


def _finite(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where}: {text!r} is not a number; mend the line") from None
    if not math.isfinite(value):
        raise DataError(f"{where}: value {text} is not finite; evaluate the system again")
    return value
