"""From pools to candidate lists: what the teacher finds too relevant is left out, and negatives are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from retrieval_kd.collections.base import Collection
from retrieval_kd.errors import DataError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.mining.pool import MiningReport, Pool, pooled
from retrieval_kd.recipes.schema import CandidatesSpec, FilterSpec
from retrieval_kd.runs import Run, Scores, Shortlist

Scorer = Callable[[Sequence[Shortlist]], Sequence[Scores]]
"""Gives the teacher's scores of shortlists, one float32 array a list."""


def sample_candidates(
    collection: Collection,
    runs: Mapping[str, Run],
    spec: CandidatesSpec,
    seed: int,
    report: MiningReport | None = None,
    scorer: Scorer | None = None,
    queries: Sequence[str] | None = None,
) -> Iterator[CandidateList]:
    """Yield a candidate list for each training query, in the order of the train split's judgements.

    Negatives come from the query's pool, see :func:`retrieval_kd.mining.pool.pooled`, without those that
    ``spec.filter`` leaves out. ``top`` takes the best ranks; ``random`` and ``stratified`` draw with a generator made
    of the seed and the query id, so a query's negatives do not depend on which other queries there are. A pool with
    fewer documents than asked for gives them all; one without any drops the query.

    Args:
        collection: Queries, judgements, and the texts that duplicates are found by.
        runs: First stage's name to its run.
        spec: Window, filter, numbers, strategy.
        seed: Seed of the draws.
        report: Filled while lists are taken.
        scorer: Asked once for the scores of all pools, and only where ``spec.needs_scores``; the pools' ids are then
            held in memory.
        queries: Ids of the training queries to mine for; all when None.

    Raises:
        DataError: a run names a query or document that the collection does not have, or pools need scores and there
            is no scorer.
    """
    report = MiningReport() if report is None else report
    pools = pooled(collection, runs, spec, report, queries)
    for pool, scores in _scored(pools, spec, scorer):
        positives, negatives = np.split(scores, [len(pool.positives)])
        allowed = np.arange(len(pool.negatives))
        if spec.filter is not None:
            allowed = _passing(positives, negatives, spec.filter, report)
            if not len(allowed):
                report.dropped["no negative that the teacher's filter allows"] += 1
                continue
        chosen = _draw(allowed, negatives, spec, seed, pool.query_id)
        report.lists += 1
        report.short += len(allowed) < spec.negatives
        report.kept.update(pool.sources[i] for i in chosen)
        if spec.needs_scores:
            report.add_scores("positives", positives)
            report.add_scores("negatives", negatives[chosen])
        labels = (*pool.grades, *(0 for _ in chosen))
        yield CandidateList(pool.query_id, (*pool.positives, *(pool.negatives[i] for i in chosen)), labels)


def _scored(
    pools: Iterable[Pool], spec: CandidatesSpec, scorer: Scorer | None
) -> Iterator[tuple[Pool, npt.NDArray[np.float32]]]:
    """Yield each pool with the scores of its positives and negatives; zeros where nothing asks for them."""
    if not spec.needs_scores:
        for pool in pools:
            yield pool, np.zeros(len(pool.positives) + len(pool.negatives), dtype=np.float32)
        return
    if scorer is None:
        raise DataError("candidates: filter and stratified draws need a teacher's scores; give a scorer")
    held = list(pools)
    yield from zip(held, scorer([pool.shortlist for pool in held]), strict=True)


def _passing(positives: Scores, negatives: Scores, spec: FilterSpec, report: MiningReport) -> npt.NDArray[np.int64]:
    """Return the positions of the negatives within all bounds; count each other one under the first it breaks."""
    positive, scores = float(positives.min()), negatives.astype(np.float64)
    highest = {
        "scored above the maximum": spec.max_score,
        "scored within the margin of a positive": None if spec.margin is None else positive - spec.margin,
        # A share of a negative score would lie above it.
        "scored above the ratio to a positive": None
        if spec.ratio is None
        else positive - (1 - spec.ratio) * abs(positive),
    }
    lowest = -np.inf
    if spec.percentiles is not None:
        lowest, highest["scored above the percentiles"] = map(float, np.percentile(scores, spec.percentiles))
    allowed = np.ones(len(negatives), dtype=bool)
    for reason, bound in highest.items():
        if bound is not None:
            _leave_out(reason, scores > bound, allowed, report)
    _leave_out("scored below the percentiles", scores < lowest, allowed, report)
    if not allowed.all():
        report.add_scores("left out", negatives[~allowed])
    return np.flatnonzero(allowed)


def _leave_out(
    reason: str, breaks: npt.NDArray[np.bool_], allowed: npt.NDArray[np.bool_], report: MiningReport
) -> None:
    count = int((allowed & breaks).sum())
    if count:
        report.removed[reason] += count
    allowed &= ~breaks


def _draw(
    allowed: npt.NDArray[np.int64], scores: Scores, spec: CandidatesSpec, seed: int, query_id: str
) -> npt.NDArray[np.int64]:
    """Return the positions of the negatives drawn, in the order of the pool."""
    if spec.strategy == "top" or len(allowed) <= spec.negatives:
        return allowed[: spec.negatives]
    of_query = int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:8])
    generator = np.random.default_rng([seed, of_query])
    if spec.strategy == "random":
        return np.sort(allowed[generator.choice(len(allowed), spec.negatives, replace=False)])
    best_first = allowed[np.argsort(-scores[allowed], kind="stable")]
    strata = np.array_split(best_first, spec.negatives)
    return np.sort(np.array([stratum[generator.integers(len(stratum))] for stratum in strata]))
