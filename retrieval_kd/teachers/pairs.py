"""From (query, document) texts to one logit each: what scoring and fine-tuning a cross-encoder share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor, nn

from retrieval_kd.batching import length_sorted_batches, pad
from retrieval_kd.teachers.templates import Template

TEMPLATE = "query, document as the tokenizer's pair; longest text cut first"


class PairTokenizer:
    """Pairs to token rows, and rows to what a model's ``forward`` takes."""

    def __init__(self, tokenizer: Tokenizer, model: nn.Module, max_length: int, template: str = "") -> None:
        """Cut the longer text first; leave padding to the batch.

        Only our ``max_length`` counts: a ``tokenizer_config.json`` often keeps the length of some training run.

        Args:
            tokenizer: The model's own.
            model: What the rows are made for.
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
        config = model.config
        # Tokenizers number the second text 1 even where the model knows one type of token only.
        self._typed = (
            "token_type_ids" in inspect.signature(model.forward).parameters
            and getattr(config, "type_vocab_size", 0) > 1
        )
        self._pad_id = int(getattr(config, "pad_token_id", None) or 0)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Encoding]:
        """Return the tokens of each pair, special tokens included."""
        return self._tokenizer.encode_batch_fast(list(pairs)) if self._template is None else self._template(pairs)

    def batch(self, rows: Sequence[Encoding], device: torch.device) -> dict[str, Tensor]:
        """Return the padded keyword arguments of ``forward``, int64 ``[len(rows), longest]`` each."""
        ids, mask = pad([row.ids for row in rows], self._pad_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._typed:
            inputs["token_type_ids"], _ = pad([row.type_ids for row in rows])
        return {name: torch.from_numpy(values).to(device) for name, values in inputs.items()}


def logits(
    model: Callable[..., Any],
    tokenizer: PairTokenizer,
    rows: Sequence[Encoding],
    max_tokens: int,
    device: torch.device,
    on_rows: Callable[[int], None] | None = None,
) -> Tensor:
    """Run a sequence classifier with one label or two in length-sorted batches.

    Args:
        model: The classifier, or what is called like it and answers like it.
        tokenizer: Made for this model.
        rows: Token rows of at least one pair.
        max_tokens: Padded tokens in one forward pass.
        device: Where the model lies.
        on_rows: Called with the number of rows each batch finished.

    Returns:
        ``[len(rows)]`` in the order of ``rows``, with gradients where they are enabled: the raw logit of the one label,
        or of two labels the second's minus the first's, the log-odds.
    """
    parts, order = [], []
    for positions in length_sorted_batches([len(row.ids) for row in rows], max_tokens):
        inputs = tokenizer.batch([rows[i] for i in positions], device)
        outputs = model(**inputs).logits
        parts.append(outputs[:, -1] - outputs[:, 0] if outputs.shape[1] > 1 else outputs[:, 0])
        order.append(positions)
        if on_rows is not None:
            on_rows(len(positions))
    return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(order))).to(device)]
