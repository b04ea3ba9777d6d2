"""Token rows to one logit each: what scoring and fine-tuning a ranker share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from retrieval_kd.batching import length_sorted_batches
from retrieval_kd.teachers.rows import INPUTS, TYPES, PairRows, TokenRow, TripleRows, padded


class RowTokenizer:
    """Texts to token rows, and rows to what a model's ``forward`` takes.

    Attributes:
        inputs: Names of the arguments of ``forward``.
        pad_id: Token that fills a batch.
    """

    ROWS: type[PairRows] | type[TripleRows]

    def __init__(self, tokenizer: Tokenizer, model: nn.Module, max_length: int, template: str = "") -> None:
        """Make rows for ``model``; see :mod:`retrieval_kd.teachers.rows` for the rest."""
        self._rows = self.ROWS(tokenizer, max_length, template)
        config = model.config
        # Tokenizers number the second text 1 even where the model knows one type of token only.
        typed = TYPES in inspect.signature(model.forward).parameters and getattr(config, "type_vocab_size", 0) > 1
        self.inputs = (*INPUTS, TYPES) if typed else INPUTS
        self.pad_id = int(getattr(config, "pad_token_id", None) or 0)

    def __call__(self, texts: Sequence[tuple[str, ...]]) -> Sequence[TokenRow]:
        """Return the tokens of each input's texts, special tokens included."""
        return self._rows(texts)

    def batch(self, rows: Sequence[TokenRow], device: torch.device) -> dict[str, Tensor]:
        """Return the padded keyword arguments of ``forward``, int64 ``[len(rows), longest]`` each."""
        values = padded(rows, self.inputs, self.pad_id)
        return {name: torch.from_numpy(value).to(device) for name, value in values.items()}


class PairTokenizer(RowTokenizer):
    """Rows of a query and a document."""

    ROWS = PairRows


class TripleTokenizer(RowTokenizer):
    """Rows of a query and two documents."""

    ROWS = TripleRows


def one_score(outputs: Tensor) -> Tensor:
    """Return ``[B]`` of ``[B, labels]`` logits: the one label's, or of two the log-odds, second minus first."""
    return outputs[:, -1] - outputs[:, 0] if outputs.shape[1] > 1 else outputs[:, 0]


def logits(
    model: Callable[..., Any],
    tokenizer: RowTokenizer,
    rows: Sequence[TokenRow],
    max_tokens: int,
    device: torch.device,
    on_rows: Callable[[int], None] | None = None,
) -> Tensor:
    """Run a sequence classifier with one label or two in length-sorted batches.

    Args:
        model: The classifier, or what is called like it and answers like it.
        tokenizer: Made for this model.
        rows: Token rows of at least one input.
        max_tokens: Padded tokens in one forward pass.
        device: Where the model lies.
        on_rows: Called with the number of rows each batch finished.

    Returns:
        :func:`one_score` of each row, ``[len(rows)]``, in their order, with gradients where they are enabled.
    """
    parts, order = [], []
    for positions in length_sorted_batches([len(row.ids) for row in rows], max_tokens):
        inputs = tokenizer.batch([rows[i] for i in positions], device)
        parts.append(one_score(model(**inputs).logits))
        order.append(positions)
        if on_rows is not None:
            on_rows(len(positions))
    return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(order))).to(device)]
