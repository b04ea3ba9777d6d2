"""What the report says about one system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eval.measures import Evaluation
from eval.significance import Interval, bootstrap_interval
from retrieval_kd.runs import Run


@dataclass(frozen=True)
class Facts:
    """What a system costs; None where it does not apply or was not measured.

    Attributes:
        params: Weights that a query passes through.
        encode_ms_p50: Median milliseconds to turn one query into a vector, alone.
        query_ms_p50: Median milliseconds from query text to ranking, one query at a time.
        query_ms_p95: 95th percentile of the same.
        bytes_per_doc: Size of the index, without stored fields, over the number of documents.
    """

    params: int | None = None
    encode_ms_p50: float | None = None
    query_ms_p50: float | None = None
    query_ms_p95: float | None = None
    bytes_per_doc: float | None = None


@dataclass(frozen=True)
class SystemResult:
    """One system's measured quality and cost.

    Attributes:
        name: What tables print; unique in a report.
        role: What the system is: ``bm25``, ``bi-encoder``, ``student``, ``reranker``, ``server``, ``run``.
        evaluation: Per-query values over every judged query.
        intervals: Measure to the 95 % bootstrap interval of its mean.
        facts: The cost.
        run: The rankings; None when only the values are kept.
        judged: Share of the ten best documents that somebody has judged; None when unknown.
        cost: What a bench measured, see :class:`eval.bench.Cost`; None when nobody benched.
    """

    name: str
    role: str
    evaluation: Evaluation
    intervals: Mapping[str, Interval]
    facts: Facts = Facts()
    run: Run | None = None
    judged: float | None = None
    cost: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        role: str,
        evaluation: Evaluation,
        facts: Facts = Facts(),
        run: Run | None = None,
        seed: int = 0,
        judged: float | None = None,
    ) -> SystemResult:
        """Make a result and its bootstrap intervals."""
        intervals = {measure: bootstrap_interval(values, seed) for measure, values in evaluation.values.items()}
        return cls(name, role, evaluation, intervals, facts, run, judged)

    @property
    def measures(self) -> dict[str, float]:
        """Return the mean of each measure over every judged query."""
        return self.evaluation.means

    @property
    def queries(self) -> int:
        """Return the number of queries averaged over."""
        return len(self.evaluation.query_ids)

    def to_json(self) -> dict[str, Any]:
        """Return the system's entry of ``report.json``; null where a cost does not apply."""
        return {
            "name": self.name,
            "role": self.role,
            **self.measures,
            "intervals": {measure: list(interval) for measure, interval in self.intervals.items()},
            "queries": self.queries,
            "queries_without_results": len(self.evaluation.missing),
            "judged_at_10": self.judged,
            "params": self.facts.params,
            "encode_ms_p50": self.facts.encode_ms_p50,
            "query_ms_p50": self.facts.query_ms_p50,
            "query_ms_p95": self.facts.query_ms_p95,
            "bytes_per_doc": self.facts.bytes_per_doc,
            "cost": self.cost,
        }
