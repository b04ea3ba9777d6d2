"""Students: the chosen layers, nothing shared, nothing disturbed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_encoder
from tiny_bodies import FAMILIES, TEXTS, tiny_family

from retrieval_kd.encoders.card import require_same_space
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import RecipeError
from retrieval_kd.recipes.schema import EncoderSpec, StudentSpec
from retrieval_kd.students.build import build_student, fit_projection


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_give_the_starts_vectors(family: str, projection: bool) -> None:
    """A build that disturbs its start distils away from a worse point than it says."""
    start = tiny_family(family)
    spec = StudentSpec(layers=(0, 1, 2), projection=projection)
    student = build_student(start, spec, start.card).eval()
    difference = np.abs(student.encode(TEXTS, "query") - start.encode(TEXTS, "query")).max()
    assert difference <= (1e-6 if projection else 0)
    assert (student.projection is not None) is projection


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_layers_are_the_chosen_ones(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The wrong layers train almost as well, so only the weights can tell; and disk must keep them."""
    start = tiny_family(family, layers=4)
    student = build_student(start, StudentSpec(layers=(1, 3)), start.card)
    old, new = start.body.state_dict(), student.body.state_dict()
    names = {1: 0, 3: 1}
    checked = 0
    for name, weight in old.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            assert torch.equal(new[name], weight)
        elif int(parts[number]) in names:
            parts[number] = str(names[int(parts[number])])
            assert torch.equal(new[".".join(parts)], weight)
            checked += 1
    assert checked > 20
    assert student.card.layers == student.body.config.num_hidden_layers == 2
    folder = tmp_path_factory.mktemp("student")
    student.eval().save(folder)
    assert np.array_equal(TorchEncoder.open(folder).encode(TEXTS, "query"), student.encode(TEXTS, "query"))


def test_student_and_start_share_nothing() -> None:
    """Training a student must not move the teacher's space under its feet."""
    start = build_student(
        tiny_encoder(), StudentSpec(mode="symmetric", layers=(0, 1), projection=True), tiny_encoder().card
    )
    before = start.refresh_card().weights_hash
    student = build_student(start, StudentSpec(layers=(0, 1), dropout=0.3), start.card)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 1
    assert start.refresh_card().weights_hash == before
    assert student.refresh_card().weights_hash != before
    assert start.body.config.hidden_dropout_prob != 0.3


def test_layer_beyond_the_start_is_named() -> None:
    """An IndexError does not say which recipe key is wrong."""
    start = tiny_encoder()
    with pytest.raises(RecipeError, match=r"student.layers: no layer 5, the model has 2 layers, 0 to 1"):
        build_student(start, StudentSpec(layers=(0, 5)), start.card)


def test_asymmetric_student_lies_in_the_targets_space() -> None:
    """Serving refuses a query encoder of another space, so the card must say which it is."""
    start = tiny_encoder()
    target = replace(start.card, weights_hash="teacher", dimensions=(24,), normalize=False, similarity="dot")
    student = build_student(start, StudentSpec(layers=(0,)), target)
    require_same_space(student.card, target)
    assert student.card.role == "query"
    assert (student.card.dimension, student.card.normalize, student.card.similarity) == (24, False, "dot")
    assert student.eval().encode(["w1"], "query").shape == (1, 24)


def test_symmetric_student_has_a_space_of_its_own() -> None:
    """Its documents must be encoded anew; believing otherwise searches noise."""
    start = tiny_encoder()
    card = build_student(start, StudentSpec(mode="symmetric", layers=(0,)), start.card).card
    assert (card.role, card.space) == ("symmetric", "")
    assert card.space_fingerprint == card.fingerprint != start.card.fingerprint


