"""Vectors with gradients: the query tower, and the two kinds of document tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from retrieval_kd.batching import length_sorted_batches, pad
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.torch_encoder import TorchEncoder


def encode_rows(model: nn.Module, rows: Sequence[Sequence[int]], max_tokens: int, device: torch.device) -> Tensor:
    """Encode token rows in length-sorted micro-batches.

    Args:
        model: Takes ``(input_ids, attention_mask)``, int64 ``[n, length]``; gives ``[n, d]``.
        rows: Token ids of each text.
        max_tokens: Padded tokens in one forward pass.
        device: Where the model lies.

    Returns:
        ``[len(rows), d]`` in the order of ``rows``, with gradients where they are enabled.
    """
    parts, order = [], []
    for batch in length_sorted_batches([len(row) for row in rows], max_tokens):
        ids, mask = pad([rows[i] for i in batch])
        parts.append(model(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)))
        order.append(batch)
    return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(order))).to(device)]


class DocumentTower(Protocol):
    """Gives the vectors of a batch's documents, and what they should be."""

    def vectors(self, doc_ids: Sequence[str]) -> Tensor:
        """Return ``[len(doc_ids), d]``."""

    def targets(self, doc_ids: Sequence[str]) -> Tensor | None:
        """Return the vectors that embedding losses regress the documents onto; None where they are frozen."""


class FrozenDocuments:
    """Asymmetric mode: the large encoder's vectors, looked up and never trained."""

    def __init__(self, corpus: EncodedCorpus, device: torch.device) -> None:
        """Read vectors from the encoded corpus as they are asked for."""
        self._corpus = corpus
        self._device = device

    def vectors(self, doc_ids: Sequence[str]) -> Tensor:
        """Return float32 ``[len(doc_ids), d]`` without gradients."""
        rows = [self._corpus.row_of[doc_id] for doc_id in doc_ids]
        return torch.from_numpy(np.asarray(self._corpus.vectors[rows], dtype=np.float32)).to(self._device)

    def targets(self, doc_ids: Sequence[str]) -> Tensor | None:
        """Return None: frozen vectors are where they should be."""
        return None


class LiveDocuments:
    """Symmetric mode: the student encodes the documents itself, with gradients."""

    def __init__(
        self,
        student: TorchEncoder,
        collection: Collection,
        corpus: EncodedCorpus,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        """Look texts up by id, encode them in micro-batches of ``max_tokens``, and aim at ``corpus``."""
        self._student = student
        self._collection = collection
        self._frozen = FrozenDocuments(corpus, device)
        self._max_tokens = max_tokens
        self._device = device

    def vectors(self, doc_ids: Sequence[str]) -> Tensor:
        """Return ``[len(doc_ids), d]`` with gradients where they are enabled."""
        contents = self._collection.contents(doc_ids)
        rows = self._student.tokenizer([contents[doc_id] for doc_id in doc_ids], "document")
        return encode_rows(self._student, rows, self._max_tokens, self._device)

    def targets(self, doc_ids: Sequence[str]) -> Tensor | None:
        """Return the large encoder's vectors of the same documents."""
        return self._frozen.vectors(doc_ids)
