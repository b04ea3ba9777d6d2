"""``rkd serve``: the gRPC server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from index.served import served_folder
from retrieval_kd.cli.common import AsJson


def serve(
    store: Annotated[Path, typer.Argument(help="An index store, or a run's folder, which has index and encoder.")],
    encoder: Annotated[
        Path | None, typer.Option(help="The exported query encoder; a run's folder brings its own.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 50051,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of encoder and search; one a core by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve an index over gRPC until interrupted."""
    # grpc's core logs a port in use in lines of its own, before we say it in one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from serve.server import run_server

    index, query_encoder = served_folder(store, encoder)

    def ready(bound: int) -> None:
        where = {"host": host, "port": bound}
        typer.echo(json.dumps(where) if as_json else f"serving on {host}:{bound}; stop with Ctrl-C")

    run_server(index, query_encoder, host=host, port=port, threads=threads, on_ready=ready)
