"""From the texts of a pair or a triple to a classifier's inputs, without torch: what training and serving share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from retrieval_kd.batching import pad
from retrieval_kd.errors import RecipeError
from retrieval_kd.teachers.templates import Template, longest_first

INPUTS = ("input_ids", "attention_mask")
TYPES = "token_type_ids"


class TokenRow(Protocol):
    """One input's tokens, special tokens included; ``tokenizers.Encoding`` is one."""

    @property
    def ids(self) -> list[int]:
        """Return the token numbers."""

    @property
    def type_ids(self) -> list[int]:
        """Return the number of the text that each token belongs to."""


class PairRows:
    """Pairs to token rows: as the tokenizer's own pair, the longer text cut first, or put into a prompt."""

    LAYOUT = "query, document as the tokenizer's pair; longest text cut first"

    def __init__(self, tokenizer: Tokenizer, max_length: int, template: str = "") -> None:
        """Fix the layout; padding is left to the batch.

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

    def __call__(self, texts: Sequence[tuple[str, ...]]) -> Sequence[TokenRow]:
        """Return the tokens of each (query, document), special tokens included."""
        if self._template is not None:
            return self._template(texts)
        rows: Sequence[TokenRow] = self._tokenizer.encode_batch_fast(list(texts))
        return rows


class TripleRows:
    """Triples to token rows: the tokenizer's pair of query and first document, then the second; or a prompt.

    The longest of the three texts is cut first and both documents are cut at the same length, so the order of the
    two does not decide which of them is read to its end.
    """

    LAYOUT = "query, first, second as the tokenizer's pair and the second after it; longest text cut first"

    def __init__(self, tokenizer: Tokenizer, max_length: int, template: str = "") -> None:
        """Fix the layout; padding is left to the batch.

        Args:
            tokenizer: The model's own.
            max_length: Longest row in tokens, special tokens included.
            template: A prompt with ``{query}``, ``{first}`` and ``{second}``; the layout above when empty.

        Raises:
            RecipeError: template or special tokens leave no room for texts, or there is no template and the tokenizer
                puts nothing between two texts.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._template = Template(template, ("query", "first", "second"), tokenizer, max_length) if template else None
        if template:
            return
        pair = tokenizer.encode("a", "a")
        self._before, self._between, self._after = _around(pair)
        self._end = _around(tokenizer.encode("a"))[-1]
        self._type_of_documents = pair.type_ids[pair.sequence_ids.index(1)]
        frame = len(self._before) + len(self._between) + len(self._after) + len(self._end)
        self._room = max_length - frame
        if not self._between or not self._after:
            raise RecipeError("teacher: the tokenizer puts nothing between two texts; give the model's template")
        if self._room < 3:
            raise RecipeError(
                f"teacher: max_length {max_length} leaves no room beside {frame} special tokens; raise it"
            )

    def __call__(self, texts: Sequence[tuple[str, ...]]) -> Sequence[TokenRow]:
        """Return the tokens of each (query, first, second), special tokens included."""
        if self._template is not None:
            return self._template(texts)
        distinct = list(dict.fromkeys(text for triple in texts for text in triple))
        encoded = self._tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
        tokens = {text: row.ids for text, row in zip(distinct, encoded, strict=True)}
        return [self._row([tokens[text] for text in triple]) for triple in texts]

    def _row(self, tokens: Sequence[list[int]]) -> _Row:
        length = longest_first([len(ids) for ids in tokens], self._room)
        query, first, second = (ids[:length] for ids in tokens)
        head = self._before + query + self._between
        tail = first + self._after + second + self._end
        return _Row(head + tail, [0] * len(head) + [self._type_of_documents] * len(tail))


class _Row(NamedTuple):
    ids: list[int]
    type_ids: list[int]


def _around(row: Encoding) -> list[list[int]]:
    """Return the special tokens before, between and after the texts of a row."""
    gaps: list[list[int]] = [[]]
    for token, text, previous in zip(row.ids, row.sequence_ids, [None, *row.sequence_ids[:-1]], strict=True):
        if text is None:
            gaps[-1].append(token)
        elif text != previous:
            gaps.append([])
    return gaps


def padded(rows: Sequence[TokenRow], inputs: Sequence[str], pad_id: int) -> dict[str, npt.NDArray[np.int64]]:
    """Return a classifier's inputs by name, int64 ``[len(rows), longest]`` each.

    Args:
        rows: Token rows.
        inputs: :data:`INPUTS`, and :data:`TYPES` for a model that tells texts apart.
        pad_id: Token that fills a row.
    """
    values = dict(zip(INPUTS, pad([row.ids for row in rows], pad_id), strict=True))
    if TYPES in inputs:
        values[TYPES], _ = pad([row.type_ids for row in rows])
    return values
