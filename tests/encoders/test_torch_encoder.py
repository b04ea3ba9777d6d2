"""The torch encoder: what it reads, what it computes, what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_encoder
from tiny_bodies import FAMILIES, TEXTS, tiny_family

from retrieval_kd.batching import pad
from retrieval_kd.encoders.card import CARD, EncoderCard
from retrieval_kd.encoders.torch_encoder import TorchEncoder, quiet_transformers
from retrieval_kd.errors import ArtifactError, EncoderMismatch, RecipeError
from retrieval_kd.recipes.schema import EncoderSpec, StudentSpec
from retrieval_kd.students.build import build_student


def with_projection(dimension: int = 8) -> TorchEncoder:
    start = tiny_encoder()
    return build_student(start, StudentSpec(layers=(0, 1)), replace(start.card, dimensions=(dimension,))).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with_projection().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vector_is_pooled_token_states_of_unit_length(pooling: str) -> None:
    """Pooling over padding, or over the wrong token, is the field's most frequent silent bug."""
    start = tiny_encoder()
    encoder = build_student(start, StudentSpec(layers=(0, 1), pooling=pooling), start.card).eval()
    row = encoder.tokenizer(["w1 w2 w3"], "query")[0]
    ids, mask = pad([row, [*row, *row]])
    with torch.no_grad():
        states = encoder.body(input_ids=torch.tensor([row])).last_hidden_state[0]
        vector = encoder(torch.from_numpy(ids), torch.from_numpy(mask))[0]
    expected = states.mean(dim=0) if pooling == "mean" else states[0]
    np.testing.assert_allclose(vector.numpy(), (expected / expected.norm()).numpy(), atol=1e-6)


def test_gradients_reach_every_weight_and_no_row_of_zeros_is_nan() -> None:
    """A weight without a gradient would be saved as trained; a zero vector must not poison a run."""
    encoder = with_projection()
    ids, mask = pad(encoder.tokenizer(["w1 w2", "w3"], "query"))
    encoder(torch.from_numpy(ids), torch.from_numpy(mask))[:, 0].sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters())
    encoder.zero_grad()
    with torch.no_grad():
        for weight in encoder.projection.parameters():
            weight.zero_()
    vectors = encoder(torch.from_numpy(ids), torch.from_numpy(mask))
    vectors.sum().backward()
    assert torch.equal(vectors, torch.zeros_like(vectors))
    assert all(torch.isfinite(weight.grad).all() for weight in encoder.parameters())


