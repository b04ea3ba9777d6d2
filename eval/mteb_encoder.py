"""Our encoders as ``mteb`` takes them, so that its tasks and leaderboard code run on them unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.encoders.base import Encoder, Vectors
from retrieval_kd.encoders.card import Side, require_same_space
from retrieval_kd.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


class MtebEncoder:
    """A symmetric encoder, or an asymmetric pair, behind mteb's ``EncoderProtocol`` (mteb 2).

    Prefixes, length and pooling are the cards'; mteb's own prompts are not used. ``mteb.evaluate(MtebEncoder(encoder),
    tasks)`` is all it takes.
    """

    def __init__(self, query: Encoder, document: Encoder | None = None) -> None:
        """Wrap an encoder, or a query encoder and the document encoder whose space it shares.

        Raises:
            EncoderMismatch: the two do not share a space.
        """
        if document is not None:
            require_same_space(query.card, document.card)
        self._query = query
        self._document = document or query

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **options: Any,
    ) -> Vectors:
        """Return float32 ``[texts, d]``; what is neither query nor document is encoded as a query.

        Args:
            inputs: Batches with a list under ``text``; for documents mteb has put the title before the body.
            task_metadata: Not needed here.
            hf_split: Not needed here.
            hf_subset: Not needed here.
            prompt_type: mteb's ``PromptType``, None for tasks without sides.
            options: Batch size and the like: how texts are batched changes no vector here.
        """
        side: Side = "document" if getattr(prompt_type, "value", prompt_type) == "document" else "query"
        encoder = self._document if side == "document" else self._query
        texts = [text for batch in inputs for text in batch["text"]]
        return encoder.encode(texts, side)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the similarity of every vector with every other, ``[n, m]``."""
        left, right = self._rows(embeddings1), self._rows(embeddings2)
        return left @ right.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the similarity of vectors at the same place, ``[n]``."""
        return (self._rows(embeddings1) * self._rows(embeddings2)).sum(dim=1)

    @property
    def mteb_model_meta(self) -> Any:
        """Return mteb's description of the model.

        Raises:
            DataError: mteb is not installed.
        """
        try:
            from mteb.models.model_meta import ModelMeta, ScoringFunction
        except ImportError:
            raise DataError(
                "mteb is not installed; pip install mteb, in an environment of its own if need be"
            ) from None
        card = self._query.card
        cosine = card.similarity == "cosine"
        return ModelMeta.create_empty(
            {
                "name": f"retrieval-kd/{card.name}",
                "revision": card.fingerprint[:12],
                "n_parameters": card.parameters,
                "max_tokens": card.max_length,
                "embed_dim": card.dimension,
                "similarity_fn_name": ScoringFunction.COSINE if cosine else ScoringFunction.DOT_PRODUCT,
                "use_instructions": bool(card.query_prefix or card.document_prefix),
            }
        )

    def _rows(self, vectors: Any) -> Tensor:
        import torch

        rows = torch.as_tensor(np.asarray(vectors)).float()
        rows = rows.unsqueeze(0) if rows.ndim == 1 else rows
        return torch.nn.functional.normalize(rows, dim=1) if self._query.card.similarity == "cosine" else rows
