"""Truncated vectors: unit length again, one space for both sides, the same bits in any company."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import WORDS, tiny_encoder

from retrieval_kd.encoders.card import EncoderCard, require_same_space
from retrieval_kd.encoders.matryoshka import TruncatedEncoder, truncated
from retrieval_kd.errors import EncoderMismatch

CARD = replace(tiny_encoder().card, dimensions=(16, 8, 4))


def test_leading_numbers_by_hand() -> None:
    """Without it the wrong end, or the norm of the whole vector, could be taken."""
    vectors = np.array([[3, 4, 12], [0, 0, 1]], dtype=np.float32)
    assert truncated(vectors, 2, renormalise=True).tolist() == [[np.float32(0.6), np.float32(0.8)], [0, 0]]
    assert truncated(vectors, 2, renormalise=False).tolist() == [[3, 4], [0, 0]]
    assert truncated(vectors, 3, renormalise=True) is vectors


def test_a_rows_bits_do_not_depend_on_its_company() -> None:
    """Without it a server that batches would answer by load as soon as vectors are cut."""
    vectors = np.random.default_rng([4, 4]).normal(size=(37, 48)).astype(np.float32)
    together = truncated(vectors, 33, renormalise=True)
    assert np.array_equal(together, np.concatenate([truncated(row[None], 33, renormalise=True) for row in vectors]))
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_cutting_commutes_with_being_equal_and_with_cutting_again() -> None:
    """Without it a student that equals its teacher would stop doing so at a smaller size."""
    vectors = np.random.default_rng([4, 5]).normal(size=(5, 16)).astype(np.float32)
    twice = truncated(truncated(vectors, 8, renormalise=True), 4, renormalise=True)
    np.testing.assert_allclose(twice, truncated(vectors, 4, renormalise=True), atol=1e-6)


def test_card_of_each_size_has_its_own_space_that_both_sides_share() -> None:
    """Without it 8 numbers of a query could be searched in documents cut by another encoder, or not at all."""
    student = replace(CARD, weights_hash="student", query_prefix="w1 ").in_space_of(CARD, "query")
    for size in (8, 4):
        query, documents = student.truncated(size), CARD.truncated(size)
        require_same_space(query, documents)
        assert query.dimensions == tuple(kept for kept in (8, 4) if kept <= size)
        with pytest.raises(EncoderMismatch):
            require_same_space(query, CARD)
    assert CARD.truncated(16) is CARD
    other = replace(CARD, weights_hash="other")
    with pytest.raises(EncoderMismatch):
        require_same_space(student.truncated(8), other.truncated(8))
    assert CARD.truncated(8).fingerprint != CARD.fingerprint
    card = CARD.truncated(8)
    assert EncoderCard.from_json(card.to_json(), "card.json") == card


@pytest.mark.parametrize("size", [0, -1, 17])
def test_size_the_vectors_do_not_have_is_refused(size: int) -> None:
    """Without it a slice would quietly give fewer numbers than the card says."""
    with pytest.raises(EncoderMismatch, match=f"gives 16 numbers, which cannot be cut to {size}; its sizes are 16, 8"):
        CARD.truncated(size)


def test_view_encodes_at_the_smaller_size() -> None:
    """Without it card and vectors of a view could disagree."""
    encoder = tiny_encoder()
    view = TruncatedEncoder(encoder, 6)
    vectors = view.encode(WORDS[:9], "document")
    assert view.card.dimension == 6
    whole = encoder.encode(WORDS[:9], "document")[:, :6]
    np.testing.assert_allclose(vectors, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-6)
