"""Two encoders in one folder: the routes of sentence-transformers give our vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_encoder
from tiny_bodies import TEXTS

from retrieval_kd.artifacts import Spec, build
from retrieval_kd.encoders.pair import open_pair, save_pair
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import ArtifactError, EncoderMismatch
from retrieval_kd.recipes.schema import StudentSpec
from retrieval_kd.students.build import build_student

KINDS = {
    "transformer": StudentSpec(layers=(1,), projection=True),
    "static": StudentSpec(kind="static"),
}


def pair(kind: str, prefix: str = "") -> tuple[TorchEncoder, TorchEncoder]:
    base = tiny_encoder()
    card = replace(base.card, document_prefix="w8 w9 ", query_prefix=prefix)
    document = TorchEncoder(base.body, None, base.tokenizer_files, card).eval()
    return build_student(document, KINDS[kind], card).eval(), document


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_sentence_transformers_routes_each_side(kind: str, tmp_path: Path) -> None:
    """Without it an asymmetric student could be used in this library only, or with the documents' prefix."""
    from sentence_transformers import SentenceTransformer

    query, document = pair(kind, prefix="w7 ")
    save_pair(query, document, tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    texts = [text for text in TEXTS if text]
    queries = model.encode_query(texts, show_progress_bar=False)
    documents = model.encode_document(texts, show_progress_bar=False)
    np.testing.assert_allclose(queries, query.encode(texts, "query"), atol=1e-5)
    np.testing.assert_allclose(documents, document.encode(texts, "document"), atol=1e-5)
    assert not np.allclose(queries, documents, atol=1e-3)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_opened_pair_is_the_saved_one(kind: str, tmp_path: Path) -> None:
    """Without it a tower could change on its way to disk."""
    saved = pair(kind)
    save_pair(*saved, tmp_path)
    for before, after in zip(saved, open_pair(tmp_path), strict=True):
        assert before.card == after.card


def test_pairs_of_two_spaces_and_torn_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it two encoders that have nothing in common would make a model that answers at random."""
    query, document = pair("static")
    with pytest.raises(EncoderMismatch, match="cannot search documents encoded by"):
        save_pair(query, tiny_encoder(seed=5), tmp_path / "other")
    with pytest.raises(EncoderMismatch, match="query side only"):
        save_pair(query, query, tmp_path / "other")
    save_pair(query, document, tmp_path)
    (tmp_path / "document" / "card.json").unlink()
    with pytest.raises(ArtifactError, match=r"document.card.json: no such file"):
        open_pair(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TorchEncoder, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_pair(query, document, tmp_path)
    assert not (tmp_path / "modules.json").exists()
    save_pair(query, document, tmp_path)
    assert open_pair(tmp_path)[1].card == document.card


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    """Without it a collection or an exported encoder would get a model's files among its own."""
    query, document = pair("static")
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir" / "corpus.jsonl").write_text("{}")

    def work(folder: Path) -> dict[str, int]:
        (folder / "model.onnx").write_text("graph")
        return {}

    build(tmp_path / "export", Spec("export", {}), work)
    for name, message in (("beir", "not written by retrieval-kd"), ("export", "holds what stage 'export' made")):
        before = {path.name for path in (tmp_path / name).iterdir()} | {".lock"}
        with pytest.raises(ArtifactError, match=f"{name}: .*{message}"):
            save_pair(query, document, tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == before


def test_a_pair_takes_the_place_of_another(tmp_path: Path) -> None:
    """Without it a student that was trained anew could not be written where its first version is."""
    for query, document in (pair("static"), pair("static", prefix="w7 "), pair("static", prefix="w7 ")):
        save_pair(query, document, tmp_path)
        assert open_pair(tmp_path)[0].card == query.card
