"""``rkd demo``: the whole path on the built-in collection, offline, in minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from retrieval_kd.cli.common import ARTIFACTS, Artifacts, AsJson, open_workspace

QUESTION = "return the longest common prefix of several paths"


def demo(
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("runs/demo"),
    artifacts: Artifacts = ARTIFACTS,
    as_json: AsJson = False,
) -> None:
    """Distil, export, index, serve, query and measure on the docstrings of the installed Python packages."""
    started = time.monotonic()
    workspace = open_workspace("demo", (), artifacts)
    from retrieval_kd.cli.pipeline import ask_served, run_recipe, show_report

    report = run_recipe(workspace, out, "rkd demo")
    if not as_json:
        typer.echo(f"\n$ rkd serve {out} & rkd search 127.0.0.1:50051 {QUESTION!r}", err=True)
        for hit in ask_served(out, QUESTION):
            typer.echo(f"{hit.rank:>3}  {hit.score:.4f}  {hit.doc_id}", err=True)
    show_report(report, out, as_json)
    typer.echo(f"done in {time.monotonic() - started:.0f} s", err=True)
