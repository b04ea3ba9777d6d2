"""An exported reranker scores like the cross-encoder it came from, without torch, or is not exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import WORDS, tiny_cross_encoder_folder

import retrieval_kd.export.reranker_export as reranker_export
from retrieval_kd.errors import ArtifactError, DataError, ParityError
from retrieval_kd.export.reranker_export import export_reranker
from retrieval_kd.teachers.cross_encoder import CrossEncoder
from retrieval_kd.teachers.onnx_reranker import OnnxReranker

QUERY = "w1 w2"
TEXTS = ["w1 w2 w3", "", " ".join(WORDS), "w9", "w1 w9 w2 w8"]
PAIRS = [(QUERY, text) for text in TEXTS]


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("template", ["", "w5 {query} w6 {document}"])
def test_scores_are_those_of_torch(tmp_path: Path, labels: int, template: str) -> None:
    """Without it a server's second stage would rank otherwise than the teacher that was evaluated."""
    folder = tiny_cross_encoder_folder(tmp_path / "model", labels=labels)
    export_reranker(folder, 24, template, PAIRS, tmp_path / "exported")
    exported = OnnxReranker.load(tmp_path / "exported")
    activation = "identity" if labels == 1 else "logit_difference"
    teacher = CrossEncoder.load(str(folder), 24, template, activation)  # type: ignore[arg-type]
    scores = exported.score(QUERY, TEXTS)
    assert scores.dtype == np.float32
    assert np.ptp(scores) > 0.01
    np.testing.assert_allclose(scores, teacher.score(PAIRS), atol=1e-5)
    alone = np.array([exported.score(QUERY, [text])[0] for text in TEXTS])
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    assert exported.score(QUERY, []).shape == (0,)


def test_length_and_template_are_part_of_the_identity(tmp_path: Path) -> None:
    """Without it a reply's fingerprint would not say which scores it came from."""
    folder = tiny_cross_encoder_folder(tmp_path / "model")
    prints = set()
    for i, (length, template) in enumerate([(24, ""), (16, ""), (24, "{query} {document}")]):
        export_reranker(folder, length, template, PAIRS, tmp_path / str(i))
        prints.add(OnnxReranker.load(tmp_path / str(i)).fingerprint)
    assert len(prints) == 3


def test_a_graph_that_differs_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a fusion gone wrong would be served."""
    folder = tiny_cross_encoder_folder(tmp_path / "model")
    make = reranker_export.classifier_graph

    def spoiled(*arguments: object) -> object:
        graph = make(*arguments)  # type: ignore[arg-type]
        for weights in graph.graph.initializer:
            if weights.name.endswith("classifier.bias"):
                weights.raw_data = np.float32([1.0]).tobytes()
        return graph

    monkeypatch.setattr(reranker_export, "classifier_graph", spoiled)
    with pytest.raises(ParityError, match="logit of query 'w1 w2' differs from torch by"):
        export_reranker(folder, 24, "", PAIRS, tmp_path / "exported")
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        OnnxReranker.load(tmp_path / "exported")
    with pytest.raises(DataError, match="no pair to compare"):
        export_reranker(folder, 24, "", [], tmp_path / "exported")


def test_torn_and_wrong_files_are_named(tmp_path: Path) -> None:
    """Without it half a graph, or a card of another shape, would end in a trace while serving."""
    folder = tiny_cross_encoder_folder(tmp_path / "model")
    export_reranker(folder, 24, "", PAIRS, tmp_path / "exported")
    model = tmp_path / "exported" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[100] ^= 1
    model.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"model\.onnx: bytes differ"):
        OnnxReranker.load(tmp_path / "exported")
    from retrieval_kd.teachers.onnx_reranker import RerankerCard

    (tmp_path / "reranker.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(ArtifactError, match=r"reranker\.json: not a reranker's card"):
        RerankerCard.load(tmp_path)


def test_the_reranker_loads_no_torch() -> None:
    """Without it a server with a second stage would need gigabytes of torch."""
    script = "import retrieval_kd.teachers.onnx_reranker, sys; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
