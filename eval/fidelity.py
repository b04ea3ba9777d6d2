"""How faithfully a student ranks as its teacher does, whatever the judgements say.

The gate decides on retrieval and not on cosines: a student can lie close to its teacher everywhere and
still confuse the documents that matter, or lie far away by a rotation that changes no ranking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.significance import Comparison
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.errors import DataError, QualityError
from retrieval_kd.runs import Ranking, Run

_COSINE_PERCENTILES = (1, 5, 25, 50)
_NOTHING = Ranking((), np.empty(0, dtype=np.float32))


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
        divergence: Mean Kullback-Leibler divergence, in nats, of the student's softmax from the teacher's
            over the same documents, both sides' scores brought to mean 0 and deviation 1 first.
        compared: Queries with two or more common documents, over which the last three are averaged; they
            are 0 when there is none.
    """

    queries: int
    depth: int
    top1: float
    overlap: float
    kendall_tau: float
    correlation: float
    divergence: float
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
    pairs = [(student.get(query_id, _NOTHING), ranking) for query_id, ranking in ranked.items()]
    agreements = [agreement for ours, theirs in pairs if (agreement := _agreement(ours, theirs)) is not None]
    tau, correlation, divergence = np.mean(agreements, axis=0) if agreements else (0.0, 0.0, 0.0)
    return Fidelity(
        queries=len(pairs),
        depth=depth,
        top1=float(np.mean([ours.doc_ids[:1] == theirs.doc_ids[:1] for ours, theirs in pairs])),
        overlap=float(np.mean([_overlap(ours.top(depth), theirs.top(depth)) for ours, theirs in pairs])),
        kendall_tau=float(tau),
        correlation=float(correlation),
        divergence=float(divergence),
        compared=len(agreements),
    )


def cosines(student: Vectors, teacher: Vectors) -> dict[str, float]:
    """Return mean and low percentiles of the cosines between two encoders' vectors of the same texts.

    Args:
        student: float32 ``[n, d]``.
        teacher: float32 ``[n, d]``, rows of the same texts.

    Raises:
        DataError: other shapes, or no texts.
    """
    if student.shape != teacher.shape or len(student) == 0:
        raise DataError(
            f"cosines of vectors of shapes {student.shape} and {teacher.shape}; give the same texts to both"
        )
    left, right = student.astype(np.float64), teacher.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    values = np.einsum("ij,ij->i", left, right) / np.maximum(lengths, 1e-30)
    percentiles = np.percentile(values, _COSINE_PERCENTILES).tolist()
    named = {f"p{percent}": value for percent, value in zip(_COSINE_PERCENTILES, percentiles, strict=True)}
    return {"mean": float(values.mean()), **named}


def agreement_entry(student: str, teacher: str, found: Fidelity, near: Mapping[str, float] | None) -> dict[str, Any]:
    """Return what ``report.json`` says about one student and its teacher."""
    return {"student": student, "teacher": teacher, **asdict(found), "cosines": None if near is None else dict(near)}


def require_retrieval(comparison: Comparison, max_loss: float) -> None:
    """Refuse a student whose retrieval may be worse than its teacher's by more than is allowed.

    It passes when the 95 % interval of the difference lies above ``-max_loss`` (a test of non-inferiority):
    too few queries to tell are no reason to pass.

    Raises:
        QualityError: names difference, interval and limit.
    """
    low, high = comparison.interval
    if low < -max_loss:
        raise QualityError(
            f"{comparison.system!r} may lose more than {max_loss:g} {comparison.measure} against "
            f"{comparison.baseline!r}: difference {comparison.difference:+.4f}, 95 % interval {low:+.4f} to "
            f"{high:+.4f} over {comparison.queries} queries; train it further, or allow more with --max-loss"
        )


def _overlap(student: Ranking, teacher: Ranking) -> float:
    return len(set(student.doc_ids) & set(teacher.doc_ids)) / len(teacher)


def _agreement(student: Ranking, teacher: Ranking) -> tuple[float, float, float] | None:
    """Return Kendall tau, correlation and divergence over common documents, None when there are fewer than two."""
    from scipy import stats

    ours = dict(zip(student.doc_ids, student.scores.tolist(), strict=True))
    common = [
        (ours[doc_id], score) for doc_id, score in zip(teacher.doc_ids, teacher.scores, strict=True) if doc_id in ours
    ]
    if len(common) < 2:
        return None
    left, right = np.asarray(common, dtype=np.float64).T
    tau, correlation = float(stats.kendalltau(left, right).statistic), float(np.corrcoef(left, right)[0, 1])
    return tau, correlation, _divergence(right, left)


def _divergence(teacher: npt.NDArray[np.float64], student: npt.NDArray[np.float64]) -> float:
    log_p, log_q = _log_softmax(teacher), _log_softmax(student)
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _log_softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Strictly decreasing rankings of two or more documents always have a deviation.
    scaled = (scores - scores.mean()) / scores.std()
    out: npt.NDArray[np.float64] = scaled - scaled.max() - np.log(np.exp(scaled - scaled.max()).sum())
    return out
