"""Static students: token vectors of the start, a weighted mean of them, and every property of other students."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WORDS, tiny_encoder
from tokenizers import Tokenizer

from retrieval_kd.encoders.card import require_same_space
from retrieval_kd.encoders.onnx import OnnxEncoder, open_session
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import ArtifactError, RecipeError
from retrieval_kd.export.graph import token_sum
from retrieval_kd.export.onnx_export import Probes, export_encoder
from retrieval_kd.recipes.schema import EncoderSpec, ExportSpec, StudentSpec
from retrieval_kd.students.build import build_student

STATIC = StudentSpec(kind="static")
TEXTS = ["w1", "w2 w3 w4", "w5 w5 w6", " ".join(WORDS), "nobody w9", ""]


def static(seed: int = 0, **changes: object) -> TorchEncoder:
    start = tiny_encoder()
    student = build_student(start, STATIC, replace(start.card, **changes)).eval()
    with torch.no_grad():
        student.body.weights += torch.rand(len(student.body.weights), generator=torch.Generator().manual_seed(seed))
    student.refresh_card()
    return student


def test_each_token_starts_as_the_encoders_vector_of_it_alone() -> None:
    """Without it the table could be off by one token, or lack the special tokens the encoder knows texts by."""
    start = tiny_encoder()
    student = build_student(start, STATIC, start.card)
    table = student.body.embeddings.detach().numpy()
    alone = start.encode(WORDS, "query")
    # Where nothing is counted, all tokens have the same share of the mean that was taken away.
    np.testing.assert_allclose(table[4:] - table[4], alone - alone[0], atol=1e-6)
    np.testing.assert_allclose(table.mean(axis=0), 0, atol=1e-6)
    assert student.body.weights.unique().tolist() == [pytest.approx(1e-3 / (1e-3 + 1 / 64))]
    assert student.card.parameters == 64 * 16 + 64


def test_rare_tokens_weigh_more_and_the_running_text_has_mean_zero() -> None:
    """Without it "the" says as much as any word, which cost more than half of nDCG@10 before training."""
    start = tiny_encoder()
    body = build_student(start, STATIC, start.card, ["w0 w0 w0", "w1"]).body
    np.testing.assert_allclose((0.75 * body.embeddings[4] + 0.25 * body.embeddings[5]).detach(), 0, atol=1e-6)
    alone = start.encode(["w0", "w1"], "query")
    np.testing.assert_allclose((body.embeddings[5] - body.embeddings[4]).detach(), alone[1] - alone[0], atol=1e-6)
    weights = body.weights.detach().numpy()
    np.testing.assert_allclose(weights[4:7], [1e-3 / 0.751, 1e-3 / 0.251, 1], rtol=1e-6)


def test_vector_is_the_weighted_mean_of_unit_length_by_hand() -> None:
    """Without it a static student could average other tokens than the text's."""
    student = static()
    ids = student.tokenizer(["w5 w5 w6"], "query")[0]
    assert ids == [9, 9, 10]
    table = student.body.embeddings.detach().numpy().astype(np.float64)
    weights = student.body.weights.detach().numpy().astype(np.float64)
    total = 2 * weights[9] * table[9] + weights[10] * table[10]
    np.testing.assert_allclose(student.encode(["w5 w5 w6"], "query")[0], total / np.linalg.norm(total), atol=1e-6)


def test_card_says_what_the_student_is() -> None:
    """Without it serving could take a static student for a transformer, or refuse its space."""
    target = replace(tiny_encoder().card, query_prefix="w9 ")
    start = TorchEncoder(tiny_encoder().body, None, tiny_encoder().tokenizer_files, target)
    card = build_student(start, STATIC, target).card
    assert (card.architecture, card.layers, card.name, card.pooling) == ("static", 0, "tiny-static", "mean")
    assert (card.role, card.query_prefix, card.document_prefix) == ("query", "", "")
    require_same_space(card, target)
    symmetric = build_student(start, replace(STATIC, mode="symmetric"), target).card
    assert (symmetric.role, symmetric.space) == ("symmetric", "")


