"""The pool of a query: what first stages found for it and may be a negative.

Negatives are mined by rank, not by a retriever's score (FlagEmbedding#1130), from the pooled runs of the first
stages. A judged positive, a copy of one under another id, a copy of a better ranked document and an empty document
are never negatives; what was left out and why is in the :class:`MiningReport`.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval_kd.collections.base import Collection, normalised, training_queries
from retrieval_kd.errors import DataError
from retrieval_kd.progress import progress
from retrieval_kd.recipes.schema import CandidatesSpec
from retrieval_kd.runs import Run, Shortlist

_CHUNK_QUERIES = 256
_QUANTILES = {"lowest": 0.0, "median": 0.5, "highest": 1.0}


@dataclass
class MiningReport:
    """What mining kept and what it left out.

    Attributes:
        queries: Training queries looked at.
        lists: Lists made.
        dropped: Queries without a list, by reason.
        short: Lists with fewer negatives than asked for.
        removed: Pooled documents that were not allowed as negatives, by reason.
        kept: Negatives drawn, by the first stages that had found them.
        scores: The teacher's scores of positives, of the negatives drawn and of what its scores left out; empty where
            the pool was not scored.
    """

    queries: int = 0
    lists: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    short: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    scores: dict[str, array[float]] = field(default_factory=dict)

    def add_scores(self, whose: str, scores: npt.NDArray[np.float32]) -> None:
        """Remember scores under a name."""
        self.scores.setdefault(whose, array("f")).extend(scores.tolist())

    @property
    def left_out(self) -> str:
        """Return why queries have no list, with numbers, in words."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values, scores by their quantiles."""
        return {
            **vars(self),
            "dropped": dict(self.dropped),
            "removed": dict(self.removed),
            "kept": dict(self.kept),
            "scores": {whose: _summary(scores) for whose, scores in self.scores.items() if scores},
        }


def _summary(scores: array[float]) -> dict[str, float]:
    values = np.quantile(np.asarray(scores), list(_QUANTILES.values()))
    return {"count": len(scores), **dict(zip(_QUANTILES, map(float, values), strict=True))}


@dataclass(frozen=True)
class Pool:
    """One query's positives and what may be its negatives.

    Attributes:
        query_id: The query.
        positives: Its relevant documents, best grade first.
        grades: Their grades.
        negatives: Documents of the pool, best rank in any run first.
        sources: For each negative the names of the runs that found it, such as ``bm25 + dense``.
    """

    query_id: str
    positives: tuple[str, ...]
    grades: tuple[int, ...]
    negatives: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def shortlist(self) -> Shortlist:
        """Return what a teacher has to score before negatives can be chosen by score."""
        return Shortlist(self.query_id, (*self.positives, *self.negatives))


def pooled(
    collection: Collection,
    runs: Mapping[str, Run],
    spec: CandidatesSpec,
    report: MiningReport,
    queries: Sequence[str] | None = None,
) -> Iterator[Pool]:
    """Yield the pool of each training query that has one, in the order of the train split's judgements.

    A pool is the union of the runs' ranks ``spec.window``, ordered by the best rank in any run (ties by the order of
    the runs). Texts are read for some hundred queries at a time and not kept.

    Args:
        collection: Queries, judgements, and the texts that duplicates are found by.
        runs: First stage's name to its run.
        spec: Window and number of positives.
        report: Filled while pools are taken.
        queries: Ids of the training queries wanted; all when None.

    Raises:
        DataError: a run names a query or document that the collection does not have.
    """
    _check_queries(collection, runs)
    query_ids = list(training_queries(collection)) if queries is None else queries
    qrels = collection.qrels("train")
    with progress("pool candidates", len(query_ids), "queries") as advance:
        for start in range(0, len(query_ids), _CHUNK_QUERIES):
            chunk = query_ids[start : start + _CHUNK_QUERIES]
            found = {query_id: _found(query_id, runs, spec.window) for query_id in chunk}
            positives = {query_id: _positives(qrels[query_id]) for query_id in chunk}
            # One read of the corpus for many queries, in the order of the file.
            texts = collection.contents({*itertools.chain(*found.values(), *positives.values())})
            for query_id in chunk:
                report.queries += 1
                relevant = [doc_id for doc_id in positives[query_id] if texts[doc_id].strip()]
                if not relevant:
                    report.dropped["no positive with a text"] += 1
                    continue
                copies = {normalised(texts[doc_id]) for doc_id in relevant}
                negatives = _allowed(found[query_id], qrels[query_id], copies, texts, report)
                if not negatives:
                    report.dropped["no negative in the pool"] += 1
                    continue
                chosen = tuple(relevant[: spec.positives])
                yield Pool(
                    query_id,
                    chosen,
                    tuple(qrels[query_id][doc_id] for doc_id in chosen),
                    tuple(negatives),
                    tuple(found[query_id][doc_id] for doc_id in negatives),
                )
            advance(len(chunk))


def _check_queries(collection: Collection, runs: Mapping[str, Run]) -> None:
    known = collection.queries()
    for name, run in runs.items():
        for query_id in run:
            if query_id not in known:
                raise DataError(
                    f"run {name!r}: query {query_id!r} is not in {collection.name}; give a run over its train split"
                )


def _found(query_id: str, runs: Mapping[str, Run], window: tuple[int, int]) -> dict[str, str]:
    """Return the documents that any run ranks within the window, best rank first, and the names of the runs."""
    first, last = window
    best: dict[str, tuple[int, int]] = {}
    finders: dict[str, list[str]] = {}
    for order, (name, run) in enumerate(runs.items()):
        if query_id in run:
            for position, doc_id in enumerate(run[query_id].doc_ids[first - 1 : last]):
                best[doc_id] = min(best.get(doc_id, (position, order)), (position, order))
                finders.setdefault(doc_id, []).append(name)
    return {doc_id: " + ".join(finders[doc_id]) for doc_id in sorted(best, key=best.__getitem__)}


def _positives(grades: Mapping[str, int]) -> list[str]:
    """Return the relevant documents, highest grade first, ties by id."""
    return sorted(
        (doc_id for doc_id, grade in grades.items() if grade > 0), key=lambda doc_id: (-grades[doc_id], doc_id)
    )


def _allowed(
    found: Iterable[str],
    grades: Mapping[str, int],
    positive_texts: set[str],
    texts: Mapping[str, str],
    report: MiningReport,
) -> Sequence[str]:
    """Return the documents that may be negatives; count the others."""
    allowed: dict[str, str] = {}
    for doc_id in found:
        text = normalised(texts[doc_id])
        if grades.get(doc_id, 0) > 0:
            report.removed["judged relevant"] += 1
        elif not text:
            report.removed["empty"] += 1
        elif text in positive_texts:
            report.removed["same text as a positive"] += 1
        elif text in allowed:
            report.removed["same text as a better ranked one"] += 1
        else:
            allowed[text] = doc_id
    return list(allowed.values())
