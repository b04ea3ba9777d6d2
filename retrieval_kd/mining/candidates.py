"""Candidates: the documents a teacher scores for each training query, and the file they are kept in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from retrieval_kd.artifacts import atomic_write
from retrieval_kd.collections.files import Line, parse_json, read_lines
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Shortlist

LISTS = "train.jsonl"
"""The file of candidate lists in an artifact's folder."""


@dataclass(frozen=True)
class CandidateList(Shortlist):
    """One query's candidates, positives first.

    Attributes:
        query_id: The query.
        doc_ids: Its candidates, each once.
        labels: Relevance grades: above 0 for positives, 0 for negatives.
    """

    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse lists that cannot teach an order.

        Raises:
            DataError: no positive or no negative, a negative before a positive, a repeated document,
                or labels that do not pair with the documents; names the query.
        """
        if len(self.doc_ids) != len(self.labels):
            raise DataError(f"query {self.query_id!r}: {len(self.doc_ids)} documents but {len(self.labels)} labels")
        if len(set(self.doc_ids)) != len(self.doc_ids):
            twice = next(doc_id for doc_id, count in Counter(self.doc_ids).items() if count > 1)
            raise DataError(f"query {self.query_id!r}: document {twice!r} occurs twice")
        relevant = [label > 0 for label in self.labels]
        if not any(relevant) or all(relevant):
            raise DataError(f"query {self.query_id!r}: needs a positive and a negative, labels {list(self.labels)}")
        if relevant != sorted(relevant, reverse=True) or min(self.labels) < 0:
            raise DataError(f"query {self.query_id!r}: labels {list(self.labels)} must be positives first, then zeros")


def write_candidates(path: Path, lists: Iterable[CandidateList]) -> None:
    """Write one JSON object a line: ``query_id``, ``doc_ids``, ``labels``."""
    with atomic_write(path) as file:
        for candidates in lists:
            file.write(json.dumps(asdict(candidates), ensure_ascii=False) + "\n")


def read_candidates(path: Path) -> list[CandidateList]:
    """Read what :func:`write_candidates` wrote.

    Raises:
        DataError: the file cannot be read, or a line is torn or no candidate list, or a query occurs
            twice; names file and line.
    """
    lists: dict[str, CandidateList] = {}
    for line in read_lines(path):
        candidates = _parse(line)
        if candidates.query_id in lists:
            raise DataError(f"{line.where}: query {candidates.query_id!r} has a list already; mine again")
        lists[candidates.query_id] = candidates
    return list(lists.values())


def _parse(line: Line) -> CandidateList:
    row = parse_json(line.text, line.where, "mine again")
    match row:
        case {"query_id": str(query_id), "doc_ids": [*doc_ids], "labels": [*labels], **rest} if (
            not rest and all(type(doc_id) is str for doc_id in doc_ids) and all(type(label) is int for label in labels)
        ):
            try:
                return CandidateList(query_id, tuple(doc_ids), tuple(labels))
            except DataError as error:
                raise DataError(f"{line.where}: {error}; mine again") from None
    raise DataError(f"{line.where}: not a candidate list (query_id, doc_ids, labels); mine again")
