"""A run: for each query, a ranked list of document ids with strictly decreasing scores.

Ties are broken here and nowhere else, by (score descending, document id ascending). Everything that
reads a ranking gets it from :func:`rank`, because measures otherwise disagree about ties inside one
library: ``RR`` and ``RR@10`` of ir_measures give 0.5 and 1.0 for the same tied run (ir_measures#18).
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from retrieval_kd.artifacts import atomic_write
from retrieval_kd.errors import DataError

Scores = npt.NDArray[np.float32]
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Ranking:
    """One query's documents in rank order.

    Attributes:
        doc_ids: Document ids, best first, each once.
        scores: float32 ``[len(doc_ids)]``, strictly decreasing.
    """

    doc_ids: tuple[str, ...]
    scores: Scores

    def __len__(self) -> int:
        return len(self.doc_ids)

    def top(self, k: int) -> Ranking:
        """Return the first ``k`` documents."""
        return Ranking(self.doc_ids[:k], self.scores[:k])


Run = Mapping[str, Ranking]


@dataclass(frozen=True)
class Shortlist:
    """Documents to be scored for a query, in the order in which scores are given back.

    Attributes:
        query_id: The query.
        doc_ids: Its documents, each once.
    """

    query_id: str
    doc_ids: tuple[str, ...]


def rank(doc_ids: Sequence[str], scores: Sequence[float] | npt.NDArray[np.floating], k: int | None = None) -> Ranking:
    """Order documents by (score descending, id ascending) and make the scores strictly decreasing.

    A score that does not lie below its predecessor (a tie, or the successor of a tie that was moved)
    is set to the next smaller float32, so that any tool that sorts by score alone sees this order.

    Args:
        doc_ids: Document ids, each once.
        scores: One finite score for each id.
        k: Keep the best ``k``; all when None.

    Raises:
        DataError: lengths differ, an id occurs twice, or a score is not finite; names the id.
    """
    with np.errstate(over="ignore"):
        # What no float32 can hold becomes infinite, and is refused as such.
        values = np.asarray(scores, dtype=np.float32)
    if values.shape != (len(doc_ids),):
        raise DataError(f"{len(doc_ids)} document ids but scores of shape {values.shape}; give one score for each id")
    if not np.isfinite(values).all():
        worst = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(
            f"document {doc_ids[worst]!r}: score {values[worst]} is not finite; mend the ranker that made it"
        )
    # Sorting by id first and then stably by score puts equal scores in id order.
    by_id = sorted(range(len(doc_ids)), key=doc_ids.__getitem__)
    order = np.asarray(by_id, dtype=np.int64)
    order = order[np.argsort(-values[order], kind="stable")][:k]
    ids = tuple(doc_ids[i] for i in order)
    if len(set(ids)) != len(ids):
        twice = next(a for i, a in enumerate(ids) if a in ids[:i])
        raise DataError(f"document {twice!r} occurs twice in one ranking; keep one of them")
    return Ranking(ids, _strictly_decreasing(values[order]))


def _strictly_decreasing(values: Scores) -> Scores:
    if np.all(values[1:] < values[:-1]):
        return values
    out = values.copy()
    for i in range(1, len(out)):
        if out[i] >= out[i - 1]:
            out[i] = np.nextafter(out[i - 1], np.float32(-np.inf))
    return out


def write_trec(path: Path, run: Run, tag: str) -> None:
    """Write ``query-id Q0 doc-id rank score tag`` lines, rank from 1, scores with 9 significant digits.

    Nine digits give every float32 back exactly, so reading the file again returns the same run.
    """
    with atomic_write(path) as file:
        for query_id, ranking in run.items():
            for position, (doc_id, score) in enumerate(zip(ranking.doc_ids, ranking.scores, strict=True), start=1):
                file.write(f"{query_id} Q0 {doc_id} {position} {score:.9g} {tag}\n")


def write_qrels(path: Path, qrels: Mapping[str, Mapping[str, int]]) -> None:
    """Write ``query-id 0 doc-id grade`` lines, as trec_eval reads judgements."""
    with atomic_write(path) as file:
        for query_id, grades in qrels.items():
            file.writelines(f"{query_id} 0 {doc_id} {grade}\n" for doc_id, grade in grades.items())


def read_trec(path: Path) -> dict[str, Ranking]:
    """Read a TREC run; the rank column is ignored, the order comes from :func:`rank`.

    Raises:
        DataError: wrong number of columns, a score that is not a finite float32, or a repeated
            (query, document) pair; names file and line.
    """
    rows: dict[str, dict[str, float]] = {}
    with _opened(path) as file:
        for line in _lines(path, file):
            _add(rows.setdefault(line.query_id, {}), line, path)
    return {query_id: rank(list(documents), list(documents.values())) for query_id, documents in rows.items()}


class TrecFiles(Mapping[str, Ranking]):
    """A run that stays on disk, in one TREC file or several; a ranking is read when it is asked for.

    In memory are a few numbers for each query, or for each stretch of lines where queries take turns.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Look through the files once.

        Raises:
            DataError: as :func:`read_trec`, but for repeated pairs, which are found when their query is read.
        """
        self._stretches: dict[str, list[_Stretch]] = {}
        for path in paths:
            last = None
            with _opened(path) as file:
                for line in _lines(path, file):
                    if line.query_id != last:
                        self._stretches.setdefault(line.query_id, []).append(_Stretch(path, line.number, line.start))
                        last = line.query_id
                    self._stretches[last][-1].end = line.end

    def __getitem__(self, query_id: str) -> Ranking:
        documents: dict[str, float] = {}
        for stretch in self._stretches[query_id]:
            with _opened(stretch.path) as file:
                file.seek(stretch.start)
                text = io.BytesIO(file.read(stretch.end - stretch.start))
            for line in _lines(stretch.path, text, stretch.number):
                _add(documents, line, stretch.path)
        return rank(list(documents), list(documents.values()))

    def __contains__(self, query_id: object) -> bool:
        return query_id in self._stretches

    def __iter__(self) -> Iterator[str]:
        return iter(self._stretches)

    def __len__(self) -> int:
        return len(self._stretches)


@dataclass(slots=True)
class _Stretch:
    """Neighbouring lines of one query: the file, the first line's number, and the bytes."""

    path: Path
    number: int
    start: int
    end: int = 0


