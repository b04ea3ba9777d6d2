"""Lower precision: gated by retrieval, described in the card, and the same vector for a text in any company."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny import WORDS, tiny_encoder
from tiny_bodies import FAMILIES, tiny_family

from retrieval_kd.artifacts import Artifact, bytes_sha256
from retrieval_kd.encoders.card import EncoderCard, Fidelity, require_same_space
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.onnx import INPUTS, OUTPUT, OnnxEncoder, open_session
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import ArtifactError, DataError, EncoderMismatch, ParityError, RecipeError
from retrieval_kd.export.graph import trace
from retrieval_kd.export.onnx_export import Probes, export_encoder
from retrieval_kd.export.precision import lower_graph, lowered, measure_fidelity, require
from retrieval_kd.recipes.schema import ExportSpec, StudentSpec
from retrieval_kd.students.build import build_student

INT8 = ("int8-dynamic", "int8-static")
RNG = np.random.default_rng([8, 1])
TEXTS = [" ".join(RNG.choice(WORDS, size=RNG.integers(1, 12))) for _ in range(40)]
CALIBRATION = [" ".join(RNG.choice(WORDS, size=RNG.integers(1, 12))) for _ in range(20)]


@pytest.fixture(scope="module")
def source() -> TorchEncoder:
    return tiny_encoder(width=32)


@pytest.fixture(scope="module")
def probes(source: TorchEncoder) -> Probes:
    corpus = EncodedCorpus([f"d{i:02}" for i in range(40)], source.encode(TEXTS, "document"), source.card, "c", "t")
    queries = {f"q{i}": text for i, text in enumerate(TEXTS[:20])}
    return Probes(queries, {}, {f"q{i}": {f"d{i:02}": 1} for i in range(20)}, corpus)


@pytest.fixture(scope="module")
def folders(source: TorchEncoder, probes: Probes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("precision")
    for precision in (*INT8, "fp16"):
        gate = ExportSpec(precision=precision, max_ndcg_loss=0.1)
        export_encoder(source, root / precision, gate, probes, CALIBRATION)
    return {precision: root / precision for precision in (*INT8, "fp16")}


@pytest.mark.parametrize("precision", INT8)
def test_a_text_has_one_vector_alone_and_in_any_batch(precision: str, folders: dict[str, Path]) -> None:
    """Without it a server under load answers the same query with another vector, as dynamic int8 does by design."""
    encoder = OnnxEncoder.load(folders[precision], threads=1)
    together = encoder.encode(TEXTS, "query")
    assert np.array_equal(together, np.concatenate([encoder.encode([text], "query") for text in TEXTS]))
    for size in (2, 7, 33):
        chosen = RNG.choice(len(TEXTS), size=size, replace=False)
        assert np.array_equal(encoder.encode([TEXTS[i] for i in chosen], "query"), together[chosen])
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_dynamic_int8_does_depend_on_its_batch(folders: dict[str, Path], source: TorchEncoder) -> None:
    """Without it the rule of one text a call would stand on hearsay, and outlive its reason."""
    session = open_session(folders["int8-dynamic"] / "model.onnx", threads=1)
    rows = [row for row in source.tokenizer(TEXTS, "query") if len(row) == 5]
    assert len(rows) > 2
    alone = np.concatenate([session.run([OUTPUT], feed(rows[i : i + 1]))[0] for i in range(len(rows))])
    assert not np.array_equal(session.run([OUTPUT], feed(rows))[0], alone)
    assert EncoderCard.load(folders["int8-dynamic"]).max_batch == 1
    assert EncoderCard.load(folders["int8-static"]).max_batch is None


def feed(rows: list[list[int]]) -> dict[str, np.ndarray]:
    ids = np.array(rows, dtype=np.int64)
    return dict(zip(INPUTS, (ids, np.ones_like(ids)), strict=True))


@pytest.mark.parametrize("precision", INT8)
def test_weights_are_int8_and_activations_products_are_not(precision: str, folders: dict[str, Path]) -> None:
    """Without it a graph could be named int8 and hold float weights, or lose its unit length to a quantised norm."""
    graph = onnx.load(folders[precision] / "model.onnx").graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    large = [tensor for tensor in graph.initializer if math.prod(tensor.dims) >= 32 * 32]
    whole = [tensor for tensor in large if kinds[tensor.name] == onnx.TensorProto.FLOAT]
    # Static int8 leaves the product that narrows the feed-forward block, one a layer.
    assert len(whole) == (2 if precision == "int8-static" else 0)
    assert all(tuple(tensor.dims) == (64, 32) for tensor in whole)
    assert sum(kinds[tensor.name] == onnx.TensorProto.INT8 for tensor in large) >= 10
    assert [node.op_type for node in graph.node].count("MatMul") >= 6


@pytest.mark.parametrize("precision", [*INT8, "fp16"])
def test_card_says_what_the_precision_costs(
    precision: str, folders: dict[str, Path], source: TorchEncoder, probes: Probes
) -> None:
    """Without it whoever serves the folder cannot tell an approximation from the encoder it approximates."""
    card = EncoderCard.load(folders[precision])
    assert card.precision == precision
    require_same_space(card, source.card)
    assert card.role == ("symmetric" if precision == "fp16" else "query")
    assert card.fingerprint != source.card.fingerprint
    assert card.weights_hash == bytes_sha256((folders[precision] / "model.onnx").read_bytes())
    fidelity = card.fidelity
    assert fidelity is not None
    assert 0.9 < fidelity.cosine_min <= fidelity.cosine_p1 <= fidelity.cosine_p50 <= 1 + 1e-6
    assert fidelity.cosine_min < 1
    assert (fidelity.texts, fidelity.queries, fidelity.ndcg_reference) == (20, 20, 1)
    assert Artifact.load(folders[precision]).summary["cosine_min"] == fidelity.cosine_min
    assert EncoderCard.from_json(card.to_json(), "card.json") == card


@pytest.mark.parametrize("precision", INT8)
def test_int8_encodes_no_documents(precision: str, folders: dict[str, Path]) -> None:
    """Without it an index could be built of approximations and outlive them."""
    with pytest.raises(EncoderMismatch, match="query side only"):
        OnnxEncoder.load(folders[precision]).encode(["w1"], "document")


def test_fp16_without_a_device_is_one_line(folders: dict[str, Path]) -> None:
    """Without it a CPU would run it through casts, slower than fp32 and in other bits than the GPU."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a GPU here, which runs it")
    with pytest.raises(ArtifactError, match="fp16 is for a GPU and onnxruntime has none here; install") as caught:
        OnnxEncoder.load(folders["fp16"])
    assert "\n" not in str(caught.value)


