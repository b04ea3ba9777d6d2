"""Batches of similar length under a token budget: what every encoder and scorer here runs on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt


def length_sorted_batches(
    lengths: Sequence[int] | npt.NDArray[np.integer], max_tokens: int, max_rows: int | None = None
) -> Iterator[npt.NDArray[np.int64]]:
    """Split positions into batches, longest first, whose padded size stays under a budget.

    Longest first means that a batch that does not fit in memory fails at once, not after an hour.
    A single text longer than the budget forms a batch of its own.

    Args:
        lengths: Token count of each text.
        max_tokens: Upper bound of rows times longest row.
        max_rows: Upper bound of rows; none when None.

    Yields:
        int64 positions into ``lengths``; together each position exactly once.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(sizes[order[start]]))
        rows = max(1, max_tokens // longest)
        if max_rows is not None:
            rows = min(rows, max_rows)
        yield order[start : start + rows]
        start += rows


def cheapest_batches(
    lengths: Sequence[int] | npt.NDArray[np.integer], max_tokens: int, overhead: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Split positions into batches of similar length, longest first, that cost the least together.

    A batch costs its padded size and what any batch costs: where lengths jump, two small batches are cheaper than
    the padding of one. Found by dynamic programming over the sorted lengths, in time ``n`` times the most rows.

    Args:
        lengths: Token count of each text.
        max_tokens: Upper bound of rows times longest row; a longer text forms a batch of its own.
        overhead: What a batch costs beside its tokens, in tokens.

    Yields:
        int64 positions into ``lengths``; together each position exactly once.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    longest, places = np.maximum(sizes[order], 1), np.arange(len(order))
    # Of the first n texts: the least cost, and where its last batch starts.
    costs, starts = np.zeros(len(order) + 1, dtype=np.int64), np.zeros(len(order) + 1, dtype=np.int64)
    first = 0
    for end in range(1, len(order) + 1):
        while first < end - 1 and (end - first) * longest[first] > max_tokens:
            first += 1
        totals = costs[first:end] + (end - places[first:end]) * longest[first:end]
        starts[end] = first + totals.argmin()
        costs[end] = totals.min() + overhead
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(int(starts[cuts[-1]]))
    for start, end in itertools.pairwise(reversed(cuts)):
        yield order[start:end]


def equal_length_batches(
    lengths: Sequence[int] | npt.NDArray[np.integer], max_tokens: int, max_rows: int | None = None
) -> Iterator[npt.NDArray[np.int64]]:
    """Split positions into batches of exactly one length under a token budget, longest first.

    Nothing is padded, so a row's arithmetic cannot depend on the rows beside it.

    Args:
        lengths: Token count of each text.
        max_tokens: Upper bound of rows times length; a longer text forms a batch of its own.
        max_rows: Upper bound of rows; none when None.

    Yields:
        int64 positions into ``lengths``; together each position exactly once.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1):
        if len(group):
            rows = max(1, max_tokens // max(1, int(sizes[group[0]])))
            rows = rows if max_rows is None else min(rows, max_rows)
            yield from (group[start : start + rows] for start in range(0, len(group), rows))


def pad(
    rows: Sequence[Sequence[int] | npt.NDArray[np.int32]], pad_id: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Right-pad token rows to the longest.

    Returns:
        ``(ids, mask)``, both int64 ``[len(rows), longest]``; the mask is 1 on tokens, 0 on padding.
    """
    longest = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask
