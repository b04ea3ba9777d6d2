"""Prompts: texts put into a string that a model was trained on, cut so that the string itself stays whole."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Encoding, Tokenizer

from retrieval_kd.errors import RecipeError


class Template:
    """A prompt with named places; its words are never cut, the texts in it are, the longest first."""

    def __init__(self, text: str, names: Sequence[str], tokenizer: Tokenizer, max_length: int) -> None:
        """Prepare a prompt.

        Args:
            text: The prompt, with each of ``names`` in braces once; other braces are the prompt's own.
            names: The places, in the order in which texts are given.
            tokenizer: Adds its special tokens around the whole.
            max_length: Longest filled prompt in tokens, special tokens included.

        Raises:
            RecipeError: the prompt alone is longer than ``max_length``.
        """
        self._names = tuple(names)
        self._parts = re.split(f"{{({'|'.join(names)})}}", text)
        self._tokenizer = tokenizer
        self._max_length = max_length
        tokenizer.no_truncation()
        self._frame = len(tokenizer.encode(self._filled([""] * len(names))))
        if self._frame + len(names) > max_length:
            raise RecipeError(
                f"teacher: the template takes {self._frame} of max_length {max_length} tokens and leaves no room for "
                "the texts; raise max_length"
            )

    def __call__(self, rows: Sequence[Sequence[str]]) -> list[Encoding]:
        """Return the tokens of each filled prompt."""
        encoded = self._tokenizer.encode_batch_fast([self._filled(texts) for texts in rows])
        return [
            tokens if len(tokens) <= self._max_length else self._cut(texts)
            for texts, tokens in zip(rows, encoded, strict=True)
        ]

    def _filled(self, texts: Sequence[str]) -> str:
        values = dict(zip(self._names, texts, strict=True))
        # Words and places take turns.
        return "".join(values[part] if i % 2 else part for i, part in enumerate(self._parts))

    def _cut(self, texts: Sequence[str]) -> Encoding:
        tokens = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        budget = self._max_length - self._frame
        while budget >= len(texts):
            length = longest_first([len(row) for row in tokens], budget)
            kept = [
                text[: row.offsets[min(length, len(row)) - 1][1]] if len(row) else ""
                for text, row in zip(texts, tokens, strict=True)
            ]
            filled = self._tokenizer.encode(self._filled(kept))
            if len(filled) <= self._max_length:
                return filled
            # Cutting text can split a word into more tokens than it had.
            budget -= len(filled) - self._max_length
        raise RecipeError(f"teacher: max_length {self._max_length} leaves no room for the texts; raise it")


def longest_first(lengths: Sequence[int], budget: int) -> int:
    """Return the largest length that all rows can be cut to so that together they have at most ``budget`` tokens.

    Rows that are shorter keep what they have, so that swapping two texts swaps what is left of them.
    """
    left, rows = budget, len(lengths)
    for length in sorted(lengths):
        if length * rows > left:
            return left // rows
        left -= length
        rows -= 1
    return max(lengths, default=0)
