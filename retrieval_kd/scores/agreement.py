"""How far teachers agree: what an average of them gains from, and what a student can at best imitate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from retrieval_kd.runs import Scores
from retrieval_kd.scores.inspect import ScoreReport


@dataclass(frozen=True)
class Agreement:
    """Two teachers over the lists that both have scored.

    Attributes:
        first: One teacher's name.
        second: The other's.
        lists: Lists of which both have scored at least two documents.
        pairs: Documents of these lists that both have scored.
        top1: Share of these lists whose best document is the same; where documents tie for it, one of each is enough.
            None where there is no such list.
        kendall_tau: Kendall's tau-b, mean over the lists in which both tell documents apart; None where none is.
    """

    first: str
    second: str
    lists: int
    pairs: int
    top1: float | None
    kendall_tau: float | None


@dataclass(frozen=True)
class TeachersReport:
    """What several teachers' scores look like, and how far they agree.

    Attributes:
        teachers: Each teacher's report by name.
        agreements: One for each two of them.
    """

    teachers: Mapping[str, ScoreReport]
    agreements: tuple[Agreement, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "teachers": {name: report.to_json() for name, report in self.teachers.items()},
            "agreements": [asdict(agreement) for agreement in self.agreements],
        }


def agreements(scores: Mapping[str, Sequence[Scores]]) -> tuple[Agreement, ...]:
    """Compare each two of several teachers.

    Args:
        scores: By name each teacher's scores of the same lists, aligned; NaN where it has none.
    """
    return tuple(agreement(*one, *other) for one, other in itertools.combinations(scores.items(), 2))


def agreement(first: str, ours: Sequence[Scores], second: str, theirs: Sequence[Scores]) -> Agreement:
    """Compare two teachers' scores of the same lists, aligned; NaN where one has none."""
    from scipy.stats import kendalltau

    tops, taus, pairs = [], [], 0
    for one, other in zip(ours, theirs, strict=True):
        known = np.isfinite(one) & np.isfinite(other)
        if known.sum() < 2:
            continue
        one, other = one[known], other[known]
        pairs += len(one)
        tops.append(bool(((one == one.max()) & (other == other.max())).any()))
        if np.ptp(one) > 0 and np.ptp(other) > 0:
            taus.append(float(kendalltau(one, other).statistic))
    return Agreement(
        first,
        second,
        lists=len(tops),
        pairs=pairs,
        top1=float(np.mean(tops)) if tops else None,
        kendall_tau=float(np.mean(taus)) if taus else None,
    )