def test_encode_keeps_order_and_training_mode() -> None:
    """Rows in batch order would give every text another text's vector."""
    encoder = tiny_encoder()
    encoder.train()
    together = encoder.encode(TEXTS, "query")
    assert encoder.training
    assert encoder.body.training
    alone = np.concatenate([encoder.encode([text], "query") for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert together.dtype == np.float32
    assert encoder.encode([], "query").shape == (0, 16)


def test_prefix_is_part_of_the_text() -> None:
    """A prefix that the card names and the encoder forgets costs ten nDCG points."""
    start = tiny_encoder()
    card = replace(start.card, query_prefix="w9 ", document_prefix="w8 ")
    encoder = TorchEncoder(start.body, None, start.tokenizer_files, card).eval()
    assert np.array_equal(encoder.encode(["w1"], "query"), start.encode(["w9 w1"], "query"))
    assert np.array_equal(encoder.encode(["w1"], "document"), start.encode(["w8 w1"], "document"))


def test_text_is_cut_at_the_cards_length() -> None:
    """Positions beyond the table would fail in the middle of a corpus."""
    encoder = tiny_encoder(max_length=8)
    row = encoder.tokenizer(["w1 " * 100], "query")[0]
    assert len(row) == 8
    assert row[-1] == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_encoder_opens_the_same(family: str, tmp_path: Path) -> None:
    """A student that changes on its way to disk was trained for nothing."""
    encoder = tiny_family(family)
    encoder.save(tmp_path)
    opened = TorchEncoder.open(tmp_path)
    assert opened.card == encoder.card
    assert not opened.training
    assert np.array_equal(opened.encode(TEXTS, "query"), encoder.encode(TEXTS, "query"))


def test_save_writes_the_card_of_the_present_weights(tmp_path: Path) -> None:
    """Training changes weights; a card from before it would be refused, or worse, believed."""
    encoder = with_projection()
    before = encoder.card
    with torch.no_grad():
        encoder.projection.bias += 1
    encoder.save(tmp_path)
    after = EncoderCard.load(tmp_path)
    assert after.weights_hash != before.weights_hash
    assert after == encoder.card == replace(before, weights_hash=after.weights_hash)
    assert TorchEncoder.open(tmp_path).card == after


def test_parameters_are_counted_by_hand() -> None:
    """The report prints the count as the student's size."""
    words, positions, types, width, inner, layers = 64, 256, 2, 16, 32, 2
    embeddings = (words + positions + types) * width + 2 * width
    layer = 4 * (width * width + width) + 2 * 2 * width + (width * inner + inner) + (inner * width + width)
    assert tiny_encoder().card.parameters == embeddings + layers * layer
    assert with_projection(8).card.parameters == embeddings + layers * layer + 8 * width + 8


def test_load_makes_a_symmetric_card_of_its_own_space(saved: Path) -> None:
    """The published model is the space that students are distilled into."""
    encoder = TorchEncoder.load(EncoderSpec(str(saved), max_length=20, query_prefix="q "))
    card = encoder.card
    assert (card.name, card.role, card.space, card.max_length, card.query_prefix) == (
        "model",
        "symmetric",
        "",
        20,
        "q ",
    )
    assert (card.pooling, card.normalize, card.dimension, card.layers) == ("mean", True, 8, 2)
    assert card.weights_hash == EncoderCard.load(saved).weights_hash


def test_length_beyond_the_position_table_is_refused(saved: Path) -> None:
    """The first long text would otherwise fail hours later, inside an embedding."""
    with pytest.raises(RecipeError, match=r"encoder.max_length: 257 is more than the 256 positions"):
        TorchEncoder.load(EncoderSpec(str(saved), max_length=257))


def test_roberta_has_fewer_positions_than_rows(tmp_path: Path) -> None:
    """Its family starts counting after the padding id."""
    tiny_family("xlm-roberta").save(tmp_path)
    with pytest.raises(RecipeError, match="more than the 63 positions"):
        TorchEncoder.load(EncoderSpec(str(tmp_path), max_length=64))


def edit_json(name: str, change: Callable[[object], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(raw)))

    return edit


def tamper_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["embeddings.word_embeddings.weight"][7, 3] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def drop_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def cut(name: str) -> Callable[[Path], None]:
    def half(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return half


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights changed": (tamper_weights, "model.safetensors: not the weights of card.json"),
    "a weight missing": (drop_weight, "weight 'encoder.layer.1.output.dense.weight' is missing"),
    "weights cut": (cut("model.safetensors"), "cannot read the transformer"),
    "weights gone": (lambda folder: (folder / "model.safetensors").unlink(), "cannot read the transformer"),
    "projection cut": (cut("2_Dense/model.safetensors"), "2_Dense/model.safetensors: cannot read the projection"),
    "projection gone": (lambda folder: (folder / "2_Dense/model.safetensors").unlink(), "cannot read the projection"),
    "tokenizer changed": (
        edit_json("tokenizer.json", lambda raw: {**raw, "normalizer": None}),
        "tokenizer.json: not the tokenizer of card.json",
    ),
    "tokenizer cut": (cut("tokenizer.json"), "tokenizer.json: not a tokenizer"),
    "tokenizer gone": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    "card gone": (lambda folder: (folder / CARD).unlink(), "card.json: no such file"),
    "card edited": (edit_json(CARD, lambda raw: {**raw, "max_length": 5}), "the fingerprint does not fit"),
    "pooling changed": (
        edit_json("1_Pooling/config.json", lambda raw: {"pooling_mode": "cls"}),
        "its modules are not those of card.json",
    ),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damaged_folder_does_not_open(damage: str, saved: Path) -> None:
    """Transformers draws missing weights at random and only logs it; nothing damaged may look whole."""
    harm, message = DAMAGE[damage]
    harm(saved)
    with pytest.raises(ArtifactError) as caught:
        TorchEncoder.open(saved)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


LAYOUTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no modules": (lambda folder: (folder / "modules.json").unlink(), "no modules.json"),
    "not a list": (edit_json("modules.json", lambda raw: {"a": 1}), "not a list of modules"),
    "unknown module": (
        edit_json("modules.json", lambda raw: [*raw, {"type": "x.LSTM", "path": ""}]),
        "modules Transformer, Pooling, Dense, Normalize, LSTM",
    ),
    "another order": (edit_json("modules.json", lambda raw: [raw[0], raw[1], raw[3], raw[2]]), "in this order"),
    "two projections": (edit_json("modules.json", lambda raw: [*raw[:3], raw[2], raw[3]]), "each once"),
    "no pooling": (edit_json("modules.json", lambda raw: [raw[0], raw[3]]), "modules Transformer, Normalize"),
    "max pooling": (edit_json("1_Pooling/config.json", lambda raw: {"pooling_mode": "max"}), "pooling 'max'"),
    "two poolings": (
        edit_json("1_Pooling/config.json", lambda raw: {**raw, "pooling_mode_cls_token": True}),
        "supported: mean, cls",
    ),
    "activation": (
        edit_json(
            "2_Dense/config.json", lambda raw: {**raw, "activation_function": "torch.nn.modules.activation.Tanh"}
        ),
        "only a Dense module with Identity",
    ),
    "similarity": (
        edit_json("config_sentence_transformers.json", lambda raw: {**raw, "similarity_fn_name": "euclidean"}),
        "similarity 'euclidean'",
    ),
    "lower casing": (
        edit_json("sentence_bert_config.json", lambda raw: {**raw, "do_lower_case": True}),
        "do_lower_case is on",
    ),
}


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_unsupported_model_is_refused(kind: str, saved: Path) -> None:
    """A module that is skipped in silence gives vectors of another model."""
    harm, message = LAYOUTS[kind]
    harm(saved)
    with pytest.raises(ArtifactError) as caught:
        TorchEncoder.load(EncoderSpec(str(saved), max_length=24))
    assert message in str(caught.value)


@pytest.mark.parametrize(("similarity", "unit"), [("cosine", True), (None, True), ("dot", False)])
def test_model_without_normalize_follows_its_similarity(saved: Path, similarity: str | None, unit: bool) -> None:
    """Dot products stand for the cosine only between unit vectors."""
    edit_json("modules.json", lambda raw: raw[:3])(saved)
    edit_json("config_sentence_transformers.json", lambda raw: {**raw, "similarity_fn_name": similarity})(saved)
    encoder = TorchEncoder.load(EncoderSpec(str(saved), max_length=24))
    assert encoder.card.normalize is unit
    norms = np.linalg.norm(encoder.encode(["w1 w2", "w3"], "query"), axis=1)
    assert bool(np.allclose(norms, 1, atol=1e-6)) is unit


def test_save_cut_short_leaves_no_encoder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old card beside new weights, or the reverse, must not open."""
    encoder = TorchEncoder.open(saved)
    monkeypatch.setattr("retrieval_kd.encoders.torch_encoder.write_layout", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.save(saved)
    with pytest.raises(ArtifactError, match=r"card.json: no such file"):
        TorchEncoder.open(saved)


def test_query_tower_refuses_documents(saved: Path) -> None:
    """It knows one side only."""
    encoder = TorchEncoder.open(saved)
    assert encoder.card.role == "query"
    with pytest.raises(EncoderMismatch, match="query side only"):
        encoder.encode(["w1"], "document")


def test_loading_is_quiet_and_restores_verbosity(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Progress bars of a library would garble our own; its settings belong to the user."""
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    TorchEncoder.open(saved)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyError), quiet_transformers():
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_building_and_opening_draw_nothing_from_the_global_generator(saved: Path) -> None:
    """Otherwise a resumed run would draw other numbers than an unbroken one."""
    state = torch.get_rng_state()
    start = TorchEncoder.open(saved)
    build_student(start, StudentSpec(layers=(0,)), replace(start.card, dimensions=(5,)))
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_hash_sees_names_shapes_and_bits() -> None:
    """Two encoders of one hash must be one encoder."""
    first, second = with_projection(), with_projection()
    assert first.card.weights_hash == second.card.weights_hash
    with torch.no_grad():
        value = second.projection.weight[0, 0]
        second.projection.weight[0, 0] = torch.nextafter(value, torch.tensor(math.inf))
    assert second.refresh_card().weights_hash != first.card.weights_hash