@pytest.mark.parametrize("dimension", [8, 40])
def test_projection_between_widths_is_orthonormal_and_always_the_same(dimension: int) -> None:
    """A map that shrinks some directions throws away what the layers know; a random build is no recipe."""
    start = tiny_encoder()
    target = replace(start.card, dimensions=(dimension,))
    weight = build_student(start, StudentSpec(layers=(0,)), target).projection.weight.detach()
    again = build_student(start, StudentSpec(layers=(0,)), target).projection
    gram = weight @ weight.T if dimension < 16 else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(min(dimension, 16)), atol=1e-5, rtol=0)
    assert torch.equal(weight, again.weight)
    assert not again.bias.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_the_recipes(family: str, tmp_path: Path) -> None:
    """The start's own dropout would make a distillation noisy that asks for none; and disk must keep the recipe's."""
    start = tiny_family(family)
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    for rate, same in ((0.0, True), (0.5, False)):
        student = build_student(start, StudentSpec(layers=(0, 1), dropout=rate), start.card)
        student.save(tmp_path / str(rate))
        student = TorchEncoder.open(tmp_path / str(rate)).train()
        with torch.random.fork_rng():
            first, second = (student(ids, torch.ones_like(ids)) for _ in range(2))
        assert torch.equal(first, second) is same


def test_no_pooler_and_smaller_count() -> None:
    """Weights that no vector passes through would be counted, hashed and trained."""
    start = tiny_family("bert")
    student = build_student(start, StudentSpec(layers=(0,)), start.card)
    assert not [name for name, _ in student.named_parameters() if "pooler" in name]
    assert student.card.parameters == sum(weight.numel() for weight in student.parameters()) < start.card.parameters


@pytest.mark.parametrize("kind", ["transformer", "static"])
def test_matryoshka_sizes_stand_in_the_card(kind: str) -> None:
    """Without it an index could cut vectors at a width nobody trained."""
    start = tiny_encoder()
    spec = StudentSpec(kind=kind, layers=(0,), matryoshka=(8, 4))
    assert build_student(start, spec, start.card).card.dimensions == (16, 8, 4)
    with pytest.raises(RecipeError, match=r"student.matryoshka: 16 is not below the full width 16"):
        build_student(start, replace(spec, matryoshka=(16,)), start.card)


@pytest.mark.parametrize("sizes", [(4, 8), (8, 8), (8, 0)])
def test_impossible_matryoshka_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    """Without it a recipe could train an empty vector."""
    with pytest.raises(RecipeError, match=r"student\.matryoshka"):
        StudentSpec(matryoshka=sizes)


def other_start(width: int = 24) -> tuple[TorchEncoder, TorchEncoder]:
    """Return a student cut from an encoder of another space, and the encoder whose space it is to learn."""
    start, target = tiny_encoder(seed=1, width=width), tiny_encoder()
    return build_student(start, StudentSpec(start=EncoderSpec("other"), layers=(0, 1)), target.card), target


WORDS = [f"w{i} w{j}" for i in range(12) for j in range(8)]


def test_fitted_projection_finds_an_affine_map_that_exists() -> None:
    """A wrong axis, mean or sign would start every such student at noise, which training hides."""
    student, _ = other_start()
    head = replace(student.card, normalize=False, dimensions=(24,))
    states = TorchEncoder(student.body, None, student.tokenizer_files, head).encode(WORDS, "query")
    rng = np.random.default_rng(0)
    targets = (states @ rng.standard_normal((24, 16)) + 3).astype(np.float32)
    fit_projection(student, WORDS, targets)
    expected = targets / np.linalg.norm(targets, axis=1, keepdims=True)
    assert (student.encode(WORDS, "query") * expected).sum(axis=1).min() > 0.9999
    assert student.card.weights_hash == student.refresh_card().weights_hash


@pytest.mark.parametrize("texts", [WORDS[:3], WORDS[:1], [WORDS[0]] * 2], ids=["few", "one", "alike"])
def test_fewer_texts_than_dimensions_have_one_finite_fit(texts: list[str]) -> None:
    """Without the ridge a small collection would start from infinities, or from whatever the solver leaves."""
    student, target = other_start()
    fit_projection(student, texts, target.encode(texts, "query"))
    vectors = student.encode(WORDS, "query")
    assert np.isfinite(vectors).all()
    assert (student.encode(texts, "query") * target.encode(texts, "query")).sum(axis=1).min() > 0.99


def test_start_of_the_same_width_gets_a_projection_too() -> None:
    """Equal widths do not make one space: without the map the student would be compared with vectors of another."""
    student, _ = other_start(width=16)
    assert student.projection is not None


def test_static_student_takes_no_other_start() -> None:
    """Its table would be another model's, in a space that nothing leads out of."""
    with pytest.raises(RecipeError, match=r"student\.start: a static student starts from encoder's view"):
        StudentSpec(kind="static", start=EncoderSpec("other"))
