"""``rkd search``: a client for people."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from retrieval_kd.cli.common import AsJson


def search(
    target: Annotated[str, typer.Argument(help="The server, HOST:PORT.")],
    text: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("--k", "-k", help="Documents to return.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Ask a running server and print the ranking."""
    from serve.client import RetrievalClient

    with RetrievalClient(target) as client:
        result = client.search(text=text, top_k=k)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
        return
    for hit in result.hits:
        typer.echo(f"{hit.rank:>3}  {hit.score:.4f}  {hit.doc_id}")
    timings = result.timings
    typer.echo(
        f"index {result.index_version}; {timings.total_ns / 1e6:.1f} ms in the server "
        f"({timings.encode_ns / 1e6:.1f} encoding, {timings.search_ns / 1e6:.1f} searching)",
        err=True,
    )
