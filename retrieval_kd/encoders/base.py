"""What every encoder offers, and the one tokenizer that all of them use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from retrieval_kd.encoders.card import EncoderCard, Side
from retrieval_kd.errors import ArtifactError

Vectors = npt.NDArray[np.float32]
TOKENIZER = "tokenizer.json"


class Encoder(Protocol):
    """Turns texts into vectors, one path for one text and for many."""

    @property
    def card(self) -> EncoderCard:
        """Return the encoder's identity."""

    def encode(self, texts: Sequence[str], side: Side) -> Vectors:
        """Return float32 ``[len(texts), card.dimension]``, rows in the order of ``texts``."""


class TextTokenizer:
    """A fast tokenizer with the card's prefix and length: training, export and serving share it."""

    def __init__(self, tokenizer: Tokenizer, card: EncoderCard) -> None:
        """Fix truncation to the card's maximum length and leave padding to the batch."""
        tokenizer.no_padding()
        tokenizer.enable_truncation(card.max_length)
        self._tokenizer = tokenizer
        self._card = card
        # A text without a token has no vector, and a static encoder adds no special tokens of its own.
        self._empty = [tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "") or 0]

    @classmethod
    def load(cls, folder: Path, card: EncoderCard) -> TextTokenizer:
        """Read ``tokenizer.json`` from a model's folder.

        Raises:
            ArtifactError: the folder has no readable tokenizer.
        """
        return cls(load_tokenizer(folder), card)

    def __call__(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        """Return the token ids of each text, special tokens included; a text without any is one unknown token."""
        prefix = self._card.prefix(side)
        return [row.ids or self._empty for row in self._tokenizer.encode_batch_fast([prefix + text for text in texts])]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read ``tokenizer.json`` from a model's folder.

    Raises:
        ArtifactError: the file is missing or not a tokenizer.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise ArtifactError(f"{folder}: no {TOKENIZER}; save the model with its fast tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - what tokenizers raises for an unreadable file
        raise ArtifactError(f"{path}: not a tokenizer ({error}); save the model again") from None
