"""A real cross-encoder and a real encoder, alone and together, on a few real queries."""

from pathlib import Path

import numpy as np
import pytest

from retrieval_kd.collections import open_collection
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.mining.bm25 import BM25Index
from retrieval_kd.recipes.schema import CollectionSpec, EncoderSpec
from retrieval_kd.scores.agreement import agreement
from retrieval_kd.scores.inspect import inspect
from retrieval_kd.scores.normalise import ensemble
from retrieval_kd.teachers.cross_encoder import CrossEncoder
from retrieval_kd.teachers.late_interaction import LateInteraction

QUERIES, DOCUMENTS = 24, 4


@pytest.mark.slow
def test_real_rankers_find_the_answer_among_bm25s_best(shared: Path) -> None:
    """Without it every part could agree with itself and the scores still be of another model, or upside down.

    Among a query's judged answer and BM25's four best others, chance puts the answer first in a fifth of the lists.
    """
    collection = open_collection(CollectionSpec(str(shared / "data/beir/msmarco-12k")))
    qrels = collection.qrels("dev")
    chosen = dict(list(qrels.items())[:QUERIES])
    queries = {query_id: collection.queries()[query_id] for query_id in chosen}
    lists = []
    for query_id, ranking in BM25Index.build(collection).search(queries, 20).items():
        positive = next(doc_id for doc_id, grade in chosen[query_id].items() if grade > 0)
        lists.append(
            (query_id, (positive, *[doc for doc in ranking.doc_ids if doc not in chosen[query_id]][:DOCUMENTS]))
        )
    texts = collection.contents({doc_id for _, doc_ids in lists for doc_id in doc_ids})
    pairs = [(queries[query_id], texts[doc_id]) for query_id, doc_ids in lists for doc_id in doc_ids]
    ends = np.cumsum([len(doc_ids) for _, doc_ids in lists])[:-1]

    cross = np.split(CrossEncoder.load(str(shared / "models/ce-minilm-l6"), 160).score(pairs), ends)
    late = np.split(LateInteraction.load("all-MiniLM-L6-v2", 160).score(pairs), ends)
    encoder = TorchEncoder.load(EncoderSpec(max_length=160))
    left, right = (encoder.encode([pair[i] for pair in pairs], side) for i, side in enumerate(("query", "document")))
    dense = np.split((left * right).sum(axis=1), ends)
    both = ensemble({"cross": cross, "dense": dense}, [1, 1], "zscore")

    first = {
        name: np.mean([scores.argmax() == 0 for scores in values])
        for name, values in (("cross", cross), ("late", late), ("dense", dense), ("both", both))
    }
    assert min(first.values()) > 0.5
    assert first["both"] >= min(first["cross"], first["dense"])
    report = inspect(cross)
    assert -12 < report.p1 < report.p99 < 12
    assert report.mean_spread > 1
    alike = agreement("cross-encoder", cross, "encoder", dense)
    assert alike.kendall_tau is not None
    assert 0.2 < alike.kendall_tau < 0.95
