"""``rkd run``: every stage of a recipe, then the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_kd.cli.common import (
    ARTIFACTS,
    DEFAULT_RECIPE,
    Artifacts,
    AsJson,
    Overrides,
    RecipeName,
    open_workspace,
)


def run(
    recipe: RecipeName = DEFAULT_RECIPE,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where the report goes; runs/RECIPE-MODE by default.")] = None,
    artifacts: Artifacts = ARTIFACTS,
    as_json: AsJson = False,
) -> None:
    """Run a whole distillation, evaluate it, write report.json and report.html; a killed run goes on."""
    workspace = open_workspace(recipe, overrides, artifacts)
    from retrieval_kd.cli.pipeline import run_recipe, show_report

    loaded = workspace.recipe
    folder = out or Path("runs") / f"{loaded.name}-{loaded.student.mode}"
    command = " ".join(["rkd run", recipe, *(f"--set {assignment}" for assignment in overrides or ())])
    show_report(run_recipe(workspace, folder, command), folder, as_json)
