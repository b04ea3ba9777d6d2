"""From (query, document) texts to a classifier's inputs, without torch: what training and serving share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from retrieval_kd.batching import pad
from retrieval_kd.teachers.templates import Template

INPUTS = ("input_ids", "attention_mask")
TYPES = "token_type_ids"


class PairRows:
    """Pairs to token rows: as the tokenizer's own pair, or put into a prompt."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, template: str = "") -> None:
        """Cut the longer text first; leave padding to the batch.

        Only our ``max_length`` counts: a ``tokenizer_config.json`` often keeps the length of some training run.

        Args:
            tokenizer: The model's own.
            max_length: Longest row in tokens, special tokens included.
            template: A prompt with ``{query}`` and ``{document}``; the tokenizer's own pair when empty.

        Raises:
            RecipeError: the template alone is longer than ``max_length``.
        """
        tokenizer.no_padding()
        self._template = Template(template, ("query", "document"), tokenizer, max_length) if template else None
        if not template:
            tokenizer.enable_truncation(max_length, strategy="longest_first")
        self._tokenizer = tokenizer

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Encoding]:
        """Return the tokens of each pair, special tokens included."""
        return self._tokenizer.encode_batch_fast(list(pairs)) if self._template is None else self._template(pairs)


def padded(rows: Sequence[Encoding], inputs: Sequence[str], pad_id: int) -> dict[str, npt.NDArray[np.int64]]:
    """Return a classifier's inputs by name, int64 ``[len(rows), longest]`` each.

    Args:
        rows: Token rows.
        inputs: :data:`INPUTS`, and :data:`TYPES` for a model that tells the two texts apart.
        pad_id: Token that fills a row.
    """
    values = dict(zip(INPUTS, pad([row.ids for row in rows], pad_id), strict=True))
    if TYPES in inputs:
        values[TYPES], _ = pad([row.type_ids for row in rows])
    return values
