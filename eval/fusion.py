"""Fusion of runs: reciprocal ranks, and weighted means of normalised scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from eval.results import Facts
from retrieval_kd.errors import DataError, did_you_mean
from retrieval_kd.runs import Ranking, Run, rank
from retrieval_kd.scores.normalise import normalise

Normalisation = Literal["none", "zscore", "minmax"]
NORMALISATIONS: tuple[Normalisation, ...] = ("none", "zscore", "minmax")
_Values = Callable[[Ranking], npt.NDArray[np.float64]]


def reciprocal_rank_fusion(runs: Sequence[Run], k: int = 60) -> dict[str, Ranking]:
    """Score each document by the sum of ``1 / (k + rank)`` over the runs that have it.

    Cormack, Clarke and Buettcher, SIGIR 2009; their k is 60.

    Raises:
        DataError: fewer than two runs, or ``k`` is negative.
    """
    if k < 0:
        raise DataError(f"reciprocal rank fusion: k {k} must not be negative")
    return _fused(runs, [1.0] * len(runs), lambda ranking: 1.0 / (k + np.arange(1, 1 + len(ranking))))


def weighted_fusion(runs: Sequence[Run], weights: Sequence[float], how: Normalisation) -> dict[str, Ranking]:
    """Score each document by the weighted sum of its normalised scores; a run that lacks it adds nothing.

    Args:
        runs: At least two.
        weights: One for each run, not negative, one above 0.
        how: Normalisation within each ranking, see :func:`retrieval_kd.scores.normalise.normalise`. Under
            ``minmax`` a document that a run lacks counts as that run's worst; under ``zscore`` as its
            average, and under ``none`` as a score of zero.

    Raises:
        DataError: weights that are no weights, another number of them than of runs, an unknown normalisation.
    """
    if len(weights) != len(runs) or not (min(weights, default=-1) >= 0 and 0 < sum(weights) < float("inf")):
        raise DataError(f"weights {list(weights)} for {len(runs)} runs; give one for each, not negative, one above 0")
    if how not in NORMALISATIONS:
        raise DataError(f"no normalisation is called {how!r}{did_you_mean(how, NORMALISATIONS)}")
    return _fused(runs, weights, lambda ranking: normalise(ranking.scores, how).astype(np.float64))


def _fused(runs: Sequence[Run], weights: Sequence[float], values: _Values) -> dict[str, Ranking]:
    if len(runs) < 2:
        raise DataError(f"{len(runs)} run to fuse; name at least two, such as rrf:bm25+student")
    fused: dict[str, Ranking] = {}
    for query_id in dict.fromkeys(query_id for run in runs for query_id in run):
        totals: dict[str, float] = {}
        for run, weight in zip(runs, weights, strict=True):
            ranking = run.get(query_id)
            if ranking is not None and len(ranking):
                for doc_id, value in zip(ranking.doc_ids, values(ranking), strict=True):
                    totals[doc_id] = totals.get(doc_id, 0.0) + weight * float(value)
        fused[query_id] = rank(list(totals), list(totals.values()))
    return fused


@dataclass(frozen=True)
class FusedSystem:
    """Runs of other systems put together.

    Attributes:
        name: What tables print.
        runs: The runs.
        k: Constant of reciprocal rank fusion.
        weights: Weights of a weighted fusion; reciprocal ranks when empty.
        normalise: Normalisation of a weighted fusion.
    """

    name: str
    runs: Sequence[Run]
    k: int = 60
    weights: Sequence[float] = ()
    normalise: Normalisation = "minmax"
    role: str = "fusion"

    def run(self, queries: Mapping[str, str], depth: int) -> Run:
        """Fuse what the runs have for these queries."""
        runs = [{query_id: run[query_id] for query_id in queries if query_id in run} for run in self.runs]
        if self.weights:
            fused = weighted_fusion(runs, self.weights, self.normalise)
        else:
            fused = reciprocal_rank_fusion(runs, self.k)
        return {query_id: ranking.top(depth) for query_id, ranking in fused.items()}

    def facts(self, queries: Mapping[str, str], depth: int) -> Facts:
        """Return nothing: a fusion costs what its systems cost together."""
        return Facts()
