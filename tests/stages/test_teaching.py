"""A teacher of any members: each one's own scores, and the mean that the recipe names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_cross_encoder_folder, tiny_overrides

from retrieval_kd.artifacts import Artifact
from retrieval_kd.errors import DataError, RecipeError
from retrieval_kd.recipes.loader import load_recipe
from retrieval_kd.runs import Scores
from retrieval_kd.scores.normalise import activate, normalise
from retrieval_kd.scores.preferences import aggregated
from retrieval_kd.stages import Workspace


def workspace_with(tiny: Path, teacher: str) -> Workspace:
    """Return a workspace of a tiny recipe with this teacher."""
    overrides = [item for item in tiny_overrides(tiny, "asymmetric") if not item.startswith("teacher.")]
    return Workspace(load_recipe("margin_mse", [*overrides, f"teacher={teacher}"]), tiny / "artifacts")


@pytest.fixture
def run_file(tiny: Path, tmp_path: Path) -> tuple[Path, list[Scores]]:
    """Return a TREC run over the candidates, scored at random, and its scores."""
    lists = workspace_with(tiny, "{members: [{kind: bi_encoder}]}").last.candidates
    draw = np.random.default_rng([3])
    scores = [draw.normal(size=len(item.doc_ids)).astype(np.float32) for item in lists]
    path = tmp_path / "made-elsewhere.trec"
    path.write_text(
        "".join(
            f"{item.query_id} Q0 {doc_id} 1 {score:.9g} x\n"
            for item, values in zip(lists, scores, strict=True)
            for doc_id, score in zip(item.doc_ids, values, strict=True)
        )
    )
    return path, scores


def test_members_are_weighed_and_normalised(tiny: Path, run_file: tuple[Path, list[Scores]]) -> None:
    """Without it a member could be left out, or one's weight be another's and nobody would see it."""
    path, run = run_file
    members = f"[{{kind: bi_encoder, weight: 3}}, {{kind: run, path: {path}}}]"
    workspace = workspace_with(tiny, f"{{normalise: minmax, members: {members}}}")
    stage = workspace.last
    vectors = workspace.encoder_scores(stage.candidates, workspace.encoder, workspace.training_queries)
    for got, encoder, score in zip(stage.teacher_scores, vectors, run, strict=True):
        expected = 0.75 * normalise(encoder, "minmax") + 0.25 * normalise(score, "minmax")
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert stage.teacher.titles == ("bi-encoder", "run")


def test_raw_logits_of_cross_encoders_are_averaged(tiny: Path, run_file: tuple[Path, list[Scores]]) -> None:
    """Without it Margin-MSE's teacher, the mean of three cross-encoders' logits, could not be named."""
    path, run = run_file
    models = [tiny_cross_encoder_folder(path.parent / name, seed) for seed, name in enumerate("ab")]
    cross = [f"{{kind: cross_encoder, model: {model}, max_length: 48}}" for model in models]
    alone = [workspace_with(tiny, f"{{normalise: none, members: [{one}]}}").last.teacher_scores for one in cross]
    members = f"[{', '.join(cross)}, {{kind: run, path: {path}, weight: 2}}]"
    mean = workspace_with(tiny, f"{{normalise: none, members: {members}}}").last.teacher_scores
    for got, a, b, of_run in zip(mean, *alone, run, strict=True):
        np.testing.assert_allclose(got, (a + b + 2 * of_run) / 4, atol=1e-6)


def test_a_dead_member_is_named_before_training(tiny: Path, run_file: tuple[Path, list[Scores]]) -> None:
    """Without it a member that prefers nothing would be averaged in, and neither the log nor the manifest say so."""
    path, _ = run_file
    dead = path.with_name("dead.trec")
    dead.write_text(re.sub(r"\S+ x\n", "0.5 x\n", path.read_text()))
    members = f"members: [{{kind: run, path: {path}}}, {{kind: run, path: {dead}}}]"
    overrides = [item for item in tiny_overrides(tiny, "asymmetric") if not item.startswith("teacher.")]
    recipe = load_recipe("margin_mse", [*overrides, f"teacher={{{members}}}", "schedule.epochs=1"])
    (line,) = Artifact.load(Workspace(recipe, tiny / "artifacts").last.folder).summary["warnings"]
    assert line.startswith("teacher member run dead: all scores equal in 48 of 48 lists")
    with pytest.raises(DataError, match=r"member run dead: 1st and 99th percentile of the scores are both 0\.5"):
        _ = workspace_with(tiny, f"{{normalise: percentile, {members}}}").last.teacher_scores


def test_members_of_one_name_are_told_apart(tiny: Path, run_file: tuple[Path, list[Scores]]) -> None:
    """Without it the second of two files of one name would take the first one's place in the mean."""
    path, scores = run_file
    other = path.parent / "other" / path.name
    other.parent.mkdir()
    other.write_text(re.sub(r"\S+ x\n", "0.5 x\n", path.read_text()))
    stage = workspace_with(tiny, f"{{members: [{{kind: run, path: {path}}}, {{kind: run, path: {other}}}]}}").last
    assert stage.teacher.titles == ("run made-elsewhere (1)", "run made-elsewhere (2)")
    for got, of_first in zip(stage.teacher_scores, scores, strict=True):
        np.testing.assert_allclose(got, normalise(of_first, "zscore") / 2, atol=1e-6)


