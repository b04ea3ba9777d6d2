"""The serving encoder: damaged folders, threads, order, and no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny import WORDS, tiny_encoder

from retrieval_kd.artifacts import write_json
from retrieval_kd.encoders.onnx import OnnxEncoder, open_session
from retrieval_kd.errors import ArtifactError
from retrieval_kd.export.onnx_export import Probes, export_encoder
from retrieval_kd.recipes.schema import ExportSpec

RNG = np.random.default_rng([3, 1])
TEXTS = [" ".join(RNG.choice(WORDS, size=RNG.integers(0, 30))) for _ in range(60)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "encoder"
    export_encoder(tiny_encoder(), folder, ExportSpec(), Probes({"q": "w1"}, {"d": "w2"}, {"q": {"d": 1}}))
    return folder


@pytest.fixture(scope="module")
def encoder(exported: Path) -> OnnxEncoder:
    return OnnxEncoder.load(exported, threads=1)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "card.json"])
def test_changed_byte_is_refused(name: str, exported: Path, tmp_path: Path) -> None:
    """A flipped bit in the weights gives plausible vectors."""
    copied = Path(shutil.copytree(exported, tmp_path / "copy"))
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: bytes differ from the manifest"):
        OnnxEncoder.load(copied)


def test_torn_missing_and_foreign_folders_are_refused(exported: Path, tmp_path: Path) -> None:
    """Only a finished export is an encoder."""
    copied = Path(shutil.copytree(exported, tmp_path / "copy"))
    content = (copied / "model.onnx").read_bytes()
    (copied / "model.onnx").write_bytes(content[:-10])
    with pytest.raises(ArtifactError, match=r"model.onnx: \d+ bytes, the manifest says"):
        OnnxEncoder.load(copied)
    (copied / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx: named in the manifest but missing"):
        OnnxEncoder.load(copied)
    (copied / "model.onnx").write_bytes(content)
    write_json(copied / "manifest.json", {**json.loads((copied / "manifest.json").read_text()), "stage": "train"})
    with pytest.raises(ArtifactError, match="made by stage 'train', expected 'export'"):
        OnnxEncoder.load(copied)
    (copied / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest.json"):
        OnnxEncoder.load(copied)


def test_graph_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    """Onnxruntime's own message is a screen of C++."""
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="onnxruntime cannot run it") as caught:
        open_session(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)


def test_rows_come_in_the_order_of_the_texts(encoder: OnnxEncoder) -> None:
    """Batches are sorted by length; the output must not be."""
    expected = tiny_encoder().encode(TEXTS, "document")
    np.testing.assert_allclose(encoder.encode(TEXTS, "document"), expected, atol=1e-5)
    assert np.array_equal(encoder.encode(TEXTS[::-1], "document"), encoder.encode(TEXTS, "document")[::-1])


def test_no_texts_give_no_rows(encoder: OnnxEncoder) -> None:
    """An empty request is not an error."""
    assert encoder.encode([], "query").shape == (0, 16)
    assert encoder.tokenize([], "query") == []


def test_encode_is_tokenize_then_run(encoder: OnnxEncoder) -> None:
    """The server times the halves apart; they must be the whole."""
    rows = encoder.tokenize(TEXTS, "query")
    assert np.array_equal(encoder.run(rows), encoder.encode(TEXTS, "query"))


def test_progress_counts_every_text_once(encoder: OnnxEncoder) -> None:
    """A bar that stops at 90 % looks like a hang."""
    counts: list[int] = []
    encoder.encode(TEXTS, "query", counts.append)
    assert sum(counts) == len(TEXTS)
    counts.clear()
    encoder.encode(TEXTS[:1], "query", counts.append)
    assert counts == [1]


def test_threads_do_not_disturb_each_other(encoder: OnnxEncoder) -> None:
    """A server calls from several threads at once."""
    expected = encoder.encode(TEXTS, "query")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: encoder.encode(TEXTS, "query"), range(16)))
    assert all(np.array_equal(result, expected) for result in results)


def test_bits_do_not_depend_on_the_number_of_threads(exported: Path, encoder: OnnxEncoder) -> None:
    """An index built with sixteen threads is queried with one."""
    assert np.array_equal(OnnxEncoder.load(exported, threads=2).encode(TEXTS, "query"), encoder.encode(TEXTS, "query"))


def test_serving_imports_no_torch(exported: Path) -> None:
    """A serving install has none; an import that creeps in breaks it on start."""
    code = (
        "import sys; from pathlib import Path; from retrieval_kd.encoders.onnx import OnnxEncoder;"
        "OnnxEncoder.load(Path(sys.argv[1]), 1).encode(['w1 w2'], 'query');"
        "sys.exit(', '.join({'torch', 'transformers', 'sentence_transformers', 'onnx'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(exported)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
