"""mteb gives our encoders the figures that we give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import WORDS

from eval.dense import DenseSystem, encoded
from eval.measures import evaluate
from eval.mteb_encoder import MtebEncoder
from retrieval_kd.collections.base import split_queries
from retrieval_kd.collections.open import open_collection
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import EncoderMismatch
from retrieval_kd.recipes.schema import CollectionSpec


def test_sides_and_similarities(tiny: Path, tmp_path: Path) -> None:
    """A document encoded with the query's prefix costs ten points and no error."""
    from dataclasses import replace

    from tiny import tiny_encoder, tiny_encoder_folder

    encoder = TorchEncoder.open(tiny / "tiny-encoder")
    prefixed = tiny_encoder()
    prefixed._card = replace(prefixed.card, query_prefix="w1 ", document_prefix="w2 ")
    prefixed = TorchEncoder(prefixed.body, None, prefixed.tokenizer_files, prefixed._card)
    wrapped, batches = MtebEncoder(prefixed), [{"text": WORDS[:3]}, {"text": WORDS[3:5]}]
    query, document = wrapped.encode(batches, prompt_type="query"), wrapped.encode(batches, prompt_type="document")
    np.testing.assert_allclose(query, encoder.encode([f"w1 {word}" for word in WORDS[:5]], "query"), atol=1e-6)
    np.testing.assert_allclose(document, encoder.encode([f"w2 {word}" for word in WORDS[:5]], "query"), atol=1e-6)
    np.testing.assert_allclose(wrapped.similarity(query, document), query @ document.T, atol=1e-6)
    np.testing.assert_allclose(wrapped.similarity_pairwise(query, document), (query * document).sum(1), atol=1e-6)
    with pytest.raises(EncoderMismatch):
        MtebEncoder(encoder, TorchEncoder.open(tiny_encoder_folder(tmp_path / "other", seed=4)))


def test_mteb_measures_what_we_measure(tiny: Path, tmp_path: Path) -> None:
    """Two toolkits that disagree about one model make both figures worthless."""
    mteb = pytest.importorskip("mteb", reason="mteb is not installed here")
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    collection = open_collection(CollectionSpec(str(tiny / "tiny-collection")))
    queries, qrels = split_queries(collection, "test"), collection.qrels("test")

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Tiny", description="d", reference="https://example.org", dataset={"path": "x/y", "revision": "1"},
            type="Retrieval", category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"],
            main_score="ndcg_at_10", date=("2020-01-01", "2020-01-02"), domains=["Academic"], task_subtypes=[],
            license="cc0-1.0", annotations_creators="derived", dialect=[], sample_creation="found", bibtex_citation="",
        )  # fmt: skip

        def load_data(self, *_: Any, **__: Any) -> None:
            self.queries = {"test": dict(queries)}
            self.corpus = {"test": {d.doc_id: {"title": d.title, "text": d.text} for d in collection.documents()}}
            self.relevant_docs = {"test": {query: dict(grades) for query, grades in qrels.items()}}
            self.convert_v1_dataset_format_to_v2(1)
            self.data_loaded = True

    encoder = TorchEncoder.open(tiny / "tiny-encoder")
    result = mteb.evaluate(MtebEncoder(encoder), tasks=[Tiny()], cache=None)
    theirs = result.task_results[0].get_score()
    run = DenseSystem("tiny", encoder, encoded(encoder, collection, tmp_path)).run(queries, 10)
    assert theirs == pytest.approx(evaluate(run, qrels, ["nDCG@10"]).means["nDCG@10"], abs=1e-5)
