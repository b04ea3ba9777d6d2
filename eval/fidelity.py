"""How faithfully a student ranks as its teacher does, whatever the judgements say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrieval_kd.errors import DataError
from retrieval_kd.runs import Ranking, Run


@dataclass(frozen=True)
class Fidelity:
    """Agreement of two rankers, averaged over the teacher's queries.

    Attributes:
        queries: Queries the teacher ranked; one the student misses counts as no agreement in
            ``top1`` and ``overlap``.
        depth: The k of ``overlap``.
        top1: Share of queries with the same first document.
        overlap: Mean share of the teacher's top k that the student's top k has.
        kendall_tau: Mean Kendall tau-b over the documents that both rank.
        correlation: Mean Pearson correlation of the two scores over the same documents.
        compared: Queries with two or more common documents, over which the last two are averaged; both
            are 0 when there is none.
    """

    queries: int
    depth: int
    top1: float
    overlap: float
    kendall_tau: float
    correlation: float
    compared: int


def fidelity(student: Run, teacher: Run, depth: int = 10) -> Fidelity:
    """Compare a student's run with its teacher's.

    Raises:
        DataError: the teacher ranked nothing, or ``depth`` is below 1.
    """
    if depth < 1:
        raise DataError(f"depth {depth} must be at least 1")
    ranked = {query_id: ranking for query_id, ranking in teacher.items() if len(ranking)}
    if not ranked:
        raise DataError("the teacher's run is empty, so there is nothing to be faithful to")
    nothing = Ranking((), np.empty(0, dtype=np.float32))
    pairs = [(student.get(query_id, nothing), ranking) for query_id, ranking in ranked.items()]
    agreements = [agreement for ours, theirs in pairs if (agreement := _agreement(ours, theirs)) is not None]
    tau, correlation = np.mean(agreements, axis=0) if agreements else (0.0, 0.0)
    return Fidelity(
        queries=len(pairs),
        depth=depth,
        top1=float(np.mean([ours.doc_ids[:1] == theirs.doc_ids[:1] for ours, theirs in pairs])),
        overlap=float(np.mean([_overlap(ours.top(depth), theirs.top(depth)) for ours, theirs in pairs])),
        kendall_tau=float(tau),
        correlation=float(correlation),
        compared=len(agreements),
    )


def _overlap(student: Ranking, teacher: Ranking) -> float:
    return len(set(student.doc_ids) & set(teacher.doc_ids)) / len(teacher)


def _agreement(student: Ranking, teacher: Ranking) -> tuple[float, float] | None:
    """Return Kendall tau and correlation over common documents, None when there are fewer than two."""
    from scipy import stats

    ours = dict(zip(student.doc_ids, student.scores.tolist(), strict=True))
    common = [
        (ours[doc_id], score) for doc_id, score in zip(teacher.doc_ids, teacher.scores, strict=True) if doc_id in ours
    ]
    if len(common) < 2:
        return None
    left, right = np.asarray(common, dtype=np.float64).T
    return float(stats.kendalltau(left, right).statistic), float(np.corrcoef(left, right)[0, 1])
