"""Batches: each text once, under the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_kd.batching import equal_length_batches, length_sorted_batches, pad

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@pytest.mark.parametrize("batches", [equal_length_batches, length_sorted_batches])
@given(lengths=LENGTHS, budget=st.integers(1, 100))
def test_each_position_comes_once_and_under_the_budget(
    batches: Callable[[list[int], int], Iterator[np.ndarray]], lengths: list[int], budget: int
) -> None:
    """A position lost would leave an uninitialised row in an encoder's output."""
    made = list(batches(lengths, budget))
    assert sorted(int(i) for batch in made for i in batch) == list(range(len(lengths)))
    for batch in made:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    longest_of = [max(lengths[i] for i in batch) for batch in made]
    assert longest_of == sorted(longest_of, reverse=True)


@given(lengths=LENGTHS, budget=st.integers(1, 100))
def test_equal_length_batches_mix_no_lengths_and_waste_no_call(lengths: list[int], budget: int) -> None:
    """A batch of two lengths would be padded, and a vector would depend on its company."""
    made = list(equal_length_batches(lengths, budget))
    assert all(len({lengths[i] for i in batch}) == 1 for batch in made)
    for length in set(lengths):
        sizes = [len(batch) for batch in made if lengths[batch[0]] == length]
        rows = max(1, budget // max(1, length))
        assert sizes == [rows] * (len(sizes) - 1) + [sizes[-1]]
        assert 0 < sizes[-1] <= rows


def test_pad_marks_tokens_only() -> None:
    """A mask that counts padding shifts every mean."""
    ids, mask = pad([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64
    assert pad([])[0].shape == (0, 0)