def test_the_activation_of_a_file_is_applied(tiny: Path, run_file: tuple[Path, list[Scores]]) -> None:
    """Without it a store's logits would be learned as they are, whatever the recipe says."""
    path, run = run_file
    member = f"{{kind: scores, path: {path}, activation: sigmoid}}"
    stage = workspace_with(tiny, f"{{normalise: none, members: [{member}]}}").last
    assert all(map(np.array_equal, stage.teacher_scores, [activate(scores, "sigmoid") for scores in run]))


def test_the_fingerprint_names_members_weights_and_scale(tiny: Path, run_file: tuple[Path, list[Scores]]) -> None:
    """Without it a student trained on another mean of teachers would be taken for this one's."""
    path, _ = run_file
    pair = f"members: [{{kind: bi_encoder, weight: WEIGHT}}, {{kind: run, path: {path}}}]"
    texts = [
        f"{{{pair.replace('WEIGHT', '1')}}}",
        f"{{{pair.replace('WEIGHT', '2')}}}",
        f"{{normalise: rank, {pair.replace('WEIGHT', '1')}}}",
        f"{{members: [{{kind: run, path: {path}}}]}}",
        f"{{members: [{{kind: scores, path: {path}, activation: sigmoid}}]}}",
    ]
    prints = [workspace_with(tiny, text).last.teacher.fingerprint for text in texts]
    assert len(set(prints)) == len(prints)
    before = workspace_with(tiny, texts[0]).last.teacher.fingerprint
    path.write_text(path.read_text().replace(" x\n", " y\n", 1))
    assert workspace_with(tiny, texts[0]).last.teacher.fingerprint != before


def test_the_short_form_is_an_ensemble_of_two(tiny: Path) -> None:
    """Without it ``--set teacher.model=`` could come to mean something else than its members written out."""
    short = workspace_with(tiny, f"{{max_length: 48, fine_tune: {{start: {tiny / 'tiny-encoder'}, batch_queries: 8}}}}")
    long = workspace_with(
        tiny,
        f"{{members: [{{kind: cross_encoder, weight: 2, max_length: 48, fine_tune: {{start: {tiny / 'tiny-encoder'}, "
        "batch_queries: 8}}, {kind: bi_encoder, weight: 2}]}",
    )
    assert all(map(np.array_equal, short.last.teacher_scores, long.last.teacher_scores))
    assert short.last.teacher.members[0].folder == long.last.teacher.members[0].folder
    assert short.last.teacher.titles == ("cross-encoder", "bi-encoder")


def test_pairs_that_a_run_lacks_are_counted(tiny: Path, run_file: tuple[Path, list[Scores]]) -> None:
    """Without it candidates outside a run would be learned as zero, or as not there."""
    path, _ = run_file
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[4:]))
    stage = workspace_with(tiny, f"{{members: [{{kind: run, path: {path}}}]}}").last
    with pytest.raises(DataError, match=rf"4 of {len(lines)} pairs have no score \(query '.*, \.\.\.\); score these"):
        _ = stage.teacher_scores


def test_a_pairwise_member_gives_scores_and_preferences(tiny: Path) -> None:
    """Without it losses over pairs would have no teacher, or the list losses another one than they."""
    member = (
        f"{{kind: pairwise, max_length: 64, aggregation: copeland, fine_tune: {{start: {tiny / 'tiny-encoder'}, "
        "batch_queries: 8}}"
    )
    stage = workspace_with(tiny, f"{{normalise: none, members: [{member}]}}").last
    preferences = stage.teacher.preferences(stage.candidates)
    for item, matrix, scores in zip(stage.candidates, preferences, stage.teacher_scores, strict=True):
        assert matrix.shape == (len(item.doc_ids),) * 2
        np.testing.assert_allclose((matrix + matrix.T)[~np.eye(len(matrix), dtype=bool)], 1, atol=1e-6)
        np.testing.assert_array_equal(scores, aggregated(matrix, "copeland"))
    with pytest.raises(RecipeError, match="no member compares documents"):
        workspace_with(tiny, "{members: [{kind: bi_encoder}]}").last.teacher.preferences(stage.candidates)


