"""``rkd eval``: measure systems on a collection, and put reports side by side."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrieval_kd.cli.common import AsJson, served_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eval.systems import System
    from retrieval_kd.collections.base import Collection

app = typer.Typer(help="Measure systems on a collection; put reports side by side.", no_args_is_help=True)

Folder = Annotated[str, typer.Argument(metavar="COLLECTION", help="The collection's folder, or irds:ID.")]
Split = Annotated[str, typer.Option(help="The split whose judgements count.")]
Bm25 = Annotated[bool, typer.Option("--bm25", help="Measure BM25.")]
Index = Annotated[
    list[Path] | None, typer.Option("--index", help="Measure an encoder over an index store, or a run's folder.")
]
EncoderFolder = Annotated[Path | None, typer.Option("--encoder", help="The exported query encoder of --index.")]
Rerank = Annotated[
    str | None,
    typer.Option("--rerank", help="Measure this cross-encoder over the top of --run's first file, or of BM25."),
]
RerankDepth = Annotated[int, typer.Option("--rerank-depth", min=1, help="How many of them it scores.")]
RerankLength = Annotated[int, typer.Option("--rerank-length", min=8, help="Longest pair it reads, in tokens.")]
Server = Annotated[str | None, typer.Option("--server", help="Measure the server at HOST:PORT.")]
RunFile = Annotated[list[Path] | None, typer.Option("--run", help="Measure a TREC run file.")]
Depth = Annotated[int, typer.Option(min=1, help="Documents retrieved for each query.")]
Measures = Annotated[list[str] | None, typer.Option("--measure", help="An ir_measures name, such as nDCG@10.")]
Out = Annotated[Path | None, typer.Option(help="Write report.json, report.html, runs and per-query values here.")]


@app.command()
def beir(
    collection: Folder,
    split: Split = "test",
    bm25: Bm25 = False,
    index: Index = None,
    encoder: EncoderFolder = None,
    rerank: Rerank = None,
    rerank_depth: RerankDepth = 100,
    rerank_length: RerankLength = 192,
    server: Server = None,
    run: RunFile = None,
    depth: Depth = 100,
    measure: Measures = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure systems on a collection in BEIR layout: nDCG@10, RR@10, R@100 by default."""
    measures = tuple(measure or ("nDCG@10", "RR@10", "R@100"))
    with _systems(collection, split, bm25, index, encoder, rerank, rerank_depth, rerank_length, server, run) as (
        opened,
        systems,
    ):
        _report(opened, systems, split, measures, depth, out, as_json)


@app.command()
def msmarco(
    collection: Folder,
    split: Split = "dev",
    bm25: Bm25 = False,
    index: Index = None,
    encoder: EncoderFolder = None,
    rerank: Rerank = None,
    rerank_depth: RerankDepth = 100,
    rerank_length: RerankLength = 192,
    server: Server = None,
    run: RunFile = None,
    depth: Depth = 1000,
    measure: Measures = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure systems on a collection of MS MARCO files: RR@10 and R@1000 by default."""
    measures = tuple(measure or ("RR@10", "R@1000"))
    with _systems(collection, split, bm25, index, encoder, rerank, rerank_depth, rerank_length, server, run) as (
        opened,
        systems,
    ):
        _report(opened, systems, split, measures, depth, out, as_json)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders with a report.json each, of one collection.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put the systems of several reports into one table."""
    from eval.report import merge_reports
    from eval.tables import format_report, markdown_table

    merged = merge_reports(folders)
    if as_json:
        typer.echo(json.dumps(merged, ensure_ascii=False))
    else:
        typer.echo(markdown_table(merged) if markdown else format_report(merged))


@contextlib.contextmanager
def _systems(
    folder: str,
    split: str,
    bm25: bool,
    indexes: list[Path] | None,
    encoder: Path | None,
    rerank: str | None,
    rerank_depth: int,
    rerank_length: int,
    server: str | None,
    runs: list[Path] | None,
) -> Iterator[tuple[Collection, list[System]]]:
    """Open the collection and every system the options name."""
    from eval.systems import BM25System, IndexSystem, RerankSystem, RunSystem, ServerSystem
    from index.search import Searcher
    from retrieval_kd.collections import open_collection
    from retrieval_kd.encoders.onnx import OnnxEncoder
    from retrieval_kd.errors import DataError
    from retrieval_kd.recipes.schema import CollectionSpec
    from serve.client import RetrievalClient

    collection = open_collection(CollectionSpec(folder))
    qrels = collection.qrels(split)
    systems: list[System] = []
    with contextlib.ExitStack() as stack:
        files = [RunSystem.read(path.name, path, collection, qrels) for path in runs or ()]
        if bm25:
            systems.append(BM25System(collection))
        for path in indexes or ():
            store, query_encoder = served_folder(path, encoder)
            opened = OnnxEncoder.load(query_encoder)
            systems.append(IndexSystem(f"{opened.card.name} over {path}", "bi-encoder", opened, Searcher.open(store)))
        if rerank is not None:
            from retrieval_kd.teachers.cross_encoder import CrossEncoder

            teacher = CrossEncoder.load(rerank, rerank_length)
            first: System = files[0] if files else BM25System(collection)
            name = f"{Path(rerank).name} over {first.name} top-{rerank_depth}"
            systems.append(RerankSystem(name, first, teacher, collection, rerank_depth))
        if server is not None:
            client = stack.enter_context(RetrievalClient(server))
            systems.append(ServerSystem(f"server {server}", client, collection))
        systems.extend(files)
        if not systems:
            raise DataError("no system to measure; name --bm25, --index, --rerank, --server or --run")
        yield collection, systems


def _report(
    collection: Collection,
    systems: list[System],
    split: str,
    measures: tuple[str, ...],
    depth: int,
    out: Path | None,
    as_json: bool,
) -> None:
    import sys
    import tempfile

    from eval.report import write_report
    from eval.systems import assess
    from eval.tables import format_report
    from retrieval_kd.collections.base import split_queries

    queries, qrels = split_queries(collection, split), collection.qrels(split)
    results = [assess(system, queries, qrels, measures, depth) for system in systems]
    command = " ".join(["rkd", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as scratch:
        written = write_report(
            out or Path(scratch),
            collection=collection.name,
            split=split,
            systems=results,
            baseline=results[0].name if len(results) > 1 else None,
            provenance={"command": command, "collection": collection.fingerprint},
        )
    typer.echo(json.dumps(written, ensure_ascii=False) if as_json else format_report(written))
