"""Students of every kind through the stages of a recipe: cut once, trained, exported, in their space."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_overrides

from retrieval_kd.encoders.card import EncoderCard, require_same_space
from retrieval_kd.recipes.loader import load_recipe
from retrieval_kd.stages import Workspace


@pytest.mark.parametrize("mode", ["asymmetric", "symmetric"])
def test_static_student_of_the_corpus_vocabulary_learns(tiny: Path, mode: str) -> None:
    """Without it the loop, the export or the dev set could know transformers only."""
    overrides = [*tiny_overrides(tiny, mode), f"student={{mode: {mode}, kind: static, vocabulary: corpus}}"]
    workspace = Workspace(load_recipe("leaf", overrides), tiny / "artifacts")
    rows = [json.loads(line) for line in (workspace.last.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    assert sum(losses[-4:]) < sum(losses[:4])
    card = workspace.student.card
    assert (card.architecture, card.layers) == ("static", 0)
    assert card == EncoderCard.load(workspace.last.folder)
    assert (card.space_fingerprint == workspace.encoder.card.fingerprint) is (mode == "asymmetric")


def test_student_is_cut_once(tiny: Path) -> None:
    """Without it a static student would encode its whole vocabulary again for each stage that starts from it."""
    said: list[str] = []
    overrides = [*tiny_overrides(tiny, "asymmetric"), "student={kind: static, matryoshka: [8]}"]
    workspace = Workspace(load_recipe("leaf", overrides), tiny / "artifacts", said.append)
    first, second = workspace.untrained_student(), workspace.untrained_student()
    assert first is not second
    assert first.card == second.card
    assert [sentence for sentence in said if "cut" in sentence] == ["cut the student out of tiny-encoder"]


@pytest.mark.parametrize("mode", ["asymmetric", "symmetric"])
def test_precision_of_the_recipe_answers_queries_over_fp32_documents(tiny: Path, mode: str) -> None:
    """Without it a query encoder of int8 would be asked for documents, or served beside another space."""
    overrides = [*tiny_overrides(tiny, mode), "export={precision: int8-dynamic, max_ndcg_loss: 0.5}"]
    workspace = Workspace(load_recipe("leaf", overrides), tiny / "artifacts")
    card = workspace.student.card
    assert (card.precision, card.role, card.max_batch) == ("int8-dynamic", "query", 1)
    assert card.fidelity is not None
    # All of dev, and not the probes of the fp32 gate alone.
    assert card.fidelity.queries == 12
    assert workspace.last.encoder.card.precision == "fp32"
    documents = workspace.documents_for(workspace.student)
    require_same_space(card, documents.card)
    assert documents.card.precision == "fp32"