def test_fp16_weights_are_halves(folders: dict[str, Path]) -> None:
    """Without it the export could keep float weights and only be named fp16."""
    graph = onnx.load(folders["fp16"] / "model.onnx").graph
    large = {tensor.data_type for tensor in graph.initializer if math.prod(tensor.dims) >= 32}
    assert large == {onnx.TensorProto.FLOAT16}
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_gate_refuses_by_retrieval_and_leaves_nothing(source: TorchEncoder, probes: Probes, tmp_path: Path) -> None:
    """Without it a precision that ruins ranking would be published with good cosines."""
    fidelity = Fidelity(0.98, 0.99, 0.995, ndcg_reference=0.8, ndcg=0.79, texts=9, queries=7)
    gate = ExportSpec(precision="int8-dynamic")
    message = r"int8-dynamic loses 1.25% of nDCG@10 \(0.8000 to 0.7900 over 7 dev queries\), the gate allows 0.50%"
    with pytest.raises(ParityError, match=message) as caught:
        require(fidelity, gate)
    assert "\n" not in str(caught.value)
    require(replace(fidelity, ndcg=0.7961), gate)
    with pytest.raises(ParityError):
        require(replace(fidelity, ndcg=math.nan), gate)
    # The best documents of every query are those an int8 query cannot see: nothing judged is found any more.
    worst = EncodedCorpus(probes.corpus.ids, -probes.corpus.vectors, probes.corpus.card, "c", "t")
    with pytest.raises(DataError, match="no judged dev query finds anything, so its cost is unknown"):
        export_encoder(source, tmp_path / "out", gate, replace(probes, corpus=worst))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_fidelity_by_hand(source: TorchEncoder, probes: Probes) -> None:
    """Without it percentiles could be of the wrong texts, or nDCG of the reference twice."""

    class Turned:
        card = replace(source.card, precision="int8-dynamic", role="query")

        def encode(self, texts: list[str], side: str) -> np.ndarray:
            vectors = source.encode(texts, side)
            vectors[0] = -vectors[0]
            return vectors

    fidelity = measure_fidelity(source, Turned(), probes)
    assert fidelity.cosine_min == pytest.approx(-1)
    assert fidelity.cosine_p1 == pytest.approx(-1 + 2 * 0.19, abs=1e-5)
    assert fidelity.cosine_p50 == pytest.approx(1)
    assert (fidelity.ndcg_reference, fidelity.ndcg) == (1, 0.95)


@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_lowered(family: str, precision: str) -> None:
    """Without it the choice of products could know BERT's names only."""
    encoder = tiny_family(family, layers=2)
    model = lower_graph(trace(encoder, INPUTS, OUTPUT), precision, encoder.tokenizer(CALIBRATION, "query"))
    card = replace(encoder.card, precision=precision)
    vectors = OnnxEncoder(open_session(model, 1), encoder.tokenizer, card).encode(TEXTS, "query")
    cosines = (vectors * encoder.encode(TEXTS, "query")).sum(axis=1)
    assert 0.9 < cosines.min() < 1


def test_what_cannot_be_lowered_is_refused(source: TorchEncoder, probes: Probes) -> None:
    """Without it onnxruntime takes an empty list of nodes for all of them, and no texts for a range of nothing."""
    static = build_student(source, StudentSpec(kind="static"), source.card)
    with pytest.raises(RecipeError, match="no product with weights for int8-dynamic; use fp32"):
        lower_graph(trace(static, INPUTS, OUTPUT), "int8-dynamic", [])
    plain = trace(source, INPUTS, OUTPUT)
    with pytest.raises(DataError, match="int8-static needs texts to calibrate on"):
        lower_graph(plain, "int8-static", [])
    documents = TorchEncoder(source.body, None, source.tokenizer_files, replace(source.card, role="document"))
    with pytest.raises(RecipeError, match="int8-dynamic is for queries alone; export documents as fp32"):
        lowered(plain, documents, ExportSpec(precision="int8-dynamic"), probes, [])


def test_lowering_is_silent_and_repeats_itself(
    source: TorchEncoder, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Without it an export made twice has two fingerprints, and advice meant for others fills the screen."""
    plain = trace(source, INPUTS, OUTPUT)
    rows = source.tokenizer(CALIBRATION, "query")
    for precision in INT8:
        assert lower_graph(plain, precision, rows) == lower_graph(plain, precision, rows)
    captured = capfd.readouterr()
    assert (captured.out, captured.err, caplog.records) == ("", "", [])
