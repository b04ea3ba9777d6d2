"""``rkd serve``: the gRPC server."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from index.served import served_folder
from retrieval_kd.cli.common import AsJson, emit
from retrieval_kd.errors import ServeError

_RERANKER = "reranker"


def serve(
    store: Annotated[Path, typer.Argument(help="An index store, or a run's folder, which has index and encoder.")],
    encoder: Annotated[
        Path | None, typer.Option(help="The exported query encoder; a run's folder brings its own.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 50051,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the port and the index.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of encoder and search in each process; all cores by default.")
    ] = None,
    reranker: Annotated[
        Path | None, typer.Option(help="An exported reranker; a run's folder brings its own, if it has one.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate; read again when it changes.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key of the certificate.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM authorities; clients must show a certificate of theirs.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen in plain text where other machines can reach it.")
    ] = False,
    tokens: Annotated[
        Path | None, typer.Option(help="File of 'read TOKEN' and 'admin TOKEN' lines; read again when it changes.")
    ] = None,
    admin_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the administration, on this machine only.")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port of Prometheus metrics.")] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of the metrics.")] = "127.0.0.1",
    trace: Annotated[str | None, typer.Option(help="HOST:PORT of an OpenTelemetry collector.")] = None,
    log_format: Annotated[str, typer.Option(help="text, or json with a line for each call.")] = "text",
    drain_delay: Annotated[
        float, typer.Option(min=0, help="Seconds from NOT_SERVING to refusing calls, for load balancers.")
    ] = 0.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds that calls in flight may take when the server stops.")
    ] = 10.0,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="Set one of the limits that GetServerInfo names; may be given again."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Open and test everything, then stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve an index over gRPC until interrupted."""
    # grpc's core logs a port in use in lines of its own, before we say it in one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if log_format not in ("text", "json"):
        raise typer.BadParameter("give text or json", param_hint="--log-format")
    if (tls_cert is None) != (tls_key is None):
        raise ServeError("--tls-cert and --tls-key belong together; give both")
    if tls_client_ca is not None and tls_cert is None:
        raise ServeError("--tls-client-ca needs --tls-cert and --tls-key")
    from serve.config import ServeConfig
    from serve.limits import Limits
    from serve.tls import CertificateFiles

    index, query_encoder = served_folder(store, encoder)
    if reranker is None and encoder is None and (store / _RERANKER).is_dir():
        reranker = store / _RERANKER
    config = ServeConfig(
        store=index,
        encoder=query_encoder,
        host=host,
        port=port,
        workers=workers,
        threads=threads,
        reranker=reranker,
        tls=CertificateFiles(tls_cert, tls_key, tls_client_ca) if tls_cert and tls_key else None,
        insecure=insecure,
        tokens=tokens,
        admin_port=admin_port,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        trace=trace,
        json_logs=log_format == "json",
        drain_delay=drain_delay,
        drain_seconds=drain_seconds,
        limits=Limits.of(limit or ()),
    )
    if check:
        import asyncio

        from serve.server import check as check_all

        emit(asyncio.run(check_all(config)), as_json)
        return

    # Until the server handles it, it would end the process; what is loaded now is the newest version anyway.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def ready(bound: int) -> None:
        where = {"host": host, "port": bound}
        typer.echo(json.dumps(where) if as_json else f"serving on {host}:{bound}; stop with Ctrl-C")

    if workers > 1:
        from serve.workers import run_workers

        run_workers(config, ready)
    else:
        from serve.server import run_server

        run_server(config, ready)
