"""``rkd score``: a recipe's candidates by its teacher, and what any teacher's scores look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrieval_kd.cli.common import (
    ARTIFACTS,
    Artifacts,
    AsJson,
    Overrides,
    RecipeName,
    WithDefault,
    open_workspace,
)

if TYPE_CHECKING:
    from retrieval_kd.runs import Scores, Shortlist
    from retrieval_kd.scores.agreement import TeachersReport
    from retrieval_kd.scores.store import ScoreStore
    from retrieval_kd.stages.training import TrainingStage

app = typer.Typer(
    cls=WithDefault, help="Score a recipe's candidates with its teacher, or inspect any teacher's scores."
)


@app.command(WithDefault.DEFAULT)
def score(
    recipe: RecipeName, overrides: Overrides = None, artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False
) -> None:
    """Score each stage's candidates with its teacher; report spread, ties, agreement and a temperature that suits."""
    workspace = open_workspace(recipe, overrides, artifacts)
    reports = {stage.spec.name: _report(stage, workspace.training_queries) for stage in workspace.training}
    if as_json:
        plain = {name: report.to_json() for name, report in reports.items()}
        typer.echo(json.dumps(plain if workspace.recipe.stages else plain[workspace.last.spec.name]))
        return
    for name, report in reports.items():
        if workspace.recipe.stages:
            typer.echo(f"stage {name}")
        typer.echo(_text(report))


@app.command("inspect")
def inspect(
    stores: Annotated[
        list[Path],
        typer.Argument(metavar="STORE...", help="Score stores, TREC runs, Parquet or TSV files of scores."),
    ],
    as_json: AsJson = False,
) -> None:
    """Report spread, ties, NaN and a suggested temperature of each teacher's scores, and how far teachers agree."""
    from retrieval_kd.errors import DataError
    from retrieval_kd.scores.agreement import TeachersReport, agreements
    from retrieval_kd.scores.files import read_scores
    from retrieval_kd.scores.inspect import inspect as inspect_lists

    read = {_name(path, stores): read_scores(path, finite=False) for path in stores}
    reports = {}
    for name, store in read.items():
        try:
            reports[name] = inspect_lists([scores for _, scores in store.lists()])
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    report = TeachersReport(reports, agreements(_aligned(read)))
    typer.echo(json.dumps(report.to_json()) if as_json else _text(report))


def _report(stage: TrainingStage, queries: Mapping[str, str]) -> TeachersReport:
    """Report on a stage's teacher, and where it is a mean on each of its members."""
    from retrieval_kd.scores.agreement import TeachersReport, agreements
    from retrieval_kd.scores.inspect import inspect as inspect_lists

    teacher, lists = stage.teacher, stage.candidates
    members = teacher.member_scores(lists, queries)
    scores = {"teacher": teacher.combined(members), **(members if len(members) > 1 else {})}
    return TeachersReport({name: inspect_lists(lists) for name, lists in scores.items()}, agreements(scores))


def _name(path: Path, others: Sequence[Path]) -> str:
    """Return the shortest name that tells a store from the others."""
    same = [other for other in others if other.name == path.name]
    return path.name if len(same) == 1 else str(path)


def _aligned(stores: Mapping[str, ScoreStore]) -> dict[str, list[Scores]]:
    """Return each store's scores of the union of all lists, NaN where it has none."""
    from retrieval_kd.runs import Shortlist

    documents: dict[str, dict[str, None]] = {}
    for store in stores.values():
        for item, _ in store.lists():
            documents.setdefault(item.query_id, {}).update(dict.fromkeys(item.doc_ids))
    union: list[Shortlist] = [Shortlist(query_id, tuple(doc_ids)) for query_id, doc_ids in documents.items()]
    return {name: store.find(union) for name, store in stores.items()}


def _text(report: TeachersReport) -> str:
    """Return the report for people: a table of teachers, one of agreements, and what to beware of."""
    from eval.tables import plain_table

    headings = [
        "teacher",
        "queries",
        "pairs",
        "mean spread",
        "widest",
        "p1",
        "p50",
        "p99",
        "tied",
        "NaN",
        "temperature",
    ]
    rows = [
        [
            name,
            f"{one.queries:,}",
            f"{one.pairs:,}",
            *(f"{value:.3g}" for value in (one.mean_spread, one.widest_spread, one.p1, one.p50, one.p99)),
            f"{one.tied:.1%}",
            f"{one.not_finite:,}",
            _number(one.temperature),
        ]
        for name, one in report.teachers.items()
    ]
    parts = [plain_table(headings, rows)]
    if report.agreements:
        agreements = [
            [
                f"{one.first} and {one.second}",
                f"{one.lists:,}",
                f"{one.pairs:,}",
                _number(one.top1),
                _number(one.kendall_tau),
            ]
            for one in report.agreements
        ]
        parts.append(plain_table(["agreement of", "lists", "pairs", "top 1", "Kendall tau"], agreements))
    parts += [f"{name}: {line}" for name, one in report.teachers.items() for line in one.warnings]
    return "\n".join(parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
