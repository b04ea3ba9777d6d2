"""``rkd eval``: measure systems on collections, and put reports side by side."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrieval_kd.cli.common import ARTIFACTS, AsJson, announce

if TYPE_CHECKING:
    from eval.specs import SystemSpec
    from eval.suite import Setup


class TableStyle(StrEnum):
    """How a table is written."""

    text = "text"
    markdown = "markdown"
    csv = "csv"
    latex = "latex"


app = typer.Typer(help="Measure systems on collections; compare them; put reports side by side.", no_args_is_help=True)

_SPECS = """SPEC is KIND:TARGET,KEY=VALUE, with NAME= before it where other systems or tables need a name:

bm25

model:MODEL,dim=128 (a folder or hub id; dim, max_length, query_prefix and document_prefix are optional)

pair:QUERY_MODEL,documents=DOCUMENT_MODEL (dim; same_space=yes where no card says so)

index:STORE,encoder=FOLDER (a run's folder brings its own encoder)

server:HOST:PORT

run:FILE

pyserini:INDEX,k1=0.9,b=0.4

rerank:MODEL,over=NAME,depth=100,max_length=192

rrf:NAME+NAME,k=60

weighted:NAME+NAME,weights=0.3+0.7,normalise=minmax (or zscore, none)
"""

Collections = Annotated[
    list[str], typer.Argument(metavar="COLLECTION...", help="Folders, irds:ID, or a folder of collections.")
]
Systems = Annotated[
    list[str] | None,
    typer.Option(
        "--system",
        metavar="SPEC",
        help="A system, as described below; may be repeated.",
    ),
]
Split = Annotated[str, typer.Option(help="The split whose judgements count.")]
Bm25 = Annotated[bool, typer.Option("--bm25", help="Short for --system bm25.")]
Index = Annotated[
    list[Path] | None, typer.Option("--index", help="Short for --system index: a store, or a run's folder.")
]
EncoderFolder = Annotated[Path | None, typer.Option("--encoder", help="The exported query encoder of --index.")]
Rerank = Annotated[
    str | None,
    typer.Option("--rerank", help="Short for --system rerank, over --run's first file, else over BM25."),
]
RerankDepth = Annotated[int, typer.Option("--rerank-depth", min=1, help="How many documents --rerank scores.")]
RerankLength = Annotated[int, typer.Option("--rerank-length", min=8, help="Longest pair it reads, in tokens.")]
Server = Annotated[str | None, typer.Option("--server", help="Short for --system server, at HOST:PORT.")]
RunFile = Annotated[
    list[Path] | None, typer.Option("--run", help="Short for --system run: a run file, TREC's or MS MARCO's.")
]
Depth = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default=False,
        help="Documents retrieved for each query; else 100 (MS MARCO's 1000), or what measures need.",
    ),
]
Measures = Annotated[list[str] | None, typer.Option("--measure", help="An ir_measures name, such as nDCG@10.")]
Baseline = Annotated[str, typer.Option(help="NAME of the system the others are tested against; else the first.")]
Reference = Annotated[bool, typer.Option("--reference", help="Show published figures of the same collection.")]
Teacher = Annotated[str, typer.Option(help="NAME of the system whose rankings the others should give.")]
MaxLoss = Annotated[
    float | None,
    typer.Option(min=0, help="Fail if a system may lose more of the first measure against --teacher than this."),
]
Distractors = Annotated[
    list[str] | None, typer.Option("--distractors", help="Documents of this collection join the corpus unjudged.")
]
RemoveSelf = Annotated[
    bool | None,
    typer.Option(help="Drop the document that has the query's id; for ArguAna and Quora unless said otherwise."),
]
Maxp = Annotated[bool, typer.Option("--maxp", help="Search passages; a document has its best passage's score.")]
Timed = Annotated[int, typer.Option(min=0, help="Queries timed one by one on each system; 0 times none.")]
Cache = Annotated[Path, typer.Option("--artifacts", help="Where vectors and scores are kept for the next time.")]
Out = Annotated[Path | None, typer.Option(help="Write report.json, report.html, runs and per-query values here.")]


@app.command(epilog=_SPECS)
def beir(
    collections: Collections,
    system: Systems = None,
    split: Split = "test",
    bm25: Bm25 = False,
    index: Index = None,
    encoder: EncoderFolder = None,
    rerank: Rerank = None,
    rerank_depth: RerankDepth = 100,
    rerank_length: RerankLength = 192,
    server: Server = None,
    run: RunFile = None,
    depth: Depth = None,
    measure: Measures = None,
    baseline: Baseline = "",
    reference: Reference = False,
    teacher: Teacher = "",
    max_loss: MaxLoss = None,
    distractors: Distractors = None,
    remove_self: RemoveSelf = None,
    timed: Timed = 100,
    artifacts: Cache = ARTIFACTS,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure systems on collections in BEIR layout: nDCG@10, RR@10, R@100 by default."""
    from eval.suite import Setup

    specs = _specs(system, bm25, index, encoder, rerank, rerank_depth, rerank_length, server, run)
    measures = tuple(measure or ("nDCG@10", "RR@10", "R@100"))
    setup = Setup(
        split=split,
        measures=measures,
        depth=_depth(depth, measures),
        distractors=tuple(distractors or ()),
        remove_self=remove_self,
        timed=timed,
        baseline=baseline,
        reference=reference,
        teacher=teacher,
        max_loss=max_loss,
    )
    _suite(collections, specs, setup, artifacts, out, as_json)


@app.command(epilog=_SPECS)
def msmarco(
    collections: Collections,
    system: Systems = None,
    split: Split = "dev",
    bm25: Bm25 = False,
    index: Index = None,
    encoder: EncoderFolder = None,
    rerank: Rerank = None,
    rerank_depth: RerankDepth = 100,
    rerank_length: RerankLength = 192,
    server: Server = None,
    run: RunFile = None,
    depth: Depth = None,
    measure: Measures = None,
    baseline: Baseline = "",
    reference: Reference = False,
    teacher: Teacher = "",
    max_loss: MaxLoss = None,
    distractors: Distractors = None,
    maxp: Maxp = False,
    timed: Timed = 100,
    artifacts: Cache = ARTIFACTS,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure systems on MS MARCO: RR@10 and R@1000; on TREC's graded sets nDCG@10, and RR from their own cut."""
    from eval.suite import Setup

    specs = _specs(system, bm25, index, encoder, rerank, rerank_depth, rerank_length, server, run)
    measures = tuple(measure or _usual_measures(collections, split))
    setup = Setup(
        split=split,
        measures=measures,
        depth=_depth(depth, measures, least=1000),
        distractors=tuple(distractors or ()),
        maxp=maxp,
        timed=timed,
        baseline=baseline,
        reference=reference,
        teacher=teacher,
        max_loss=max_loss,
    )
    _suite(collections, specs, setup, artifacts, out, as_json)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders with a report.json each, of one collection.")],
    style: Annotated[
        TableStyle, typer.Option("--format", help="How the table is written; --json prints the whole report.")
    ] = TableStyle.text,
    markdown: Annotated[bool, typer.Option("--markdown", help="Short for --format markdown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put the systems of several reports into one table."""
    from eval.report import merge_reports
    from eval.tables import csv_table, format_report, latex_table, markdown_table

    merged = merge_reports(folders)
    if as_json:
        typer.echo(json.dumps(merged))
        return
    write = {
        TableStyle.text: format_report,
        TableStyle.markdown: markdown_table,
        TableStyle.csv: csv_table,
        TableStyle.latex: latex_table,
    }
    typer.echo(write[TableStyle.markdown if markdown else style](merged))


@app.command()
def reproduce(
    tables: Annotated[Path, typer.Argument(help="A YAML list of name, command and expected figures.")],
    values: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="What {KEY} in a command stands for.")
    ] = None,
    only: Annotated[str, typer.Option(help="Do only the table of this name.")] = "",
    as_json: AsJson = False,
) -> None:
    """Do published tables again; a figure that differs, or is not there, makes the command fail."""
    from dataclasses import asdict

    from eval.reproduce import read_tables
    from eval.reproduce import reproduce as run_tables
    from eval.tables import outcome_table
    from retrieval_kd.errors import DataError, QualityError, did_you_mean

    pairs = [value.partition("=") for value in values or ()]
    for text, (key, _, value) in zip(values or (), pairs, strict=True):
        if not key or not value:
            raise DataError(f"--set {text!r}: write KEY=VALUE")
    chosen = read_tables(tables, {key: value for key, _, value in pairs})
    if only:
        names = [table.name for table in chosen]
        if only not in names:
            raise DataError(f"{tables}: no table {only!r}{did_you_mean(only, names)}")
        chosen = [table for table in chosen if table.name == only]
    outcomes = list(run_tables(chosen, announce))
    if as_json:
        typer.echo(json.dumps([{**asdict(outcome), "ok": outcome.ok} for outcome in outcomes]))
    else:
        typer.echo(outcome_table(outcomes))
    wrong = sum(not outcome.ok for outcome in outcomes)
    if wrong:
        raise QualityError(f"{wrong} of {len(outcomes)} figures were not reproduced; see the table for each")


@app.command()
def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="BASELINE OTHER...", help="Per-query files, or a report's folder.")
    ],
    measure: Annotated[
        list[str] | None, typer.Option("--measure", help="A measure of the files; all by default.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="Name of the baseline's file, without ending; else the first.")] = "",
    collection: Annotated[
        str | None, typer.Option(help="Show the queries that differ most, with the texts of this collection.")
    ] = None,
    distractors: Distractors = None,
    split: Split = "test",
    show: Annotated[int, typer.Option(min=1, help="How many wins and how many losses to show.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Test whether systems differ, query by query, and show where."""
    from dataclasses import asdict

    from eval.comparing import cases_json, compare_files, differing_queries, format_cases, format_comparisons
    from eval.suite import joined
    from retrieval_kd.errors import DataError

    if distractors and collection is None:
        raise DataError("--distractors: they join a collection's corpus; name it with --collection")
    candidates, rows = compare_files(files, measure or (), baseline)
    listings = {}
    if collection is not None:
        opened = joined(collection, distractors or ())
        by_name = {candidate.name: candidate for candidate in candidates}
        reference = by_name[rows[0].baseline]
        for name in dict.fromkeys(row.system for row in rows):
            listings[name] = differing_queries(reference, by_name[name], rows[0].measure, opened, split, show)
    if as_json:
        cases = {name: {"wins": cases_json(w), "losses": cases_json(o)} for name, (w, o) in listings.items()}
        typer.echo(json.dumps({"comparisons": [asdict(row) for row in rows], "queries": cases}))
        return
    typer.echo(format_comparisons(rows))
    for name, (wins, losses) in listings.items():
        typer.echo(f"\n{format_cases(f'Largest wins of {name} in {rows[0].measure}', wins)}")
        typer.echo(f"\n{format_cases(f'Largest losses of {name}', losses)}")


@app.command(epilog=_SPECS)
def bench(
    collection: Annotated[str, typer.Argument(metavar="COLLECTION", help="A folder, or irds:ID.")],
    system: Systems = None,
    split: Split = "test",
    measure: Measures = None,
    depth: Depth = None,
    calls: Annotated[int, typer.Option(min=1, help="Queries timed one by one.")] = 200,
    warmup: Annotated[int, typer.Option(min=0, help="Queries run before the clock counts.")] = 20,
    core: Annotated[list[int] | None, typer.Option("--core", min=0, help="Pin to this core; may be repeated.")] = None,
    rate: Annotated[float, typer.Option(min=0, help="Servers: requests that arrive each second; 0 for none.")] = 0.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Servers: how long they arrive.")] = 10.0,
    server_pid: Annotated[int, typer.Option(min=0, help="The server's process; its workers count too.")] = 0,
    distractors: Distractors = None,
    remove_self: RemoveSelf = None,
    artifacts: Cache = ARTIFACTS,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure cost beside quality: latency by stage, throughput, CPU, memory; each system in a process of its own."""
    from eval.bench import Load
    from eval.bench import bench as run_bench
    from eval.specs import SystemSpec
    from eval.tables import format_costs, format_report

    measures = tuple(measure or ("nDCG@10", "RR@10"))
    retrieved = _depth(depth, measures)
    load = Load(calls, warmup, retrieved, tuple(core or ()), rate, seconds, server_pid, remove_self=remove_self)
    specs = [SystemSpec.parse(text) for text in system or ()]
    with tempfile.TemporaryDirectory() as scratch:
        where = out or Path(scratch)
        written = run_bench(
            collection, split, specs, load, measures, artifacts, where, _command(), distractors or (), announce
        )
    if as_json:
        typer.echo(json.dumps(written))
    else:
        typer.echo(f"{format_report(written)}\n\n{format_costs(written)}")


def _usual_measures(collections: Sequence[str], split: str) -> tuple[str, ...]:
    from retrieval_kd.collections.msmarco import usual_measures
    from retrieval_kd.errors import DataError

    first, *others = {usual_measures(collection, split): collection for collection in collections}.items()
    if others:
        raise DataError(
            f"{others[0][1]}: usually measured by {', '.join(others[0][0])}, {first[1]} by {', '.join(first[0])}; "
            "name what you want of both with --measure"
        )
    return first[0]


def _depth(given: int | None, measures: Sequence[str], least: int = 100) -> int:
    """Return the depth that was asked for, else one that no measure looks below."""
    from eval.measures import deepest

    return given or max(least, deepest(measures))


def _specs(
    systems: list[str] | None,
    bm25: bool,
    indexes: list[Path] | None,
    encoder: Path | None,
    rerank: str | None,
    rerank_depth: int,
    rerank_length: int,
    server: str | None,
    runs: list[Path] | None,
) -> list[SystemSpec]:
    """Return what ``--system`` and its short forms name, in that order."""
    from eval.specs import SystemSpec

    specs = [SystemSpec.parse(text) for text in systems or ()]
    if bm25:
        specs.append(SystemSpec("bm25"))
    named = len(indexes or ()) > 1
    for path in indexes or ():
        options = {"encoder": str(encoder)} if encoder else {}
        specs.append(SystemSpec("index", str(path), f"index {path}" if named else "", options))
    files = [SystemSpec("run", str(path), path.name) for path in runs or ()]
    if rerank is not None:
        over = files[0].name if files else "bm25"
        options = {"over": over, "depth": str(rerank_depth), "max_length": str(rerank_length)}
        specs.append(SystemSpec("rerank", rerank, options=options))
    if server is not None:
        specs.append(SystemSpec("server", server))
    return specs + files


def _suite(
    collections: list[str], specs: list[SystemSpec], setup: Setup, artifacts: Path, out: Path | None, as_json: bool
) -> None:
    from eval.suite import run_suite, summarise
    from eval.tables import format_report, format_summary

    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        reports = run_suite(collections, specs, setup, artifacts, folder, _command(), announce)
    if as_json:
        typer.echo(json.dumps(reports[0] if len(reports) == 1 else summarise(reports, setup.reference)))
        return
    typer.echo("\n\n".join(format_report(report) for report in reports))
    if len(reports) > 1:
        typer.echo(f"\n{format_summary(summarise(reports, setup.reference))}")
    if out is not None:
        typer.echo(f"\n{out / ('report.html' if len(reports) == 1 else 'summary.html')}")


def _command() -> str:
    """Return the command that was typed."""
    return shlex.join(["rkd", *sys.argv[1:]])
