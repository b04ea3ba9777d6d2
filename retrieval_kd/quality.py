"""Retrieval quality for gates and checkpoints; the evaluation room has the full set of measures."""

from __future__ import annotations

from retrieval_kd.collections.base import Qrels
from retrieval_kd.runs import Run


def ndcg_at_10(run: Run, qrels: Qrels) -> float:
    """Return nDCG@10 averaged over every judged query; a query the run misses counts as zero."""
    import ir_measures

    judged = {query_id: dict(grades) for query_id, grades in qrels.items()}
    ranked = {
        query_id: dict(zip(ranking.doc_ids, ranking.scores.tolist(), strict=True)) for query_id, ranking in run.items()
    }
    measure = ir_measures.nDCG @ 10
    return float(ir_measures.calc_aggregate([measure], judged, ranked)[measure])
