"""Students of every kind through the stages of a recipe: cut once, trained, exported, in their space."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_encoder, tiny_overrides

from retrieval_kd.encoders.card import EncoderCard, require_same_space
from retrieval_kd.encoders.pair import open_pair
from retrieval_kd.errors import RecipeError
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


def test_separate_towers_train_apart_into_one_space_and_stages_go_on_from_both(tiny: Path, tmp_path: Path) -> None:
    """Without it both sides could be one encoder under two names, or documents be encoded by the query tower."""
    stages = "stages=[{name: one}, {name: two}]"
    overrides = [*tiny_overrides(tiny, "symmetric"), "student.towers=separate", stages]
    workspace = Workspace(load_recipe("leaf", overrides), tiny / "artifacts")
    start = workspace.untrained_student().card.weights_hash
    cards = []
    for stage in workspace.training:
        query, document = stage.encoder.card, stage.document_encoder.card
        assert (query.role, document.role) == ("query", "document")
        require_same_space(query, document)
        assert document.space_fingerprint == document.fingerprint
        cards += [query, document]
        documents = workspace.documents_for(stage.encoder)
        assert documents.card == document
    assert len({start, *(card.weights_hash for card in cards)}) == 5
    rows = [json.loads(line) for line in (workspace.last.folder / "metrics.jsonl").read_text().splitlines()]
    best = max(row["nDCG@10"] for row in rows if row["event"] == "dev" and row["step"] > 0)
    workspace.last.save_pair(tmp_path)
    query, document = open_pair(tmp_path)
    assert (query.card, document.card) == tuple(cards[2:])
    # What picked the checkpoint is the query encoder over the document encoder's vectors.
    assert workspace.dev_set.ndcg_at_10(query, document) == pytest.approx(best)


def test_pair_of_one_encoder_is_refused_and_of_a_query_student_has_the_recipes_encoder(
    tiny: Path, tmp_path: Path
) -> None:
    """Without it a symmetric student would be written twice, and an asymmetric one beside other documents."""
    symmetric = Workspace(load_recipe("leaf", tiny_overrides(tiny, "symmetric")), tiny / "artifacts")
    with pytest.raises(RecipeError, match=r"one encoder has both sides; .* is a sentence-transformers model as it is"):
        symmetric.last.save_pair(tmp_path)
    asymmetric = Workspace(load_recipe("leaf", tiny_overrides(tiny, "asymmetric")), tiny / "artifacts")
    asymmetric.last.save_pair(tmp_path)
    query, document = open_pair(tmp_path)
    assert query.card == asymmetric.last.encoder.card
    assert document.card.fingerprint == asymmetric.encoder.card.fingerprint
    with pytest.raises(RecipeError, match=r"student\.towers: asymmetric mode has a document encoder already"):
        load_recipe("leaf", [*tiny_overrides(tiny, "asymmetric"), "student.towers=separate"])


@pytest.mark.parametrize("mode", ["asymmetric", "symmetric"])
def test_student_of_another_start_learns_the_encoders_space(tiny: Path, tmp_path: Path, mode: str) -> None:
    """Without it only an encoder small enough to be cut could have a student, and a start's prefix would be lost."""
    wide = tiny_encoder(seed=3, width=24)
    wide.save(tmp_path / "wide")
    start = f"student.start={{model: {tmp_path / 'wide'}, max_length: 20, query_prefix: 'w1 '}}"
    overrides = [*tiny_overrides(tiny, mode), start]
    workspace = Workspace(load_recipe("leaf", overrides), tiny / "artifacts")
    targets = workspace.query_vectors
    texts = list(workspace.training_queries.values())
    rows = [targets.row_of[query_id] for query_id in workspace.training_queries]
    fitted = workspace.untrained_student().encode(texts, "query")
    assert (fitted * targets.vectors[rows]).sum(axis=1).mean() > 0.95
    log = [json.loads(line) for line in (workspace.last.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if row["event"] == "train"]
    assert sum(losses[-4:]) < sum(losses[:4])
    card = workspace.student.card
    assert (card.query_prefix, card.max_length, card.dimension) == ("w1 ", 20, workspace.encoder.card.dimension)
    assert (card.space_fingerprint == workspace.encoder.card.fingerprint) is (mode == "asymmetric")
    if mode == "asymmetric":
        workspace.last.save_pair(tmp_path / "pair")
        query, document = open_pair(tmp_path / "pair")
        assert (query.card, document.card) == (EncoderCard.load(workspace.last.folder), workspace.start.card)


def test_artifacts_of_another_start_are_others(tiny: Path, tmp_path: Path) -> None:
    """A student found by a fingerprint that forgets its start would be another model's."""
    folders = set()
    for seed in (None, 3, 4):
        overrides = tiny_overrides(tiny, "asymmetric")
        if seed is not None:
            tiny_encoder(seed=seed, width=24).save(tmp_path / str(seed) / "same-name")
            overrides.append(f"student.start.model={tmp_path / str(seed) / 'same-name'}")
        workspace = Workspace(load_recipe("leaf", overrides), tiny / "artifacts")
        folders |= {workspace.cut, workspace.last.folder}
    assert len(folders) == 6


def test_layers_cannot_be_aligned_with_those_of_another_encoder(tiny: Path, tmp_path: Path) -> None:
    """The layers that a student was cut from would be looked for in a model that never had them."""
    overrides = [*tiny_overrides(tiny, "asymmetric"), f"student.start.model={tmp_path}"]
    with pytest.raises(RecipeError, match=r"student\.start: layer_alignment"):
        load_recipe("lead", overrides)
