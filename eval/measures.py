"""Measures of a run against judgements, by ir_measures, over every judged query.

Two things are decided here and not by the library. The order of documents is the run's own: the
library gets ranks as scores, so its providers cannot disagree about ties (ir_measures#18). The
denominator is the judgements' queries: a query that the run misses counts zero, so that a run cannot
look better by answering less (BEIR's evaluator averages over the answered ones).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ir_measures
import numpy as np
import numpy.typing as npt
from ir_measures.measures import registry
from ir_measures.measures.base import MeanAgg

from retrieval_kd.collections.base import Qrels
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Ranking, Run, rank

Values = npt.NDArray[np.float64]
_ONE = rank(["d"], [1.0])


@dataclass(frozen=True)
class Evaluation:
    """What a run is worth, query by query.

    Attributes:
        query_ids: Every judged query, in the order of the judgements.
        values: Measure to float64 ``[len(query_ids)]``, aligned with ``query_ids``.
        missing: Judged queries for which the run has no documents; they are in ``values`` as zeros.
    """

    query_ids: tuple[str, ...]
    values: Mapping[str, Values]
    missing: tuple[str, ...]

    @property
    def means(self) -> dict[str, float]:
        """Return each measure's mean over all judged queries."""
        return {measure: math.fsum(values) / len(self.query_ids) for measure, values in self.values.items()}


def evaluate(run: Run, qrels: Qrels, measures: Sequence[str]) -> Evaluation:
    """Measure a run.

    Args:
        run: Rankings by query id. Documents without a judgement count as not relevant.
        qrels: The judgements; their queries are the denominator.
        measures: ir_measures names, such as ``nDCG@10``, ``RR@10``, ``R@100``, ``Judged@10`` or
            ``RR(rel=2)@10``.

    Raises:
        DataError: no judgements, an unknown measure (the message suggests the nearest), or a run
            with a query that the judgements do not know (see :func:`restrict`), or a measure whose provider fails.
    """
    if not qrels:
        raise DataError(
            "no judgements, so there is nothing to average over; give a split that judges at least one query"
        )
    for query_id in run:
        if query_id not in qrels:
            raise DataError(
                f"the run answers query {query_id!r}, which the judgements do not have; "
                "give the split the run was made for, or restrict the run to it"
            )
    parsed = {name: parse_measure(name) for name in measures}
    query_ids = tuple(qrels)
    computed = {str(measure): np.zeros(len(query_ids)) for measure in parsed.values()}
    try:
        for metric in _iter_calc(list(parsed.values()), qrels, run):
            computed[str(metric.measure)][int(metric.query_id)] = metric.value
    except Exception:
        # A provider fails with whatever its own code does.
        _name_the_failing(parsed, qrels, run)
        raise
    values = {name: computed[str(measure)] for name, measure in parsed.items()}
    missing = tuple(query_id for query_id in query_ids if len(run.get(query_id, ())) == 0)
    return Evaluation(query_ids, values, missing)


def restrict(run: Run, qrels: Qrels) -> dict[str, Ranking]:
    """Return the run without the queries that the judgements do not have."""
    return {query_id: ranking for query_id, ranking in run.items() if query_id in qrels}


def parse_measure(name: str) -> ir_measures.Measure:
    """Return the ir_measures object of a name such as ``nDCG@10``.

    Raises:
        DataError: no such measure, an impossible cut-off or parameter, a count that has no mean, or
            a measure whose provider is not installed.
    """
    try:
        measure = ir_measures.parse_measure(name)
        computable = ir_measures.DefaultPipeline.supports(measure)
    except NameError:
        raise DataError(f"unknown measure {name!r}{_suggestion(name)}") from None
    except (ValueError, AssertionError):
        raise DataError(f"measure {name!r} cannot be read; write it like nDCG@10 or RR(rel=2)@10") from None
    cutoff = measure.params.get("cutoff", 1)
    if not isinstance(cutoff, int) or cutoff < 1:
        raise DataError(f"measure {name!r}: cut-off {cutoff} must be a whole number of at least 1")
    if not isinstance(measure.aggregator(), MeanAgg):
        raise DataError(f"measure {name!r} is a count without a mean; give one such as nDCG@10, RR@10 or R@100")
    if not computable:
        raise DataError(f"measure {name!r}: nothing installed computes it; see ir_measures for its provider")
    return measure


def deepest(measures: Iterable[str]) -> int:
    """Return the largest cut-off of some measures, 0 where none has one."""
    return max((parse_measure(name).params.get("cutoff", 0) for name in measures), default=0)


def require_measurable(measures: Iterable[str], depth: int) -> None:
    """Refuse measures that no perfect ranking has, and those of a smaller cut-off under a wrong name.

    Raises:
        DataError: see :func:`evaluate`; or a measure looks deeper than the ``depth`` documents retrieved.
    """
    for name in measures:
        cutoff = deepest([name])
        # One perfect ranking shows a provider that fails, before hours of reranking do.
        evaluate({"q": _ONE}, {"q": dict.fromkeys(_ONE.doc_ids, 1)}, [name])
        if cutoff > depth:
            raise DataError(
                f"measure {name!r} needs {cutoff} documents a query, {depth} are retrieved; "
                f"raise the depth to {cutoff} or name other measures"
            )


def _suggestion(name: str) -> str:
    stem, at, cutoff = name.partition("@")
    spellings: dict[str, str] = {}
    for known in registry:
        spellings.setdefault(known.casefold(), known)
    nearest = difflib.get_close_matches(stem.casefold(), spellings, n=1)
    if nearest:
        return f", did you mean {spellings[nearest[0]] + at + cutoff!r}?"
    return "; give one of ir_measures, such as nDCG@10, RR@10, R@100, AP or Judged@10"


def _iter_calc(measures: Sequence[ir_measures.Measure], qrels: Qrels, run: Run) -> Iterator[ir_measures.Metric]:
    """Yield what the library computes; a query's id is its place among the judgements'."""
    # Places, because gdeval takes numbers only, and reads "a-1" and "b-1" as one query.
    place_of = {query_id: str(place) for place, query_id in enumerate(qrels)}
    # An empty ranking is left out: Judged@k would divide by its length, every measure counts it as zero anyway.
    by_rank = {
        place_of[query_id]: {doc_id: -float(position) for position, doc_id in enumerate(ranking.doc_ids)}
        for query_id, ranking in run.items()
        if len(ranking)
    }
    judged = {place_of[query_id]: dict(grades) for query_id, grades in qrels.items()}
    yield from ir_measures.iter_calc(measures, judged, by_rank)


def _name_the_failing(parsed: Mapping[str, ir_measures.Measure], qrels: Qrels, run: Run) -> None:
    """Raise a :class:`DataError` that names the first of some measures that cannot be computed alone."""
    for name, measure in parsed.items():
        try:
            list(_iter_calc([measure], qrels, run))
        except Exception as error:  # noqa: BLE001  as above
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"measure {name!r}: what computes it fails ({reason}); name another measure") from None
