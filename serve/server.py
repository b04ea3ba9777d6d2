"""The server's life: open the port, load, warm, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from retrieval_kd.errors import ServeError
from serve.engine import Engine, EngineSlot
from serve.guard import Guard
from serve.limits import Limits
from serve.service import SERVICES, add_services

_log = logging.getLogger(__name__)
_DRAIN_SECONDS = 10.0
_HEALTH_NAMES = ("", *SERVICES)


def run_server(
    store: Path,
    encoder: Path,
    host: str = "127.0.0.1",
    port: int = 50051,
    threads: int | None = None,
    limits: Limits | None = None,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serve the current version of an index store until SIGTERM or SIGINT.

    Args:
        store: The index store.
        encoder: Folder of the exported query encoder.
        host: Address to listen on; there is no encryption, so beyond the own machine put a proxy in front.
        port: Port to listen on; 0 lets the system choose.
        threads: Threads of the encoder and of the search pool; one for each core when None.
        limits: What requests have to keep to; the defaults when None.
        on_ready: Called with the bound port once requests are answered.

    Raises:
        ServeError: the port cannot be opened.
        ArtifactError: index or encoder are missing or torn.
        EncoderMismatch: the encoder's vectors do not lie in the index's space.
    """
    kept = limits or Limits()

    async def main() -> None:
        stop = asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        await serve(lambda: Engine.open(store, encoder, kept, threads), stop, host, port, kept, on_ready)

    asyncio.run(main())


async def serve(
    load: Callable[[], Engine],
    stop: asyncio.Event,
    host: str = "127.0.0.1",
    port: int = 50051,
    limits: Limits | None = None,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serve what ``load`` returns until ``stop`` is set, then finish the calls in flight.

    The port opens before loading, with health NOT_SERVING: a server that cannot be reached while it
    loads looks dead to whoever watches it (qdrant#3010).

    Raises:
        ServeError: the port cannot be opened.
        RkdError: whatever ``load`` raises.
    """
    limits = limits or Limits()
    # Without so_reuseport=0 a second server on the same port starts in silence and takes half of the calls.
    server = grpc.aio.server(
        interceptors=[Guard(limits)], options=[("grpc.so_reuseport", 0), *limits.message_options()]
    )
    slot = EngineSlot()
    add_services(server, slot, limits)
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    await _announce(checks, health_pb2.HealthCheckResponse.NOT_SERVING)
    reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    bound = _bind(server, host, port)
    await server.start()
    try:
        async with await asyncio.to_thread(load) as engine:
            slot.put(engine)
            await _announce(checks, health_pb2.HealthCheckResponse.SERVING)
            _log.info("serving index %s on %s:%d", engine.searcher.version, host, bound)
            if on_ready is not None:
                on_ready(bound)
            await stop.wait()
            _log.info("draining")
            await checks.enter_graceful_shutdown()
            await server.stop(_DRAIN_SECONDS)
    finally:
        await server.stop(None)


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_insecure_port(address)
    except RuntimeError:
        raise ServeError(
            f"cannot listen on {address}: the port is taken or the address is not this machine's; give another one"
        ) from None


async def _announce(checks: Any, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
    for name in _HEALTH_NAMES:
        await checks.set(name, status)
