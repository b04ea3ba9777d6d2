"""One server process' life: open the port, load, warm, serve, follow the store, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from retrieval_kd.errors import ServeError
from serve.admin import add_admin_service
from serve.auth import TokenFile
from serve.config import LOOPBACK, ServeConfig
from serve.engine import Engine, EngineSlot
from serve.guard import Guard
from serve.indexes import watch
from serve.logs import use_json
from serve.metrics import Metrics, serve_metrics
from serve.readiness import Readiness
from serve.service import ADMIN_SERVICE, SERVICES, add_services
from serve.tls import server_credentials
from serve.tracing import Tracer, open_tracer

_log = logging.getLogger(__name__)
_PORT_TAKEN = (errno.EADDRINUSE, errno.EACCES)
_CONNECTION_OPTIONS = [
    # Behind a balancer that spreads connections, long-lived ones would keep new servers idle. Only new calls move to
    # another connection: a grace would cut the streams that go on, and those that do not have limits of their own.
    ("grpc.max_connection_age_ms", 30 * 60_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


def run_server(config: ServeConfig, on_ready: Callable[[int], None] | None = None) -> None:
    """Serve an index store until SIGTERM or SIGINT; SIGHUP makes it look at the store at once.

    Args:
        config: How to run; ``workers`` is for :func:`serve.workers.run_workers`.
        on_ready: Called with the bound port once requests are answered.

    Raises:
        ServeError: the port cannot be opened, or is reachable by others in plain text.
        ArtifactError: index or encoder are missing or torn.
        EncoderMismatch: the encoder's vectors do not lie in the index's space.
    """

    async def main() -> None:
        stop, reload = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, stop.set)
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        metrics = Metrics()

        def load() -> Engine:
            return Engine.open(config.store, config.encoder, config.limits, config.threads, metrics, config.reranker)

        await serve(load, stop, config, metrics, reload, on_ready)

    if config.json_logs:
        use_json()
    asyncio.run(main())


async def check(config: ServeConfig) -> dict[str, Any]:
    """Open everything that serving would open, test it, and return what was found; every port is closed again.

    Raises:
        RkdError: what would keep the server from serving.
    """
    config.require_safe_addresses()
    _require_free_ports(config)
    if config.tls is not None:
        server_credentials(config.tls)
    if config.tokens is not None:
        TokenFile(config.tokens)
    open_tracer(config.trace).close()
    async with Engine.open(
        config.store, config.encoder, config.limits, config.threads, None, config.reranker
    ) as engine:
        searcher = engine.index.searcher
        return {
            "index_version": searcher.version,
            "kind": searcher.kind,
            "documents": searcher.count,
            "dimension": searcher.dimension,
            "query_encoder": engine.encoder.card.fingerprint,
            "reranker": engine.reranker.fingerprint if engine.reranker is not None else None,
        }


async def serve(
    load: Callable[[], Engine],
    stop: asyncio.Event,
    config: ServeConfig,
    metrics: Metrics | None = None,
    reload: asyncio.Event | None = None,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serve what ``load`` returns until ``stop`` is set, then finish the calls in flight.

    The port opens before loading, with health NOT_SERVING: a server that cannot be reached while it
    loads looks dead to whoever watches it (qdrant#3010). A stop while it loads ends it unready; the
    process lasts until the step that its thread is in is done, for a thread cannot be interrupted.

    Raises:
        ServeError: the port cannot be opened.
        RkdError: whatever ``load`` raises.
    """
    config.require_safe_addresses()
    metrics = metrics or Metrics()
    slot = EngineSlot()
    async with contextlib.AsyncExitStack() as stack:
        tracer = open_tracer(config.trace)
        stack.callback(tracer.close)
        ports, bound = _open_ports(config, slot, metrics, tracer)
        if config.metrics_port is not None and not config.reuse_port:
            stack.enter_context(serve_metrics(metrics.registry, config.metrics_host, config.metrics_port))
        for port in ports:
            stack.push_async_callback(port.server.stop, None)
            await port.server.start()
        engine = await _loaded(load, stack, stop)
        if engine is None:
            _log.info("stopped while loading")
            return
        slot.put(engine)
        watching = asyncio.create_task(watch(engine.index, config.poll_seconds, reload or asyncio.Event()))
        stack.callback(watching.cancel)
        for port in ports:
            port.readiness.announce(health_pb2.HealthCheckResponse.SERVING)
        _log.info("serving on %s:%d", config.host, bound)
        if on_ready is not None:
            on_ready(bound)
        await stop.wait()
        _log.info("draining")
        for port in ports:
            port.readiness.announce(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(config.drain_delay)
        for port in ports:
            port.readiness.close()
        await asyncio.gather(*(port.server.stop(config.drain_seconds) for port in ports))


async def _loaded(load: Callable[[], Engine], stack: contextlib.AsyncExitStack, stop: asyncio.Event) -> Engine | None:
    """Return the engine, entered and to be left by the stack; None when the stop came first."""

    async def enter() -> Engine:
        return await stack.enter_async_context(await asyncio.to_thread(load))

    loading, stopping = asyncio.create_task(enter()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        engine = loading.result() if loading.done() else None
        return None if stop.is_set() else engine
    finally:
        stopping.cancel()
        loading.cancel()
        await asyncio.wait((loading, stopping))


@dataclass(frozen=True)
class _Port:
    """A server, the services that it and no other offers, and their health."""

    server: grpc.aio.Server
    services: tuple[str, ...]
    readiness: Readiness


def _open_ports(config: ServeConfig, slot: EngineSlot, metrics: Metrics, tracer: Tracer) -> tuple[list[_Port], int]:
    """Return the main port, and one for the administration if that has its own, and the main one's number."""
    tokens = TokenFile(config.tokens) if config.tokens is not None else None
    guard = Guard(config.limits, metrics, tokens, tracer)
    # Without so_reuseport=0 a second server on the same port starts in silence and takes half of the calls.
    options = [
        ("grpc.so_reuseport", int(config.reuse_port)),
        # The transport refuses streams without saying when to come back, so our own bound comes first.
        ("grpc.max_concurrent_streams", 2 * config.limits.max_concurrent_requests),
        *_CONNECTION_OPTIONS,
        *config.limits.message_options(),
    ]

    def new_port(*services: str) -> _Port:
        return _Port(grpc.aio.server(interceptors=[guard], options=options), services, Readiness(services))

    main = new_port(*SERVICES) if tokens is None else new_port(*SERVICES, ADMIN_SERVICE)
    add_services(main.server, slot, config.limits, tracer)
    reflection.enable_server_reflection([*main.services, health.SERVICE_NAME, reflection.SERVICE_NAME], main.server)
    bound = _bind(main.server, config, config.host, config.port)
    ports = [main]
    if config.admin_port is not None:
        ports.append(new_port(ADMIN_SERVICE))
        _bind(ports[-1].server, config, LOOPBACK, config.admin_port)
    for port in ports:
        health_pb2_grpc.add_HealthServicer_to_server(port.readiness, port.server)
        if ADMIN_SERVICE in port.services:
            add_admin_service(port.server, slot, config.limits)
    return ports, bound


def _bind(server: grpc.aio.Server, config: ServeConfig, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if config.tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, server_credentials(config.tls))
    except RuntimeError:
        raise ServeError(
            f"cannot listen on {address}: the port is taken or the address is not this machine's; give another one"
        ) from None


def _require_free_ports(config: ServeConfig) -> None:
    """Refuse a port that another process or another option has; 0 is whatever the system gives."""
    ours: dict[int, str] = {}
    with contextlib.ExitStack() as stack:
        for option, host, port in (
            ("--port", config.host, config.port),
            ("--admin-port", LOOPBACK, config.admin_port),
            ("--metrics-port", config.metrics_host, config.metrics_port),
        ):
            if port is None:
                continue
            probe = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            # One that was closed a moment ago is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]"), port))
                # Until it listens, the next socket with SO_REUSEADDR may have the port too.
                probe.listen()
            except OSError as error:
                if port in ours:
                    raise ServeError(f"{option}: {port} is {ours[port]}'s already; give another port") from None
                if error.errno not in _PORT_TAKEN:
                    raise ServeError(
                        f"{option.replace('port', 'host')}: cannot listen on {host} ({error.strerror}); "
                        "give an address of this machine"
                    ) from None
                raise ServeError(
                    f"{option}: cannot listen on {host}:{port} ({error.strerror}); give another port, or 0 to check "
                    "beside a running server"
                ) from None
            if port:
                ours[port] = option