class _Line(NamedTuple):
    number: int
    start: int
    end: int
    query_id: str
    doc_id: str
    score: float


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot read the run ({error.strerror}); give a TREC run file") from None


def _add(documents: dict[str, float], line: _Line, path: Path) -> None:
    if line.doc_id in documents:
        raise DataError(
            f"{path}:{line.number}: query {line.query_id!r} lists document {line.doc_id!r} twice; keep one line"
        )
    # Documents recur from query to query: one string for each, however many rankings are held.
    documents[sys.intern(line.doc_id)] = line.score


def _lines(path: Path, file: BinaryIO, first: int = 1) -> Iterator[_Line]:
    """Yield the lines that are not empty; ``first`` is the number of the first."""
    end = 0
    for number, raw in enumerate(file, start=first):
        start, end = end, end + len(raw)
        try:
            columns = raw.decode("utf-8-sig").split()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
        if not columns:
            continue
        if len(columns) != 6:
            raise DataError(
                f"{path}:{number}: {len(columns)} columns, a TREC run has 6 (query Q0 document rank score tag)"
            )
        try:
            score = float(columns[4])
        except ValueError:
            raise DataError(f"{path}:{number}: score {columns[4]!r} is not a number; mend the line") from None
        if not abs(score) <= _LARGEST:
            wrong = "is not finite" if not math.isfinite(score) else "is beyond what a float32 holds"
            raise DataError(
                f"{path}:{number}: score {columns[4]} {wrong} (query {columns[0]!r}); mend the ranker that made it"
            )
        yield _Line(number, start, end, columns[0], columns[2], score)
