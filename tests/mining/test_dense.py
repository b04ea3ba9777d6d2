"""The dense first stage: which side is encoded, and whose space it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, Side
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import EncoderMismatch
from retrieval_kd.mining.dense import dense_run

CARD = EncoderCard(
    name="letters", architecture="none", layers=1, parameters=1, pooling="mean", normalize=False, dimensions=(2,),
    max_length=8, query_prefix="", document_prefix="", similarity="dot", tokenizer_hash="t", weights_hash="w",
)  # fmt: skip


class Letters:
    """Counts a and b; refuses to encode documents."""

    card = CARD

    def encode(self, texts: Sequence[str], side: Side) -> Vectors:
        """Count letters."""
        assert side == "query"
        return np.array([[text.count("a"), text.count("b")] for text in texts], dtype=np.float32)


def test_each_query_gets_its_own_ranking() -> None:
    """Queries zipped with the wrong rows would still look like a run."""
    corpus = EncodedCorpus(["x", "y"], np.array([[1, 0], [0, 1]], dtype=np.float32), CARD, "f", "t")
    run = dense_run(Letters(), {"q2": "bb", "q1": "aaab"}, corpus, 1)
    assert {query_id: (r.doc_ids, float(r.scores[0])) for query_id, r in run.items()} == {
        "q2": (("y",), 2.0),
        "q1": (("x",), 3.0),
    }


def test_an_encoder_of_another_space_is_refused() -> None:
    """Dot products across spaces are noise that ranks."""
    corpus = EncodedCorpus(["x"], np.zeros((1, 2), dtype=np.float32), replace(CARD, weights_hash="other"), "f", "t")
    with pytest.raises(EncoderMismatch, match="cannot search documents encoded by"):
        dense_run(Letters(), {"q": "a"}, corpus, 1)
