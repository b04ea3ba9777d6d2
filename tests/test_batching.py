"""Batches: each text once, under the budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_kd.batching import cheapest_batches, equal_length_batches, length_sorted_batches, pad

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@pytest.mark.parametrize(
    "batches", [equal_length_batches, length_sorted_batches, partial(cheapest_batches, overhead=7)]
)
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


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=9), budget=st.integers(1, 40), overhead=st.integers(0, 30)
)
def test_cheapest_batches_cost_no_more_than_any_split(lengths: list[int], budget: int, overhead: int) -> None:
    """A split that is not the cheapest pays for padding or for passes, on every step of every training."""
    by_length = sorted((max(1, length) for length in lengths), reverse=True)

    def cost(cuts: tuple[int, ...]) -> float:
        parts = [by_length[start:end] for start, end in itertools.pairwise((0, *cuts, len(by_length)))]
        fits = all(len(part) == 1 or len(part) * part[0] <= budget for part in parts)
        return sum(overhead + len(part) * part[0] for part in parts) if fits else float("inf")

    inner = range(1, len(by_length))
    least = min(cost(cuts) for count in range(len(by_length)) for cuts in itertools.combinations(inner, count))
    made = [len(batch) for batch in cheapest_batches(lengths, budget, overhead)]
    assert cost(tuple(itertools.accumulate(made[:-1]))) == least


def test_pad_marks_tokens_only() -> None:
    """A mask that counts padding shifts every mean."""
    ids, mask = pad([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64
    assert pad([])[0].shape == (0, 0)
