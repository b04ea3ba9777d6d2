"""``rkd search``: a client for people."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from retrieval_kd.cli.common import AsJson
from retrieval_kd.errors import ServeError

_TOKEN = "RKD_TOKEN"  # noqa: S105  the name of a variable


def search(
    target: Annotated[str, typer.Argument(help="The server, HOST:PORT.")],
    text: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("--k", "-k", help="Documents to return.")] = 10,
    filter_json: Annotated[
        str | None, typer.Option("--filter", help='Which documents, such as {"eq": {"language": "en"}}.')
    ] = None,
    field: Annotated[list[str] | None, typer.Option(help="A stored field to show; * shows all.")] = None,
    rerank: Annotated[int, typer.Option(min=0, help="Documents that the server's reranker orders again.")] = 0,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every document.")] = False,
    ca: Annotated[Path | None, typer.Option(help="Encrypt; PEM authority of the server's certificate.")] = None,
    cert: Annotated[Path | None, typer.Option(help="PEM certificate of this client.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM private key of this client.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a running server and print the ranking; a token is taken from the variable RKD_TOKEN."""
    # grpc's core logs what is wrong with an address in lines of its own, before we say it in one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Without an authority the connection is plain text, which shows no certificate and hides no token.
    if ca is None and (cert or key):
        raise ServeError("--cert and --key are for an encrypted connection; give --ca, the server's authority, too")
    from serve.client import Options, RetrievalClient, Tls

    try:
        wanted = None if filter_json is None else json.loads(filter_json)
    except ValueError as error:  # an integer of more digits than Python reads, too
        raise ServeError(f"--filter: not JSON ({error})") from None
    except RecursionError:
        raise ServeError("--filter: too many levels deep; flatten it") from None
    options = Options(filter=wanted, fields=field or (), exact=exact, rerank_depth=rerank)
    tls = None if ca is None else Tls(ca, cert, key)
    with RetrievalClient(target, tls=tls, token=os.environ.get(_TOKEN)) as client:
        result = client.search(text=text, top_k=k, options=options)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
        return
    for hit in result.hits:
        typer.echo(f"{hit.rank:>3}  {hit.score:.4f}  {hit.doc_id}")
        for name, value in hit.fields.items():
            typer.echo(f"{'':>5}{name}: {value}")
    timings = result.timings
    typer.echo(
        f"index {result.index_version}; {timings.total_ns / 1e6:.1f} ms in the server "
        f"({timings.encode_ns / 1e6:.1f} encoding, {timings.search_ns / 1e6:.1f} searching)",
        err=True,
    )
