"""The exported encoder: the same vectors, the same bits in any company, and nothing half-written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny import WORDS, tiny_encoder
from tiny_bodies import FAMILIES, tiny_family

from retrieval_kd.artifacts import Artifact
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.onnx import OnnxEncoder, open_session
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import ArtifactError, EncoderMismatch, ParityError
from retrieval_kd.export.onnx_export import Probes, export_encoder
from retrieval_kd.recipes.schema import ExportSpec, StudentSpec
from retrieval_kd.students.build import build_student

RNG = np.random.default_rng([7, 1])
DOCUMENTS = {f"d{i}": " ".join(RNG.choice(WORDS, size=RNG.integers(1, 30))) for i in range(40)}
QUERIES = {f"q{i}": " ".join(RNG.choice(WORDS, size=RNG.integers(1, 6))) for i in range(10)}
PROBES = Probes(QUERIES, DOCUMENTS, {f"q{i}": {f"d{i}": 1} for i in range(10)})
TEXTS = [*DOCUMENTS.values(), *QUERIES.values(), ""]


@pytest.fixture(scope="module")
def torch_encoder() -> TorchEncoder:
    return tiny_encoder()


@pytest.fixture(scope="module")
def folder(torch_encoder: TorchEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "encoder"
    export_encoder(torch_encoder, folder, ExportSpec(), PROBES)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> OnnxEncoder:
    return OnnxEncoder.load(folder, threads=1)


def operators(folder: Path) -> set[str]:
    return {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}


def test_artifact_is_whole_and_says_what_was_measured(folder: Path, torch_encoder: TorchEncoder) -> None:
    """Whoever serves the folder has nothing else to go by."""
    artifact = Artifact.load(folder, "export")
    artifact.verify()
    assert [entry.path for entry in artifact.files] == ["card.json", "model.onnx", "tokenizer.json"]
    assert 0 < artifact.summary["max_abs_error"] <= 1e-5
    assert (artifact.summary["overlap"], artifact.summary["texts"], artifact.summary["queries"]) == (1, 50, 10)
    assert artifact.summary["ndcg_exported"] == artifact.summary["ndcg_reference"]
    assert EncoderCard.load(folder) == torch_encoder.card


def test_graph_has_the_published_inputs_and_fused_attention(folder: Path) -> None:
    """Other clients run model.onnx by these names; a transformers release can stop the fusions in silence."""
    graph = onnx.load(folder / "model.onnx").graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask"]
    assert {value.type.tensor_type.elem_type for value in graph.input} == {onnx.TensorProto.INT64}
    assert [value.name for value in graph.output] == ["sentence_embedding"]
    assert "Attention" in operators(folder)


def test_padded_call_from_outside_gives_the_same_vectors(folder: Path, torch_encoder: TorchEncoder) -> None:
    """A client in another language pads; the mask must reach attention and pooling."""
    session = open_session(folder / "model.onnx", threads=1)
    row = torch_encoder.tokenizer(["w1 w2 w3"], "query")[0]
    ids = np.array([row + [9] * 7, [2] + [8] * 10 + [3]], dtype=np.int64)
    mask = np.ones_like(ids)
    mask[0, len(row) :] = 0
    vectors = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    np.testing.assert_allclose(vectors[0], torch_encoder.encode(["w1 w2 w3"], "query")[0], atol=1e-6)


def test_vector_does_not_depend_on_its_company(encoder: OnnxEncoder) -> None:
    """A server that batches would otherwise answer the same query differently under load."""
    together = encoder.encode(TEXTS, "document")
    assert together.dtype == np.float32
    alone = np.concatenate([encoder.encode([text], "document") for text in TEXTS])
    assert np.array_equal(together, alone)
    rng = np.random.default_rng([7, 2])
    for size in (2, 3, 7, 25, len(TEXTS)):
        chosen = rng.choice(len(TEXTS), size=size, replace=size > 20)
        assert np.array_equal(encoder.encode([TEXTS[i] for i in chosen], "document"), together[chosen])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_exports_within_the_gate(family: str, tmp_path: Path) -> None:
    """BERT's fusions must not be forced on bodies they do not fit."""
    source = tiny_family(family)
    artifact = export_encoder(source, tmp_path / "out", ExportSpec(), PROBES)
    assert artifact.summary["max_abs_error"] <= 1e-5
    exported = OnnxEncoder.load(tmp_path / "out", threads=1)
    together = exported.encode(TEXTS, "document")
    assert np.array_equal(together, np.concatenate([exported.encode([text], "document") for text in TEXTS]))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_query_student_with_projection_exports(pooling: str, torch_encoder: TorchEncoder, tmp_path: Path) -> None:
    """The projection and the pooling belong into the graph; a query tower is ranked over its teacher's documents."""
    target = replace(torch_encoder.card, dimensions=(24,))
    student = build_student(torch_encoder, StudentSpec(layers=(1,), pooling=pooling), target)
    rng = np.random.default_rng([7, 3])
    vectors = rng.normal(size=(40, 24)).astype(np.float32)
    corpus = EncodedCorpus(sorted(DOCUMENTS), vectors, target, "c", "t")
    student.train()
    artifact = export_encoder(student, tmp_path / "out", ExportSpec(), replace(PROBES, corpus=corpus))
    assert student.training
    assert (artifact.summary["texts"], artifact.summary["queries"]) == (10, 10)
    exported = OnnxEncoder.load(tmp_path / "out", threads=1)
    expected = student.encode(list(QUERIES.values()), "query")
    np.testing.assert_allclose(exported.encode(list(QUERIES.values()), "query"), expected, atol=1e-5)
    with pytest.raises(EncoderMismatch, match="query side only"):
        exported.encode(["w1"], "document")


