"""What a teacher's scores look like before a student is trained on them: spread, ties, and a temperature.

A softmax over raw logits fails in silence at both ends: scores that are all equal teach nothing, and
scores spread over more than about 87 leave most documents with a probability that float32 cannot hold,
hence without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval_kd.errors import DataError
from retrieval_kd.runs import Scores

_Padded = npt.NDArray[np.float64]
# A probability e^-gap below this gap is a normal float32 number.
_LARGEST_GAP = float(-np.log(np.finfo(np.float32).tiny))
_TARGET_ENTROPY = 0.5
_BISECTIONS = 60


@dataclass(frozen=True)
class ScoreReport:
    """Statistics of score lists; where scores are not finite, of the lists without them.

    Attributes:
        queries: Lists in all.
        pairs: Scores in all.
        not_finite: Scores that are NaN or infinite.
        equal_lists: Lists whose scores are all equal.
        mean_spread: Mean over lists of highest minus lowest score.
        widest_spread: Largest of these.
        p1: First percentile of all scores.
        p50: Median of all scores.
        p99: Last percentile of all scores.
        tied: Share of scores that another score of the same list equals.
        underflow: Share of scores whose softmax probability at temperature 1 is below the smallest
            normal float32 number.
        temperature: The temperature at which the softmax of a list is halfway between one-hot and
            flat: the mean over lists of entropy / log(length) is 0.5, so a list of n documents
            spreads over about sqrt(n) of them. None when every list's scores are equal.
    """

    queries: int
    pairs: int
    not_finite: int
    equal_lists: int
    mean_spread: float
    widest_spread: float
    p1: float
    p50: float
    p99: float
    tied: float
    underflow: float
    temperature: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the warnings."""
        return {**asdict(self), "warnings": list(self.warnings)}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return one line for each thing that would make training on these scores fail in silence."""
        lines = []
        if self.not_finite:
            lines.append(f"{self.not_finite} of {self.pairs} scores are NaN or infinite; mend the teacher")
        if self.equal_lists == self.queries:
            lines.append("all scores within each list are equal: there is nothing to learn; check the teacher")
        elif self.equal_lists:
            lines.append(f"{self.equal_lists} of {self.queries} lists have equal scores and teach nothing")
        if self.underflow and self.temperature is not None:
            lines.append(
                f"{self.underflow:.1%} of the scores underflow a softmax at temperature 1 (mean spread "
                f"{self.mean_spread:.1f}); use temperature {self.enough:.3g}"
            )
        return tuple(lines)

    @property
    def enough(self) -> float | None:
        """Return ``temperature``, or a higher one where some list's lowest score would still underflow."""
        return None if self.temperature is None else max(self.temperature, self.widest_spread / _LARGEST_GAP)


def inspect(lists_scores: Sequence[Scores]) -> ScoreReport:
    """Measure score lists, each float ``[documents]`` of any length.

    Raises:
        DataError: there is no list, or no list of finite scores.
    """
    finite = [np.asarray(scores, dtype=np.float64) for scores in lists_scores if np.isfinite(scores).all()]
    finite = [scores for scores in finite if len(scores)]
    if not finite:
        raise DataError(f"{len(lists_scores)} score lists, none with finite scores only; score candidates first")
    everything = np.concatenate(finite)
    spreads = np.array([np.ptp(scores) for scores in finite])
    below_top = _pad_below_top(finite)
    log_p = below_top - np.log(np.exp(below_top).sum(axis=1, keepdims=True))
    p1, p50, p99 = np.percentile(everything, [1, 50, 99])
    return ScoreReport(
        queries=len(lists_scores),
        pairs=sum(len(scores) for scores in lists_scores),
        not_finite=int(sum(np.count_nonzero(~np.isfinite(scores)) for scores in lists_scores)),
        equal_lists=int(np.count_nonzero(spreads == 0)),
        mean_spread=float(spreads.mean()),
        widest_spread=float(spreads.max()),
        p1=float(p1),
        p50=float(p50),
        p99=float(p99),
        tied=sum(_tied(scores) for scores in finite) / len(everything),
        underflow=np.count_nonzero(np.isfinite(log_p) & (log_p < -_LARGEST_GAP)) / len(everything),
        temperature=_halfway_temperature([scores for scores in finite if np.ptp(scores) > 0]),
    )


def _tied(scores: npt.NDArray[np.float64]) -> int:
    _, counts = np.unique(scores, return_counts=True)
    return int(counts[counts > 1].sum())


def _pad_below_top(lists: Sequence[npt.NDArray[np.float64]]) -> _Padded:
    """Return ``[lists, longest]``: each score minus its list's highest, padded with -inf."""
    out = np.full((len(lists), max(len(scores) for scores in lists)), -np.inf)
    for row, scores in zip(out, lists, strict=True):
        row[: len(scores)] = scores - scores.max()
    return out


def _halfway_temperature(lists: Sequence[npt.NDArray[np.float64]]) -> float | None:
    """Find the temperature by bisection: entropy grows with it, from log(ties at the top) to log(length)."""
    if not lists:
        return None
    below_top = _pad_below_top(lists)
    longest = np.log([len(scores) for scores in lists])
    spread = float(-below_top[np.isfinite(below_top)].min())
    low, high = np.log(spread * 1e-9), np.log(spread * 1e9)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if np.mean(_entropy(below_top / np.exp(middle)) / longest) < _TARGET_ENTROPY:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def _entropy(logits: _Padded) -> npt.NDArray[np.float64]:
    """Return the entropy in nats of each row's softmax; entries of -inf have no share."""
    weights = np.exp(logits)
    total = weights.sum(axis=1)
    weighted = np.where(weights > 0, weights * np.where(np.isfinite(logits), logits, 0.0), 0.0)
    entropy: npt.NDArray[np.float64] = np.log(total) - weighted.sum(axis=1) / total
    return entropy
