"""What happens around every call: a bound on calls, a deadline, and errors turned into statuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import grpc

from serve.errors import OverloadedError, to_status
from serve.limits import Limits

Answer = Callable[[object, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[object]]
_OURS = "/dense.retrieval.v1."
_RETRY_SECONDS = 0.1


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every unary call of our own services; health and reflection pass."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._running = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the call's handler with the guard around it."""
        handler = await continuation(handler_call_details)
        if not handler_call_details.method.startswith(_OURS) or handler is None or handler.unary_unary is None:
            return handler
        guarded = self._guarded(cast("Answer", handler.unary_unary))
        return grpc.unary_unary_rpc_method_handler(guarded, handler.request_deserializer, handler.response_serializer)

    def _guarded(self, answer: Answer) -> Answer:
        async def guarded(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> object:
            try:
                with self._admitted():
                    async with self._deadline(context.time_remaining()):
                        return await answer(request, context)
            except Exception as error:  # noqa: BLE001 - every failure becomes a status; cancellation is no Exception
                status = to_status(error)
            return await context.abort(status.code, status.details, status.trailing_metadata)

        return guarded

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._running >= self._limits.max_concurrent_requests:
            raise OverloadedError(f"{self._running} requests are being answered; try again later", _RETRY_SECONDS)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _deadline(self, remaining: float | None) -> asyncio.Timeout:
        """Return the block's time limit; a caller whose time is over gets no work started."""
        seconds = self._limits.seconds_for(remaining)
        if seconds <= 0:
            raise TimeoutError
        return asyncio.timeout(seconds)
