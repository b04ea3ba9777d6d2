"""The leading numbers of a vector as a vector of their own (Matryoshka representations, arXiv 2205.13147)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_kd.encoders.base import Encoder, Vectors
from retrieval_kd.encoders.card import EncoderCard, Side


class TruncatedEncoder:
    """An encoder whose vectors are cut to their leading numbers; its card and space say so."""

    def __init__(self, encoder: Encoder, dimension: int) -> None:
        """View ``encoder`` at a smaller width.

        Raises:
            EncoderMismatch: the encoder's vectors do not have so many numbers.
        """
        self._encoder = encoder
        self._card = encoder.card.truncated(dimension)

    @property
    def card(self) -> EncoderCard:
        """Return the identity at the smaller width."""
        return self._card

    def encode(self, texts: Sequence[str], side: Side) -> Vectors:
        """Return float32 ``[len(texts), card.dimension]``, of unit length again where the card promises it."""
        return truncated(self._encoder.encode(texts, side), self._card.dimension, self._card.normalize)


def truncated(vectors: Vectors, dimension: int, renormalise: bool) -> Vectors:
    """Return the first ``dimension`` numbers of each row, made unit length again if asked.

    A row's bits do not depend on the other rows; a row of zeros stays one.

    Args:
        vectors: float32 ``[n, d]``.
        dimension: At most ``d``; vectors of that width are returned as they are.
        renormalise: Whether the encoder promises unit length.
    """
    if dimension == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimension]
    if not renormalise:
        return np.ascontiguousarray(cut)
    norms = np.sqrt((cut.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    return np.asarray(cut / np.where(norms > 0, norms, 1.0), dtype=np.float32)
