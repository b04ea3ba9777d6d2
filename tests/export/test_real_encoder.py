"""MiniLM on real text: the claims that are made of a product, not of a toy."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.export.onnx_export import Probes, export_encoder
from retrieval_kd.recipes.schema import EncoderSpec, ExportSpec, StudentSpec
from retrieval_kd.students.build import build_student

pytestmark = pytest.mark.slow


def read(path: Path, count: int) -> dict[str, str]:
    with path.open(encoding="utf-8") as lines:
        return {row["_id"]: row["text"] for row in map(json.loads, islice(lines, count))}


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[str]:
    beir = shared / "data" / "beir"
    return [
        *read(beir / "scifact" / "corpus.jsonl", 12).values(),
        *read(beir / "msmarco-12k" / "corpus.jsonl", 24).values(),
        *read(beir / "scifact" / "queries.jsonl", 30).values(),
    ]


@pytest.fixture(scope="module")
def minilm() -> TorchEncoder:
    return TorchEncoder.load(EncoderSpec())


@pytest.fixture(scope="module")
def exported(minilm: TorchEncoder, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scifact = shared / "data" / "beir" / "scifact"
    documents = read(scifact / "corpus.jsonl", 12)
    queries = read(scifact / "queries.jsonl", 5)
    qrels = {query_id: {next(iter(documents)): 1} for query_id in queries}
    folder = tmp_path_factory.mktemp("minilm")
    export_encoder(minilm, folder, ExportSpec(), Probes(queries, documents, qrels))
    return folder


def test_real_texts_have_the_same_bits_in_any_company(exported: Path, texts: list[str]) -> None:
    """Rule of the house: one code path gives a text its vector, alone or in a batch, for fp32."""
    encoder = OnnxEncoder.load(exported, threads=2)
    together = encoder.encode(texts, "document")
    assert np.array_equal(np.concatenate([encoder.encode([text], "document") for text in texts]), together)
    rng = np.random.default_rng([5, 1])
    for size in (2, 9, 40):
        chosen = rng.choice(len(texts), size=size, replace=False)
        assert np.array_equal(encoder.encode([texts[i] for i in chosen], "document"), together[chosen])
    single = OnnxEncoder.load(exported, threads=1)
    assert np.array_equal(single.encode(texts[-30:], "document"), together[-30:])


def test_sentence_transformers_gives_the_same_vectors(
    minilm: TorchEncoder, texts: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A student must open in the field's own library, with its prefixes and length, and without alarms."""
    from sentence_transformers import SentenceTransformer

    student = build_student(minilm, StudentSpec(layers=(0, 2, 5), projection=True), minilm.card).eval()
    student.save(tmp_path)
    capfd.readouterr()
    model = SentenceTransformer(str(tmp_path), device="cpu")
    assert "MISSING" not in capfd.readouterr().err
    assert model.max_seq_length == 256
    chosen = [*texts[:4], *texts[-4:]]
    expected = student.encode(chosen, "query")
    np.testing.assert_allclose(model.encode(chosen, show_progress_bar=False), expected, atol=1e-6)
    np.testing.assert_allclose(model.encode_query(chosen, show_progress_bar=False), expected, atol=1e-6)


def test_loaded_encoder_gives_sentence_transformers_vectors(minilm: TorchEncoder, texts: list[str]) -> None:
    """Reading its folder without the library must not change what the folder means."""
    from sentence_transformers import SentenceTransformer

    from retrieval_kd.encoders.resolve import resolve_model

    chosen = [*texts[:4], *texts[-4:]]
    model = SentenceTransformer(str(resolve_model("all-MiniLM-L6-v2")), device="cpu")
    published = model.encode(chosen, show_progress_bar=False)
    np.testing.assert_allclose(minilm.encode(chosen, "document"), published, atol=1e-6)
