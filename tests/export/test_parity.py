"""The gate: by how much, for which text, and never NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_encoder

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, Side
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import DataError, ParityError
from retrieval_kd.export.parity import Probes, measure_parity
from retrieval_kd.recipes.schema import ExportSpec


class Table:
    """An encoder that looks its vectors up."""

    def __init__(self, vectors: dict[str, list[float]], role: str = "symmetric") -> None:
        self.card: EncoderCard = replace(tiny_encoder().card, dimensions=(2,), role=role)
        self._vectors = vectors

    def encode(self, texts: Sequence[str], side: Side) -> Vectors:
        self.card.prefix(side)
        return np.array([self._vectors[text] for text in texts], dtype=np.float32).reshape(len(texts), 2)


TORCH = {"one": [1.0, 0.0], "two": [0.0, 1.0], "near": [0.8, 0.6], "far": [0.6, 0.8]}
PROBES = Probes({"q1": "one", "q2": "two"}, {"d1": "near", "d2": "far"}, {"q1": {"d1": 1}, "q2": {"d1": 1}})


def test_equal_encoders_pass_with_known_figures() -> None:
    """q1 finds its document first, q2 second: nDCG is (1 + 1/log2(3)) / 2."""
    parity = measure_parity(Table(TORCH), Table(TORCH), PROBES)
    assert (parity.max_abs_error, parity.overlap, parity.texts, parity.queries) == (0, 1, 4, 2)
    assert parity.ndcg_reference == parity.ndcg_exported == pytest.approx((1 + 1 / math.log2(3)) / 2)
    parity.require(ExportSpec())


def test_worst_text_is_named() -> None:
    """Whoever debugs an export needs the text, not a mean."""
    parity = measure_parity(Table(TORCH), Table({**TORCH, "two": [0.0, 0.75], "far": [0.6, 0.7]}), PROBES)
    assert parity.max_abs_error == 0.25
    with pytest.raises(ParityError, match=r"exported vector of query 'q2' differs from torch by 0.25"):
        parity.require(ExportSpec())


def test_nan_is_the_worst_text() -> None:
    """NaN compares false with every bound; a gate written the other way lets it through."""
    broken = Table({**TORCH, "one": [0.0, 0.5], "two": [math.nan, 0.0]})
    with pytest.raises(ParityError, match="query 'q2' differs from torch by nan"):
        measure_parity(Table(TORCH), broken, PROBES).require(ExportSpec(max_abs_error=0.99, min_overlap=0))
    broken = Table({**TORCH, "far": [math.nan, 0.0]})
    with pytest.raises(ParityError, match="document 'd2' differs from torch by nan"):
        measure_parity(Table(TORCH), broken, PROBES).require(ExportSpec(max_abs_error=0.99, min_overlap=0))


def test_a_change_of_quality_is_refused_whatever_the_overlap() -> None:
    """The same ten documents in a worse order are another ranker."""
    parity = replace(measure_parity(Table(TORCH), Table(TORCH), PROBES), ndcg_reference=0.9, ndcg_exported=0.89)
    with pytest.raises(ParityError, match=r"nDCG@10 is 0.8900 over 2 queries, torch's 0.9000"):
        parity.require(ExportSpec())
    parity.require(ExportSpec(max_ndcg_change=0.02))


def test_rankings_are_compared_beyond_vectors() -> None:
    """With a wide bound on vectors, the top ten must still be the same documents."""
    angles = np.linspace(0, 0.2, 20)
    torch_side = {"one": [1.0, 0.0], **{f"t{i}": [float(np.cos(a)), float(np.sin(a))] for i, a in enumerate(angles)}}
    exported = {**torch_side, "one": [float(np.cos(0.2)), float(np.sin(0.2))]}
    probes = Probes({"q": "one"}, {f"d{i:02}": f"t{i}" for i in range(20)}, {"q": {"d00": 1}})
    parity = measure_parity(Table(torch_side), Table(exported), probes)
    assert parity.overlap == 0
    assert (parity.ndcg_reference, parity.ndcg_exported) == (1, 0)
    with pytest.raises(ParityError, match=r"finds 0.0000 of torch's top 10 over 1 queries, the gate asks for 0.999"):
        parity.require(ExportSpec(max_abs_error=0.5))


def test_query_encoder_is_ranked_over_given_vectors_and_encodes_no_document() -> None:
    """A query tower has no document side, and its rankings are over its teacher's vectors."""
    corpus = EncodedCorpus(
        ["d1", "d2"], np.array([[0.8, 0.6], [0.6, 0.8]], dtype=np.float32), tiny_encoder().card, "c", "t"
    )
    probes = replace(PROBES, corpus=corpus)
    parity = measure_parity(Table(TORCH, "query"), Table(TORCH, "query"), probes)
    assert (parity.texts, parity.queries) == (2, 2)
    assert parity.ndcg_reference == pytest.approx((1 + 1 / math.log2(3)) / 2)


def test_document_encoder_needs_no_query() -> None:
    """It has nothing to rank with; its vectors are compared all the same."""
    parity = measure_parity(Table(TORCH, "document"), Table(TORCH, "document"), PROBES)
    assert (parity.texts, parity.queries, parity.overlap) == (2, 0, 1)


def test_gate_without_texts_is_an_error() -> None:
    """A gate that compares nothing passes everything."""
    with pytest.raises(DataError, match="no text to compare with torch; give probes of the query side"):
        measure_parity(Table(TORCH, "query"), Table(TORCH, "query"), replace(PROBES, queries={}))


def test_fingerprint_sees_every_probe() -> None:
    """An export measured on other texts is another artifact."""
    corpus = EncodedCorpus(["d1"], np.zeros((1, 2), dtype=np.float32), tiny_encoder().card, "c", "t")
    others = [
        replace(PROBES, queries={"q1": "one"}),
        replace(PROBES, documents={"d1": "near"}),
        replace(PROBES, qrels={"q1": {"d1": 2}}),
        replace(PROBES, corpus=corpus),
    ]
    assert len({probes.fingerprint for probes in [PROBES, *others]}) == 5