def test_failed_gate_leaves_nothing(torch_encoder: TorchEncoder, tmp_path: Path) -> None:
    """A model that failed its gate must not be served by whoever finds the folder."""
    with pytest.raises(ParityError, match="the gate allows 1e-12"):
        export_encoder(torch_encoder, tmp_path / "out", ExportSpec(max_abs_error=1e-12), PROBES)
    assert all(path.name.startswith(".") for path in (tmp_path / "out").iterdir())
    with pytest.raises(ArtifactError, match=r"no manifest.json"):
        OnnxEncoder.load(tmp_path / "out")


def test_fused_graph_that_differs_gives_way_to_the_plain_one(
    torch_encoder: TorchEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is made by measured parity, never by a model's name."""
    from retrieval_kd.export import onnx_export

    fuse = onnx_export.fuse

    def spoiled(graph: onnx.ModelProto, config: object) -> onnx.ModelProto:
        other = fuse(graph, config)
        for tensor in other.graph.initializer:
            if len(tensor.dims) == 2:
                values = onnx.numpy_helper.to_array(tensor) * np.float32(1.5)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return other

    monkeypatch.setattr(onnx_export, "fuse", spoiled)
    artifact = export_encoder(torch_encoder, tmp_path / "out", ExportSpec(), PROBES)
    assert artifact.summary["max_abs_error"] <= 1e-5
    assert "Attention" not in operators(tmp_path / "out")


def test_exporting_again_does_nothing_and_changed_weights_export_anew(tmp_path: Path) -> None:
    """A stale export of an earlier checkpoint is the classic wrong number."""
    source = tiny_encoder()
    first = export_encoder(source, tmp_path, ExportSpec(), PROBES)
    changed = (tmp_path / "model.onnx").stat().st_mtime_ns
    assert export_encoder(source, tmp_path, ExportSpec(), PROBES) == first
    assert (tmp_path / "model.onnx").stat().st_mtime_ns == changed
    with torch.no_grad():
        source.body.embeddings.word_embeddings.weight += 0.1
    again = export_encoder(source, tmp_path, ExportSpec(), PROBES)
    assert again.fingerprint != first.fingerprint
    assert OnnxEncoder.load(tmp_path).card == source.card


def test_export_is_silent(
    torch_encoder: TorchEncoder,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A dozen tracer warnings would bury the one line a user should read."""
    export_encoder(torch_encoder, tmp_path / "out", ExportSpec(), PROBES)
    captured = capfd.readouterr()
    assert (captured.out, captured.err, caplog.records) == ("", "", [])
