"""The parity gate: does an exported encoder give the vectors, and the rankings, of its origin?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from retrieval_kd.artifacts import fingerprint
from retrieval_kd.collections.base import Qrels
from retrieval_kd.encoders.base import Encoder, Vectors
from retrieval_kd.encoders.card import EncoderCard, Side
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import DataError, ParityError
from retrieval_kd.exact import exact_search
from retrieval_kd.quality import ndcg_at_10
from retrieval_kd.recipes.schema import ExportSpec
from retrieval_kd.runs import Run

DEPTH = 10


@dataclass(frozen=True)
class Probes:
    """Real texts that both encoders get.

    Attributes:
        queries: Query id to text.
        documents: Document id to text; encoded by encoders that have a document side.
        qrels: Judgements of the queries.
        corpus: The vectors that a query encoder is to search; None for encoders of both sides, whose
            rankings are over ``documents``.
    """

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    qrels: Qrels
    corpus: EncodedCorpus | None = None

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of everything that a measurement depends on."""
        return fingerprint(
            {
                "queries": dict(self.queries),
                "documents": dict(self.documents),
                "qrels": {query_id: dict(grades) for query_id, grades in self.qrels.items()},
                "corpus": "" if self.corpus is None else self.corpus.fingerprint,
            }
        )


@dataclass(frozen=True)
class Parity:
    """What the gate measured.

    Attributes:
        max_abs_error: Largest difference of any vector entry.
        worst: The text with that difference, such as ``"query 'q7'"``.
        overlap: Mean share of equal documents in the top ten; 1 where nothing can be ranked.
        ndcg_reference: nDCG@10 of the original over the probes' own pool.
        ndcg_exported: nDCG@10 of the export over the same.
        texts: Texts compared.
        queries: Queries ranked.
    """

    max_abs_error: float
    worst: str
    overlap: float
    ndcg_reference: float
    ndcg_exported: float
    texts: int
    queries: int

    def failure(self, gate: ExportSpec) -> str | None:
        """Return what is outside the gate, or None; NaN always is."""
        if not self.max_abs_error <= gate.max_abs_error:
            return (
                f"the exported vector of {self.worst} differs from torch by {self.max_abs_error:.3g}, the gate allows "
                f"{gate.max_abs_error:.3g}"
            )
        if not self.overlap >= gate.min_overlap:
            return (
                f"the exported encoder finds {self.overlap:.4f} of torch's top {DEPTH} over {self.queries} queries, "
                f"the gate asks for {gate.min_overlap}"
            )
        if not abs(self.ndcg_exported - self.ndcg_reference) <= gate.max_ndcg_change:
            return (
                f"the exported encoder's nDCG@{DEPTH} is {self.ndcg_exported:.4f} over {self.queries} queries, torch's "
                f"{self.ndcg_reference:.4f}; the gate allows a change of {gate.max_ndcg_change}"
            )
        return None

    def require(self, gate: ExportSpec) -> None:
        """Refuse an export outside the gate.

        Raises:
            ParityError: names the worst text and its error, or the overlap.
        """
        failure = self.failure(gate)
        if failure is not None:
            raise ParityError(f"{failure}; nothing was exported, train or load the encoder again or widen the gate")


def measure_parity(reference: Encoder, exported: Encoder, probes: Probes) -> Parity:
    """Compare vectors and rankings of two encoders on the same texts.

    Raises:
        DataError: the probes have no text that the encoder encodes.
    """
    card = reference.card
    sides = probe_texts(probes, card)
    before = {side: reference.encode(list(texts.values()), side) for side, texts in sides.items()}
    after = {side: exported.encode(list(texts.values()), side) for side, texts in sides.items()}
    errors = [
        (float(error), f"{side} {text_id!r}")
        for side, texts in sides.items()
        for text_id, error in zip(texts, np.abs(before[side] - after[side]).max(axis=1), strict=True)
    ]
    max_abs_error, worst = max(errors, key=lambda pair: (np.isnan(pair[0]), pair[0]))
    # NaN cannot be ranked, and the error alone refuses it.
    finite = np.isfinite(max_abs_error)
    old = ranked(before, probes, card) if finite else {}
    new = ranked(after, probes, card) if finite else {}
    return Parity(
        max_abs_error=max_abs_error,
        worst=worst,
        overlap=_overlap(old, new),
        ndcg_reference=ndcg_at_10(old, probes.qrels) if old and probes.qrels else 0.0,
        ndcg_exported=ndcg_at_10(new, probes.qrels) if new and probes.qrels else 0.0,
        texts=len(errors),
        queries=len(old),
    )


def probe_texts(probes: Probes, card: EncoderCard) -> dict[Side, Mapping[str, str]]:
    """Return the probes of each side that an encoder encodes.

    Raises:
        DataError: there are none.
    """
    sides: dict[Side, Mapping[str, str]] = {}
    if probes.queries and card.role != "document":
        sides["query"] = probes.queries
    if probes.documents and card.role != "query":
        sides["document"] = probes.documents
    if not sides:
        raise DataError(f"export of {card.name!r}: no text to compare with torch; give probes of the {card.role} side")
    return sides


def ranked(vectors: Mapping[Side, Vectors], probes: Probes, card: EncoderCard) -> Run:
    """Rank the probes' corpus, or their own documents, for each query; nothing where either is missing."""
    corpus = probes.corpus
    if corpus is None and "document" in vectors:
        corpus = _in_memory(list(probes.documents), vectors["document"], card)
    if corpus is None or "query" not in vectors:
        return {}
    return exact_search(list(probes.queries), vectors["query"], corpus, DEPTH)


def _in_memory(ids: list[str], vectors: Vectors, card: EncoderCard) -> EncodedCorpus:
    order = sorted(range(len(ids)), key=ids.__getitem__)
    digest = hashlib.sha256(vectors.tobytes()).hexdigest()
    return EncodedCorpus([ids[i] for i in order], vectors[order], card, digest, digest)


def _overlap(old: Run, new: Run) -> float:
    shares = [len({*old[query_id].doc_ids} & {*new[query_id].doc_ids}) / len(old[query_id]) for query_id in old]
    return float(np.mean(shares)) if shares else 1.0
