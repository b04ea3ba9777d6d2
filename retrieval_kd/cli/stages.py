"""``rkd mine | teach | score | train | export``: one stage each, and what it needs before it."""

from __future__ import annotations

from retrieval_kd.cli.common import ARTIFACTS, Artifacts, AsJson, Overrides, RecipeName, emit, open_workspace


def mine(
    recipe: RecipeName, overrides: Overrides = None, artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False
) -> None:
    """Rank the corpus for every training query and draw the candidate lists."""
    lists = open_workspace(recipe, overrides, artifacts).candidates
    emit({"queries": len(lists), "candidates": sum(len(item.doc_ids) for item in lists)}, as_json)


def teach(
    recipe: RecipeName, overrides: Overrides = None, artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False
) -> None:
    """Fine-tune the recipe's cross-encoder teacher, or find the one it names."""
    emit({"teacher": str(open_workspace(recipe, overrides, artifacts).teacher_folder)}, as_json)


def score(
    recipe: RecipeName, overrides: Overrides = None, artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False
) -> None:
    """Score every candidate with the teacher and report spread, ties and a temperature that suits them."""
    from retrieval_kd.scores.inspect import inspect

    emit(inspect(open_workspace(recipe, overrides, artifacts).raw_scores).to_json(), as_json)


def train(
    recipe: RecipeName, overrides: Overrides = None, artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False
) -> None:
    """Train the student; a killed run goes on where it stopped."""
    from retrieval_kd.artifacts import Artifact

    folder = open_workspace(recipe, overrides, artifacts).student_folder
    emit({"student": str(folder), **Artifact.load(folder).summary}, as_json)


def export(
    recipe: RecipeName, overrides: Overrides = None, artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False
) -> None:
    """Export the student to ONNX; nothing is published unless it reproduces torch."""
    from retrieval_kd.artifacts import Artifact

    folder = open_workspace(recipe, overrides, artifacts).student_export
    emit({"encoder": str(folder), **Artifact.load(folder).summary}, as_json)
