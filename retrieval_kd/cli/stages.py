"""``rkd mine | teach | train | export``: one stage each, and what it needs before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_kd.cli.common import ARTIFACTS, Artifacts, AsJson, Overrides, RecipeName, emit, open_workspace

if TYPE_CHECKING:
    from retrieval_kd.stages import Workspace
    from retrieval_kd.stages.training import TrainingStage


def mine(
    recipe: RecipeName, overrides: Overrides = None, artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False
) -> None:
    """Mine every stage's candidates and say what was kept and why; a stage that mines with a student trains it."""
    workspace = open_workspace(recipe, overrides, artifacts)
    _emit_stages(workspace, lambda stage: {"folder": str(stage.mined.path), **stage.mined.summary}, as_json)


def teach(
    recipe: RecipeName, overrides: Overrides = None, artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False
) -> None:
    """Make the members of each stage's teacher, or find those it names."""

    def made(stage: TrainingStage) -> Mapping[str, Any]:
        teacher = stage.teacher
        return {title: str(member.folder) for title, member in zip(teacher.titles, teacher.members, strict=True)}

    _emit_stages(open_workspace(recipe, overrides, artifacts), made, as_json)


def train(
    recipe: RecipeName, overrides: Overrides = None, artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False
) -> None:
    """Train the student through every stage; a killed run goes on where it stopped."""
    from retrieval_kd.artifacts import Artifact

    def trained(stage: TrainingStage) -> Mapping[str, Any]:
        # The folder first: of several processes one makes what it needs, and the others find it there.
        folder = stage.folder
        selected = {} if stage.selected is None else {"selection": stage.selected.summary}
        return {"student": str(folder), **selected, **Artifact.load(folder).summary}

    _emit_stages(open_workspace(recipe, overrides, artifacts), trained, as_json)


def export(
    recipe: RecipeName,
    overrides: Overrides = None,
    precision: Annotated[
        str, typer.Option(help="fp32, int8-dynamic, int8-static or fp16; the recipe's when left out.")
    ] = "",
    pair: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write student and document encoder as one sentence-transformers model."),
    ] = None,
    artifacts: Artifacts = ARTIFACTS,
    as_json: AsJson = False,
) -> None:
    """Export the student, and the cross-encoder that learnt along or taught; what fails its gate is not published."""
    from retrieval_kd.artifacts import Artifact

    chosen = [f"export.precision={precision}"] if precision else []
    workspace = open_workspace(recipe, [*(overrides or ()), *chosen], artifacts)
    stage = workspace.last
    exported = {"encoder": str(stage.served_export), **Artifact.load(stage.served_export).summary}
    if pair is not None:
        stage.save_pair(pair)
        exported["pair"] = str(pair)
    reranker = workspace.reranking.reranker_export
    if reranker is not None:
        exported["reranker"] = {"folder": str(reranker), **Artifact.load(reranker).summary}
    emit(exported, as_json)


def _emit_stages(workspace: Workspace, of_stage: Callable[[TrainingStage], Mapping[str, Any]], as_json: bool) -> None:
    """Print a result for each stage of training; where there is only one, its result alone."""
    if not workspace.recipe.stages:
        emit(of_stage(workspace.last), as_json)
    elif as_json:
        emit({stage.spec.name: of_stage(stage) for stage in workspace.training}, as_json)
    else:
        for stage in workspace.training:
            emit({"stage": stage.spec.name, **of_stage(stage)}, as_json)
