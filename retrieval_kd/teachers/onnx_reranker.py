"""The reranker that serves: an exported cross-encoder under onnxruntime, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from retrieval_kd.artifacts import Artifact, fingerprint, read_json, write_json
from retrieval_kd.batching import length_sorted_batches
from retrieval_kd.encoders.base import load_tokenizer
from retrieval_kd.encoders.onnx import BATCH_TOKENS, MODEL, open_session
from retrieval_kd.errors import ArtifactError
from retrieval_kd.runs import Scores
from retrieval_kd.teachers.rows import PairRows, padded

STAGE = "export-reranker"
CARD = "reranker.json"
OUTPUT = "logits"


@dataclass(frozen=True)
class RerankerCard:
    """How texts become an exported cross-encoder's inputs; ``reranker.json`` beside its graph.

    Attributes:
        name: What reports print.
        max_length: Longest pair in tokens, special tokens included.
        template: A prompt with ``{query}`` and ``{document}``; the tokenizer's own pair when empty.
        inputs: The names of the graph's inputs.
        pad_id: Token that fills a batch.
        source: sha256 over the weights, configuration, tokenizer, template and length it was exported from.
    """

    name: str
    max_length: int
    template: str
    inputs: tuple[str, ...]
    pad_id: int
    source: str

    def save(self, folder: Path) -> None:
        """Write the card."""
        write_json(folder / CARD, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> RerankerCard:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: no such file, or not such a card; names it.
        """
        try:
            raw = read_json(folder / CARD)
            return cls(**{**raw, "inputs": tuple(raw["inputs"])})
        except (TypeError, KeyError) as error:
            raise ArtifactError(
                f"{folder / CARD}: not a reranker's card ({error}); export the reranker again"
            ) from None


class OnnxReranker:
    """Scores texts for a query; calls from several threads at once are allowed."""

    def __init__(self, session: onnxruntime.InferenceSession, rows: PairRows, card: RerankerCard) -> None:
        """Join a session, what tokenises for it, and its card; :meth:`load` reads all three from a folder."""
        self.card = card
        self._session = session
        self._rows = rows

    @classmethod
    def load(cls, folder: Path, threads: int | None = None) -> OnnxReranker:
        """Open an exported reranker after comparing every file with the manifest.

        Args:
            folder: A finished artifact of stage ``export-reranker``.
            threads: Threads of one call; one for each core when None.

        Raises:
            ArtifactError: not such a folder, a file whose bytes differ from the manifest, or a graph that onnxruntime
                cannot run; names the file.
        """
        Artifact.load(folder, STAGE).verify()
        card = RerankerCard.load(folder)
        rows = PairRows(load_tokenizer(folder), card.max_length, card.template)
        return cls(open_session(folder / MODEL, threads), rows, card)

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over everything that changes a score."""
        return fingerprint(asdict(self.card))

    def score(self, query: str, texts: Sequence[str]) -> Scores:
        """Return one raw logit for each text, float32 ``[len(texts)]``; of two labels their difference."""
        return self.score_pairs([(query, text) for text in texts])

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> Scores:
        """Return one raw logit for each (query, document) pair, float32 ``[len(pairs)]``."""
        scores = np.empty(len(pairs), dtype=np.float32)
        rows = self._rows(pairs)
        for batch in length_sorted_batches([len(row.ids) for row in rows], BATCH_TOKENS):
            feed = padded([rows[i] for i in batch], self.card.inputs, self.card.pad_id)
            (logits,) = self._session.run([OUTPUT], feed)
            scores[batch] = logits[:, -1] - logits[:, 0] if logits.shape[1] > 1 else logits[:, 0]
        return scores