def test_text_without_a_token_is_the_unknown_token() -> None:
    """Without it an empty document has the zero vector, which the index of unit vectors refuses."""
    student = static()
    assert student.tokenizer(["", "nobody"], "query") == [[1], [1]]
    np.testing.assert_allclose(np.linalg.norm(student.encode(TEXTS, "query"), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("dimension", [8, 40])
def test_table_takes_the_targets_width(dimension: int) -> None:
    """Without it a student of a wider document encoder could not be compared with its documents."""
    student = static(dimensions=(dimension,))
    assert student.projection is None
    assert student.encode(TEXTS, "query").shape == (len(TEXTS), dimension)


def test_gradients_reach_vectors_and_weights_of_the_texts_alone() -> None:
    """Without it a look-up that detaches trains nothing, and one that spreads moves tokens nobody wrote."""
    student = static()
    student(torch.tensor([[9, 10]]), torch.ones(1, 2, dtype=torch.int64))[0, 0].backward()
    for weight in student.parameters():
        touched = weight.grad.reshape(64, -1).abs().sum(dim=1) > 0
        assert touched.nonzero().flatten().tolist() == [9, 10]


def test_saved_student_opens_the_same_and_in_sentence_transformers(tmp_path: Path) -> None:
    """Without it the student is trained for one library only; it must fold weights and cut length the same."""
    from sentence_transformers import SentenceTransformer

    student = static()
    student.save(tmp_path)
    opened = TorchEncoder.open(tmp_path)
    assert opened.card == student.card
    expected = student.encode(TEXTS, "query")
    assert np.array_equal(opened.encode(TEXTS, "query"), expected)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    # Their vector of no token is zero, which has no direction.
    np.testing.assert_allclose(model.encode_query(TEXTS[:-1], show_progress_bar=False), expected[:-1], atol=1e-6)
    assert not model.encode_query("", show_progress_bar=False).any()


@pytest.mark.parametrize("mapped", [False, True])
def test_published_static_models_are_read(mapped: bool, tmp_path: Path) -> None:
    """Without it StaticEmbedding's own format, or model2vec's shared rows, would give other vectors."""
    student = static()
    student.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if mapped:
        reverse = torch.arange(63, -1, -1)
        tensors = {"embeddings": tensors["embeddings"][reverse], "mapping": reverse, "weights": tensors["weights"]}
    else:
        tensors = {"embedding.weight": tensors["embeddings"] * tensors["weights"][:, None]}
    save_file(tensors, tmp_path / "model.safetensors")
    tokenizer = Tokenizer.from_buffer(tiny_encoder().tokenizer_files["tokenizer.json"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = TorchEncoder.load(EncoderSpec(str(tmp_path), max_length=student.card.max_length))
    np.testing.assert_allclose(read.encode(TEXTS, "document"), student.encode(TEXTS, "query"), atol=1e-6)
    assert (read.card.architecture, read.card.dimension) == ("static", 16)
    with pytest.raises(RecipeError, match=r"student.kind: encoder .* has no layers to keep; use static"):
        build_student(read, StudentSpec(layers=(0,)), read.card)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.ones(2)}, "cannot read the token vectors"),
        ({"embeddings": torch.ones(64)}, "vectors (64,) and weights (64,) do not fit"),
        ({"embeddings": torch.ones(64, 16), "weights": torch.ones(3)}, "vectors (64, 16) and weights (3,) do not fit"),
    ],
)
def test_hostile_tables_are_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    """Without it a table of another shape fails in the middle of a query."""
    static().save(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError) as caught:
        TorchEncoder.open(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_export_has_the_same_bits_in_any_company(tmp_path: Path) -> None:
    """Without it the fastest encoder would be the one whose answers depend on load."""
    student = static()
    artifact = export_encoder(student, tmp_path, ExportSpec(), Probes(dict(enumerate(TEXTS)), {}, {}))
    assert artifact.summary["max_abs_error"] <= 1e-6
    encoder = OnnxEncoder.load(tmp_path, threads=1)
    rng = np.random.default_rng([1, 2])
    texts = [*TEXTS, *(" ".join(rng.choice(WORDS, size=rng.integers(1, 20))) for _ in range(40))]
    together = encoder.encode(texts, "query")
    np.testing.assert_allclose(together, student.encode(texts, "query"), atol=1e-6)
    assert np.array_equal(together, np.concatenate([encoder.encode([text], "query") for text in texts]))


def test_exported_graph_is_short_and_heeds_the_mask(tmp_path: Path) -> None:
    """Without it a query takes longer to walk from operator to operator than to encode, or padding gets a say."""
    student = static()
    with torch.no_grad():
        student.body.weights[7] = 0
    student.refresh_card()
    export_encoder(student, tmp_path, ExportSpec(), Probes(dict(enumerate(TEXTS)), {}, {}))
    assert len(onnx.load(tmp_path / "model.onnx").graph.node) == 6
    ids = np.array([[9, 10, 11], [7, 0, 0]], dtype=np.int64)
    mask = np.array([[1, 1, 0], [1, 0, 0]], dtype=np.int64)
    (vectors,) = open_session(tmp_path / "model.onnx").run(None, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(vectors[0], student.encode(["w5 w6"], "query")[0], atol=1e-6)
    assert not vectors[1].any()


@pytest.mark.parametrize("width", [16, 384])
@pytest.mark.parametrize("threads", [1, 2])
def test_sum_of_tokens_has_the_same_bits_in_any_company(width: int, threads: int) -> None:
    """Without it a width or length at which onnxruntime multiplies in other blocks makes answers depend on load."""
    rng = np.random.default_rng([1, 3])
    names = ("ids", "mask")
    table = torch.from_numpy(rng.normal(size=(50, width)).astype(np.float32))
    session = open_session(token_sum(table, names, "sentence_embedding").SerializeToString(), threads)
    for length in (1, 2, 12, 33, 200):
        ids = rng.integers(50, size=(40, length))
        (together,) = session.run(None, {"ids": ids, "mask": np.ones_like(ids)})
        alone = [session.run(None, {"ids": row[None], "mask": np.ones_like(row[None])})[0] for row in ids]
        assert np.array_equal(together, np.concatenate(alone))


def test_vectors_without_unit_length_are_means(tmp_path: Path) -> None:
    """Without it an encoder that keeps lengths is exported as one that does not."""
    student = static(normalize=False)
    artifact = export_encoder(student, tmp_path, ExportSpec(), Probes(dict(enumerate(TEXTS)), {}, {}))
    assert artifact.summary["max_abs_error"] <= 1e-6
    exported = OnnxEncoder.load(tmp_path).encode(TEXTS, "query")
    np.testing.assert_allclose(exported, student.encode(TEXTS, "query"), atol=1e-6)
    assert np.linalg.norm(exported[0]) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"pooling": "cls"}, "pooling"), ({"projection": True}, "projection"), ({"dropout": 0.1}, "dropout")],
)
def test_options_without_a_meaning_are_refused(changes: dict[str, object], key: str) -> None:
    """Without it a recipe could ask for what a table of vectors cannot have, and get something else."""
    with pytest.raises(RecipeError, match=f"student.{key}: a static student"):
        replace(STATIC, **changes)
