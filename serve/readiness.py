"""The health service of one port: what its services' state is, and who waits to hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Answer = health_pb2.HealthCheckResponse


class Readiness(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One state for every service of a port, NOT_SERVING at first.

    grpc's own servicer holds a lock while it writes, so that one watcher who does not read keeps every change from the
    others, a stop's among them; and its watches end with the process alone, which then waits out its whole grace.
    """

    def __init__(self, services: Iterable[str]) -> None:
        """Know ``services``, and ``""`` for all of them."""
        self._services = frozenset(("", *services))
        self._status = Answer.NOT_SERVING
        self._changed = asyncio.Event()
        self._closed = False

    def announce(self, status: int) -> None:
        """Set the state, a ``ServingStatus``, and tell those who watch it."""
        self._status = status
        self._tell()

    def close(self) -> None:
        """End every watch once its last change is sent, and later ones after their first answer."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802
        """Return the state of a service; NOT_FOUND for one that the port does not offer."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service on this port")
        return Answer(status=self._status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802
        """Send the state of a service, and each change of it; SERVICE_UNKNOWN for one that the port does not offer."""
        sent = None
        while True:
            changed, closed = self._changed, self._closed
            status = self._status if request.service in self._services else Answer.SERVICE_UNKNOWN
            if status != sent:
                await context.write(Answer(status=status))
                sent = status
            if closed:
                return
            await changed.wait()