def test_a_file_of_preferences_has_to_speak_of_every_candidate(tiny: Path, tmp_path: Path) -> None:
    """Without it a document that was never compared would be scored as if it were average."""
    lists = workspace_with(tiny, "{members: [{kind: bi_encoder}]}").last.candidates
    rows = [(item.query_id, item.doc_ids[0], doc_id, 0.9) for item in lists for doc_id in item.doc_ids[1:]]
    path = tmp_path / "p.parquet"
    teacher = f"{{normalise: none, members: [{{kind: pairwise, path: {path}}}]}}"
    names = ("query_id", "doc_i", "doc_j", "p")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path)
    scores = workspace_with(tiny, teacher).last.teacher_scores
    assert all(values[0] == pytest.approx(0.9) and values[1:] == pytest.approx(0.1) for values in scores)
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows[2:], strict=True)), strict=True))), path)
    with pytest.raises(DataError, match=r"2 of \d+ candidates are in no comparison \(query '"):
        _ = workspace_with(tiny, teacher).last.teacher_scores


def test_drawn_comparisons_have_to_speak_of_every_candidate(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a draw that leaves documents out would score them as if they were average."""
    monkeypatch.setattr("retrieval_kd.teachers.scoring._drawn", lambda pairs, documents, wanted, _: pairs[:1])
    made = f"fine_tune: {{start: {tiny / 'tiny-encoder'}, batch_queries: 8}}"
    member = f"{{kind: pairwise, max_length: 64, comparisons: 4, {made}}}"
    stage = workspace_with(tiny, f"{{normalise: none, members: [{member}]}}").last
    with pytest.raises(DataError, match=r"compare-\w+: 96 of 192 candidates are in no comparison \(query '"):
        _ = stage.teacher_scores


def test_a_student_learns_from_preferences(tiny: Path) -> None:
    """Without it a recipe could name a loss over pairs that no stage feeds."""
    member = (
        f"{{kind: pairwise, max_length: 64, aggregation: copeland, fine_tune: {{start: {tiny / 'tiny-encoder'}, "
        "batch_queries: 8}}"
    )
    overrides = [item for item in tiny_overrides(tiny, "asymmetric") if not item.startswith("teacher.")]
    losses = "losses=[{name: pair_distill}]"
    recipe = load_recipe("margin_mse", [*overrides, f"teacher={{normalise: none, members: [{member}]}}", losses])
    stage = Workspace(recipe, tiny / "artifacts").last
    rows = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    values = [row["loss"] for row in rows if row["event"] == "train"]
    assert sum(values[-4:]) < sum(values[:4])


def test_a_late_interaction_member_scores_lists_and_batches(tiny: Path) -> None:
    """Without it TCT's recipe would learn from the lists alone, or from the scores of another query's documents."""
    members = f"members: [{{kind: late_interaction, model: {tiny / 'tiny-encoder'}, max_length: 32}}]"
    overrides = [item for item in tiny_overrides(tiny, "symmetric") if not item.startswith("teacher.")]
    losses = "losses=[{name: tct, teacher: late_interaction}]"
    recipe = load_recipe("margin_mse", [*overrides, f"teacher={{normalise: none, {members}}}", losses])
    stage = Workspace(recipe, tiny / "artifacts").last
    item, scores = stage.candidates[3], stage.teacher_scores[3]
    matrix = stage._maxsim()([stage.candidates[0].query_id, item.query_id], item.doc_ids)
    np.testing.assert_allclose(matrix[1], scores, atol=1e-4)
    rows = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    values = [row["loss"] for row in rows if row["event"] == "train"]
    assert sum(values[-4:]) < sum(values[:4])


def test_a_live_loss_needs_its_teacher() -> None:
    """Without it a recipe would train for a step and then fail on a tensor that is not there."""
    with pytest.raises(RecipeError, match="tct learn from a late-interaction model; name one in teacher"):
        load_recipe("margin_mse", ["losses=[{name: tct, teacher: late_interaction}]"])


def test_a_member_can_be_a_smaller_cross_encoder(tiny: Path) -> None:
    """Without it the larger model would score on, however small a teacher the recipe asks for."""
    start = f"fine_tune: {{start: {tiny / 'tiny-encoder'}, batch_queries: 8}}"
    compress = (
        "compress: {layers: [1], stages: [{target: hidden, batch_queries: 8}, {target: logits, batch_queries: 8}]}"
    )
    large = workspace_with(tiny, f"{{max_length: 48, {start}}}").last.teacher.members[0]
    stage = workspace_with(tiny, f"{{max_length: 48, {start}, {compress}}}").last
    small = stage.teacher.members[0]
    assert small.reranker.parameters < large.reranker.parameters
    assert small.fingerprint != large.fingerprint
    made = [Artifact.load(path) for path in (tiny / "artifacts").glob("compress-*")]
    assert sorted(artifact.config["stage"]["target"] for artifact in made) == ["hidden", "logits"]
    assert small.folder in [artifact.path for artifact in made if artifact.config["stage"]["target"] == "logits"]
    assert all(np.isfinite(scores).all() for scores in stage.teacher_scores)
