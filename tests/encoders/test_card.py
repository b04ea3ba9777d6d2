"""The card: what changes a vector changes the fingerprint, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from retrieval_kd.encoders.card import CARD, EncoderCard, Fidelity, require_same_space
from retrieval_kd.errors import ArtifactError, EncoderMismatch

BASE = EncoderCard(
    name="base",
    architecture="bert",
    layers=2,
    parameters=10,
    pooling="mean",
    normalize=True,
    dimensions=(16, 8),
    max_length=24,
    query_prefix="query: ",
    document_prefix="passage: ",
    similarity="cosine",
    tokenizer_hash="t",
    weights_hash="w",
)
CHANGES = {
    "name": "other",
    "architecture": "distilbert",
    "layers": 3,
    "parameters": 11,
    "pooling": "cls",
    "normalize": False,
    "dimensions": (16,),
    "max_length": 25,
    "query_prefix": "query:",
    "document_prefix": "",
    "similarity": "dot",
    "tokenizer_hash": "u",
    "weights_hash": "v",
    "role": "query",
    "space": "f" * 64,
    "precision": "int8-static",
    "fidelity": Fidelity(0.9, 0.95, 0.99, 0.8, 0.79, 7, 5),
}
DESCRIPTIVE = {"name", "layers", "parameters", "role", "space", "fidelity"}


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_fingerprint_changes_with_what_changes_a_vector(field: str) -> None:
    """One blank in a prefix costs nDCG points in silence unless the fingerprint sees it."""
    changed = replace(BASE, **{field: CHANGES[field]})
    assert (changed.fingerprint == BASE.fingerprint) == (field in DESCRIPTIVE)


def test_every_field_is_covered_above() -> None:
    """A field added later must be decided on: does it change a vector?"""
    assert {field.name for field in fields(EncoderCard)} == set(CHANGES)


def test_round_trip(tmp_path: Path) -> None:
    """A card read back must be the card, tuples included."""
    BASE.save(tmp_path)
    assert EncoderCard.load(tmp_path) == BASE


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"max_length": 128}, "the fingerprint does not fit the fields"),
        ({"poling": "mean"}, "unknown field 'poling', did you mean 'pooling'?"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"dimensions": [8, 16]}, "dimensions [8, 16] must be distinct and decreasing"),
        ({"dimensions": None}, "not an encoder card"),
    ],
)
def test_card_edited_by_hand_is_refused(tmp_path: Path, edit: dict[str, object], message: str) -> None:
    """A card that no longer describes its weights would pass every later check."""
    (tmp_path / CARD).write_text(json.dumps({**BASE.to_json(), **edit}))
    with pytest.raises(ArtifactError) as caught:
        EncoderCard.load(tmp_path)
    assert message in str(caught.value)


def test_one_sided_encoder_refuses_the_other_side() -> None:
    """A query tower that quietly encodes documents fills an index with the wrong space's vectors."""
    query = BASE.in_space_of(BASE, "query")
    assert query.prefix("query") == "query: "
    with pytest.raises(EncoderMismatch, match="encodes the query side only"):
        query.prefix("document")


def test_spaces_are_compared_by_fingerprint() -> None:
    """Equal widths are not equal spaces."""
    teacher = replace(BASE, weights_hash="teacher")
    student = BASE.in_space_of(teacher, "query")
    require_same_space(student, teacher)
    require_same_space(teacher, teacher)
    with pytest.raises(EncoderMismatch, match="cannot search documents encoded by"):
        require_same_space(BASE, teacher)
    with pytest.raises(EncoderMismatch, match="gives 8 numbers, documents have 16"):
        require_same_space(replace(student, dimensions=(8,)), teacher)
    with pytest.raises(EncoderMismatch, match="encodes the document side only"):
        require_same_space(teacher.in_space_of(teacher, "document"), teacher)


def test_space_of_a_student_of_a_student_is_the_first_teacher() -> None:
    """Distilling twice must stay searchable against the documents encoded once."""
    teacher = replace(BASE, weights_hash="teacher")
    first = BASE.in_space_of(teacher, "query")
    second = replace(BASE, weights_hash="x").in_space_of(first, "query")
    require_same_space(second, teacher)
