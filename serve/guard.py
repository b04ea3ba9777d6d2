"""What happens around every call: counting, tracing, tokens, a bound on calls, a deadline, errors as statuses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from serve.auth import Role, TokenFile, required_role
from serve.errors import InvalidRequestError, OverloadedError, Violation, to_status
from serve.limits import Limits
from serve.logs import ACCESS
from serve.metrics import Metrics
from serve.tracing import NoTracer, Tracer

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Answer = Callable[[object, Context], Awaitable[object]]
Stream = Callable[[AsyncIterator[object], Context], AsyncGenerator[object]]
Writer = Callable[[AsyncIterator[bytes], Context], Awaitable[None]]
Decode = Callable[[bytes], object]
Metadata = tuple[tuple[str, str | bytes], ...]
_HEALTH = "/grpc.health.v1.Health/"
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}")
_RETRY_SECONDS = 0.1
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every call but those of the health service, which has to answer while all else is refused."""

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics | None = None,
        tokens: TokenFile | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Guard calls by limits, and by tokens where there are some."""
        self._limits = limits
        self._metrics = metrics or Metrics()
        self._tokens = tokens
        self._tracer = tracer or NoTracer()
        self._running = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the call's handler with the guard around it.

        Requests are decoded inside the guard: bytes that are no message are the caller's fault, and gRPC itself
        would answer them with UNKNOWN and a trace in the log.
        """
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_HEALTH):
            return handler
        decode = _decoder(cast("Decode", handler.request_deserializer))
        if handler.unary_unary is not None:
            unary = self._unary(method, cast("Answer", handler.unary_unary), decode)
            return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)
        stream = self._stream(method, cast("Stream", handler.stream_stream), decode)
        return grpc.stream_stream_rpc_method_handler(cast("Any", stream), None, handler.response_serializer)

    def _unary(self, method: str, answer: Answer, decode: Decode) -> Callable[[bytes, Context], Awaitable[object]]:
        # Opening and checking an index may take minutes: how long an administrator waits is theirs to say.
        patient = required_role(method) is Role.ADMIN

        async def guarded(request: bytes, context: Context) -> object:
            remaining = context.time_remaining()
            async with self._call(method, context, remaining if patient else self._limits.seconds_for(remaining)):
                return await answer(decode(request), context)

        return guarded

    def _stream(self, method: str, answer: Stream, decode: Decode) -> Writer:
        async def guarded(requests: AsyncIterator[bytes], context: Context) -> None:
            remaining = cast("float | None", context.time_remaining())
            remaining = math.inf if remaining is None else remaining
            idle = self._limits.max_stream_idle_ms / 1e3
            metadata = _metadata(context)
            loop = asyncio.get_running_loop()
            give_up = loop.time() + remaining
            # However late its deadline, a silent stream holds a place that others wait for.
            async with self._call(method, context, min(idle, remaining)) as deadline:

                def goes_on() -> None:
                    if not deadline.expired():
                        deadline.reschedule(min(loop.time() + idle, give_up))

                async def decoded() -> AsyncIterator[object]:
                    async for request in requests:
                        # A token may have been withdrawn since, and a stream can last for days.
                        self._authorise(method, metadata)
                        goes_on()
                        yield decode(request)

                # Written here and not yielded: a timeout while gRPC sends would end within gRPC, which then sends no
                # status, and a slow reader would wait for ever.
                async with contextlib.aclosing(answer(decoded(), context)) as responses:
                    async for response in responses:
                        await _write(context, response)
                        goes_on()

        return guarded

    @contextlib.asynccontextmanager
    async def _call(self, method: str, context: Context, seconds: float | None) -> AsyncIterator[asyncio.Timeout]:
        metadata = _metadata(context)
        request_id = _request_id(metadata)
        began = time.perf_counter()
        code = "OK"
        failed = None
        self._metrics.began()
        try:
            with self._tracer.span(method, metadata):
                self._authorise(method, metadata)
                with self._admitted():
                    # A caller whose time is over gets no work started.
                    if seconds is not None and seconds <= 0:
                        raise TimeoutError
                    async with asyncio.timeout(seconds) as deadline:
                        yield deadline
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as error:  # noqa: BLE001 - every failure becomes a status
            failed = to_status(error, request_id)
            code = _CODES[failed.code]
        finally:
            took = time.perf_counter() - began
            self._metrics.ended(method, code, took)
            if ACCESS.isEnabledFor(logging.INFO):
                fields = {"method": method, "code": code, "ms": round(1e3 * took, 3), "request_id": request_id}
                ACCESS.info("call", extra={"fields": fields})
        # Last: whoever reads the answer finds it counted.
        if failed is not None:
            await _abort(context, failed)

    def _authorise(self, method: str, metadata: Metadata) -> None:
        if self._tokens is not None:
            self._tokens.authorise(method, metadata)

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._running >= self._limits.max_concurrent_requests:
            raise OverloadedError(f"{self._running} requests are being answered; try again later", _RETRY_SECONDS)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


def _decoder(decode: Decode) -> Decode:
    def decoded(raw: bytes) -> object:
        try:
            return decode(raw)
        except DecodeError as error:
            raise InvalidRequestError([Violation("request", f"is not a message of this method ({error})")]) from None

    return decoded


def _metadata(context: Context) -> Metadata:
    return tuple(cast("Iterable[tuple[str, str | bytes]]", context.invocation_metadata() or ()))


def _request_id(metadata: Metadata) -> str:
    """Return the caller's ``x-request-id``, or a new one when it has none fit for a log."""
    for key, value in metadata:
        if key == "x-request-id" and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


async def _write(context: Context, response: object) -> None:
    try:
        await context.write(response)
    except grpc.aio.InternalError:
        # The caller has hung up.
        raise asyncio.CancelledError from None


async def _abort(context: Context, status: status_pb2.Status) -> None:
    final = rpc_status.to_status(status)
    try:
        await context.abort(final.code, final.details, final.trailing_metadata)
    except grpc.aio.InternalError:
        # The caller has hung up. gRPC logs a trace of any other exception, one for each call of an overload.
        raise asyncio.CancelledError from None
