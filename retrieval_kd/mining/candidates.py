"""Candidates: the documents a teacher scores for each training query.

Negatives are mined by rank, not by score (FlagEmbedding#1130), from the pooled runs of the first stages.
A judged positive, a copy of one under another id, and an empty document are never negatives; what was
removed and why is in the :class:`MiningReport`, so that a candidate file can be explained and rebuilt.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.artifacts import atomic_write
from retrieval_kd.collections.base import Collection, normalised, training_queries
from retrieval_kd.collections.files import Line, read_lines
from retrieval_kd.errors import DataError
from retrieval_kd.progress import progress
from retrieval_kd.recipes.schema import CandidatesSpec
from retrieval_kd.runs import Run, Shortlist

_CHUNK_QUERIES = 256


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


@dataclass
class MiningReport:
    """What mining kept and what it left out.

    Attributes:
        queries: Training queries looked at.
        lists: Lists made.
        dropped: Queries without a list, by reason.
        short: Lists with fewer negatives than asked for.
        removed: Pooled documents that were not allowed as negatives, by reason.
    """

    queries: int = 0
    lists: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    short: int = 0
    removed: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**vars(self), "dropped": dict(self.dropped), "removed": dict(self.removed)}


def sample_candidates(
    collection: Collection,
    runs: Mapping[str, Run],
    spec: CandidatesSpec,
    seed: int,
    report: MiningReport | None = None,
) -> Iterator[CandidateList]:
    """Yield a candidate list for each training query, in the order of the train split's judgements.

    The pool is the union of the runs' ranks ``spec.window``. ``top`` takes the documents of best rank in
    any run (ties by the order of the runs), ``random`` draws from the pool with a generator made of the
    seed and the query id, so a query's negatives do not depend on which other queries there are. A pool
    with fewer allowed documents than asked for gives them all; one without any drops the query.

    Args:
        collection: Queries, judgements, and the texts that duplicates are found by.
        runs: First stage's name to its run.
        spec: Window, numbers, strategy.
        seed: Seed of the draws.
        report: Filled while lists are taken.

    Raises:
        DataError: a run names a query or document that the collection does not have.
    """
    report = MiningReport() if report is None else report
    _check_queries(collection, runs)
    query_ids, qrels = list(training_queries(collection)), collection.qrels("train")
    with progress("sample candidates", len(query_ids), "queries") as advance:
        for start in range(0, len(query_ids), _CHUNK_QUERIES):
            chunk = query_ids[start : start + _CHUNK_QUERIES]
            pools = {query_id: _pool(query_id, runs, spec.window) for query_id in chunk}
            positives = {query_id: _positives(qrels[query_id]) for query_id in chunk}
            # One read of the corpus for many queries, in the order of the file.
            texts = collection.contents({*itertools.chain(*pools.values(), *positives.values())})
            for query_id in chunk:
                report.queries += 1
                relevant = [doc_id for doc_id in positives[query_id] if texts[doc_id].strip()]
                if not relevant:
                    report.dropped["no positive with a text"] += 1
                    continue
                allowed = _allowed(
                    pools[query_id], qrels[query_id], [texts[doc_id] for doc_id in relevant], texts, report
                )
                if not allowed:
                    report.dropped["no negative in the pool"] += 1
                    continue
                report.lists += 1
                report.short += len(allowed) < spec.negatives
                chosen = relevant[: spec.positives]
                negatives = _draw(allowed, spec, seed, query_id)
                labels = (*(qrels[query_id][doc_id] for doc_id in chosen), *(0 for _ in negatives))
                yield CandidateList(query_id, (*chosen, *negatives), labels)
            advance(len(chunk))


def _check_queries(collection: Collection, runs: Mapping[str, Run]) -> None:
    known = collection.queries()
    for name, run in runs.items():
        for query_id in run:
            if query_id not in known:
                raise DataError(
                    f"run {name!r}: query {query_id!r} is not in {collection.name}; give a run over its train split"
                )


def _pool(query_id: str, runs: Mapping[str, Run], window: tuple[int, int]) -> list[str]:
    """Return the documents that any run ranks within the window, best rank first."""
    first, last = window
    best: dict[str, tuple[int, int]] = {}
    for order, run in enumerate(runs.values()):
        if query_id in run:
            for position, doc_id in enumerate(run[query_id].doc_ids[first - 1 : last]):
                best[doc_id] = min(best.get(doc_id, (position, order)), (position, order))
    return sorted(best, key=best.__getitem__)


def _positives(grades: Mapping[str, int]) -> list[str]:
    """Return the relevant documents, highest grade first, ties by id."""
    return sorted(
        (doc_id for doc_id, grade in grades.items() if grade > 0), key=lambda doc_id: (-grades[doc_id], doc_id)
    )


def _allowed(
    pool: Sequence[str],
    grades: Mapping[str, int],
    positive_texts: Iterable[str],
    texts: Mapping[str, str],
    report: MiningReport,
) -> list[str]:
    """Return the documents of a pool that may be negatives; count the others."""
    copies = {normalised(text) for text in positive_texts}
    allowed = []
    for doc_id in pool:
        text = normalised(texts[doc_id])
        if grades.get(doc_id, 0) > 0:
            report.removed["judged relevant"] += 1
        elif not text:
            report.removed["empty"] += 1
        elif text in copies:
            report.removed["same text as a positive"] += 1
        else:
            allowed.append(doc_id)
    return allowed


def _draw(allowed: Sequence[str], spec: CandidatesSpec, seed: int, query_id: str) -> list[str]:
    if spec.strategy == "top" or len(allowed) <= spec.negatives:
        return list(allowed[: spec.negatives])
    of_query = int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:8])
    drawn = np.random.default_rng([seed, of_query]).choice(len(allowed), spec.negatives, replace=False)
    return [allowed[position] for position in sorted(drawn)]


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
    try:
        row = json.loads(line.text)
    except json.JSONDecodeError as error:
        raise DataError(f"{line.where}: malformed JSON ({error.msg}); mine again") from None
    match row:
        case {"query_id": str(query_id), "doc_ids": [*doc_ids], "labels": [*labels], **rest} if (
            not rest and all(type(doc_id) is str for doc_id in doc_ids) and all(type(label) is int for label in labels)
        ):
            try:
                return CandidateList(query_id, tuple(doc_ids), tuple(labels))
            except DataError as error:
                raise DataError(f"{line.where}: {error}; mine again") from None
    raise DataError(f"{line.where}: not a candidate list (query_id, doc_ids, labels); mine again")
