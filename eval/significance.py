"""Is the difference real: intervals and paired tests over per-query values.

Every function is pure and takes values aligned by query. Tests are paired, because two systems answer
the same queries (Smucker, Allan and Carterette, CIKM 2007: randomisation, t-test and bootstrap agree on
retrieval data; sign and Wilcoxon tests do not). P-values of several systems against one baseline are
corrected by Holm's method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.measures import Evaluation, Values
from retrieval_kd.errors import DataError, did_you_mean

Interval = tuple[float, float]

_RESAMPLES = 10_000
_BLOCK_ENTRIES = 1 << 22
_Z_TWO_SIDED_5 = 1.959964
_Z_POWER_80 = 0.841621


@dataclass(frozen=True)
class Comparison:
    """One system against the baseline, on one measure.

    Attributes:
        system: The system compared.
        baseline: The system it is compared with.
        measure: The measure.
        queries: Number of paired queries.
        difference: Mean of (system - baseline).
        interval: 95 % bootstrap interval of the difference.
        p_t: Two-sided paired t-test.
        p_randomisation: Two-sided paired randomisation test.
        p_holm: ``p_randomisation`` corrected over all systems compared with this baseline.
        effect_size: Mean difference over its standard deviation (Cohen's d_z); 0 when nothing differs.
        wins: Queries on which the system is better.
        ties: Queries on which both are equal.
        losses: Queries on which the system is worse.
        detectable: Smallest true difference that this many queries show in 80 of 100 cases, at 5 %.
    """

    system: str
    baseline: str
    measure: str
    queries: int
    difference: float
    interval: Interval
    p_t: float
    p_randomisation: float
    p_holm: float
    effect_size: float
    wins: int
    ties: int
    losses: int
    detectable: float


def bootstrap_interval(values: Values, seed: int, confidence: float = 0.95, resamples: int = _RESAMPLES) -> Interval:
    """Return the percentile bootstrap interval of a mean.

    Args:
        values: float64 ``[queries]``.
        seed: Seed of the resampling.
        confidence: Share of resampled means that lie inside.
        resamples: Number of resamples.

    Raises:
        DataError: no values.
    """
    _require_values(values)
    rng = np.random.default_rng([seed, 0])
    means = np.concatenate(
        [
            values[rng.integers(len(values), size=(rows, len(values)))].mean(axis=1)
            for rows in _blocks(resamples, values)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_t_test(differences: Values) -> float:
    """Return the two-sided p-value of a paired t-test.

    Equal systems give 1; differences that are all the same and not zero give 0, the test's limit.

    Raises:
        DataError: fewer than two queries.
    """
    if len(differences) < 2:
        raise DataError(f"{len(differences)} queries: a paired test needs at least two; give a larger split")
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def paired_randomisation_test(differences: Values, seed: int, resamples: int = _RESAMPLES) -> float:
    """Return the two-sided p-value of a paired randomisation (sign-flip) test.

    The observed assignment counts as one of the drawn ones, so the p-value is never zero (the "+1" of
    Phipson and Smyth, 2010).

    Raises:
        DataError: no values.
    """
    _require_values(differences)
    rng = np.random.default_rng([seed, 1])
    # A sum that differs from the observed one only by rounding is as extreme as it.
    observed = abs(differences.sum()) * (1 - 1e-12)
    extreme = 0
    for rows in _blocks(resamples, differences):
        signs = rng.integers(0, 2, size=(rows, len(differences)), dtype=np.int8) * 2 - 1
        extreme += int(np.count_nonzero(np.abs(signs @ differences) >= observed))
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down corrected p-values, in the order given (Holm, 1979)."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for position, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[index]))
        corrected[index] = largest
    return corrected


def compare(evaluations: Mapping[str, Evaluation], baseline: str, measure: str, seed: int = 0) -> list[Comparison]:
    """Compare every system with a baseline on one measure.

    Args:
        evaluations: System name to its evaluation; the baseline among them.
        baseline: Name of the system to compare with.
        measure: One of the evaluated measures.
        seed: Seed of bootstrap and randomisation.

    Raises:
        DataError: the baseline or the measure is unknown, or two systems were evaluated on different
            queries; names system and query.
    """
    if baseline not in evaluations:
        raise DataError(f"baseline {baseline!r} is not among the systems{did_you_mean(baseline, evaluations)}")
    reference = evaluations[baseline]
    others = {name: evaluation for name, evaluation in evaluations.items() if name != baseline}
    comparisons = []
    for name, evaluation in others.items():
        differences = _aligned(name, evaluation, measure, reference.query_ids) - _aligned(
            baseline, reference, measure, reference.query_ids
        )
        comparisons.append(_comparison(name, baseline, measure, differences, seed))
    corrected = holm([comparison.p_randomisation for comparison in comparisons])
    return [replace(comparison, p_holm=p) for comparison, p in zip(comparisons, corrected, strict=True)]


def _comparison(system: str, baseline: str, measure: str, differences: Values, seed: int) -> Comparison:
    p_t = paired_t_test(differences)
    deviation = float(differences.std(ddof=1))
    mean = float(differences.mean())
    p_randomisation = paired_randomisation_test(differences, seed)
    return Comparison(
        system=system,
        baseline=baseline,
        measure=measure,
        queries=len(differences),
        difference=mean,
        interval=bootstrap_interval(differences, seed),
        p_t=p_t,
        p_randomisation=p_randomisation,
        p_holm=p_randomisation,
        effect_size=mean / deviation if deviation > 0 else 0.0,
        wins=int(np.count_nonzero(differences > 0)),
        ties=int(np.count_nonzero(differences == 0)),
        losses=int(np.count_nonzero(differences < 0)),
        detectable=(_Z_TWO_SIDED_5 + _Z_POWER_80) * deviation / float(np.sqrt(len(differences))),
    )


def _aligned(name: str, evaluation: Evaluation, measure: str, query_ids: tuple[str, ...]) -> Values:
    """Return the measure's values in the given order of queries."""
    if measure not in evaluation.values:
        raise DataError(f"system {name!r} was not evaluated on {measure!r}{did_you_mean(measure, evaluation.values)}")
    values = evaluation.values[measure]
    if evaluation.query_ids == query_ids:
        return values
    odd = sorted(set(query_ids) ^ set(evaluation.query_ids))
    if odd:
        raise DataError(
            f"system {name!r} was evaluated on {len(evaluation.query_ids)} queries, the baseline on {len(query_ids)}; "
            f"query {odd[0]!r} is in only one of them: evaluate both on the same split"
        )
    row_of = {query_id: row for row, query_id in enumerate(evaluation.query_ids)}
    return values[[row_of[query_id] for query_id in query_ids]]


def _require_values(values: Values) -> None:
    if len(values) == 0:
        raise DataError("no queries, so there is nothing to resample; give a split that judges at least one query")


def _blocks(resamples: int, values: Values) -> list[int]:
    """Split resamples into blocks whose index matrix stays small, whatever the number of queries."""
    rows = max(1, _BLOCK_ENTRIES // len(values))
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]
