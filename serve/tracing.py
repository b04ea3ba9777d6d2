"""OpenTelemetry spans of calls, for those who installed the extra ``otel`` and named a collector."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from retrieval_kd.errors import ServeError


class Tracer(Protocol):
    """Opens a span around a call."""

    def span(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> AbstractContextManager[object]:
        """Return the span of a call, a child of the caller's when its metadata has a W3C ``traceparent``."""

    def stages(self, nanoseconds: dict[str, int]) -> None:
        """Note on the current span where its time went."""

    def close(self) -> None:
        """Send what is not sent yet."""


class NoTracer:
    """Traces nothing."""

    def span(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> AbstractContextManager[object]:
        """Return a block around which nothing happens."""
        return nullcontext()

    def stages(self, nanoseconds: dict[str, int]) -> None:
        """Note nothing."""

    def close(self) -> None:
        """Send nothing."""


class OtelTracer:
    """Sends spans to an OTLP collector."""

    def __init__(self, provider: object) -> None:
        """Take an SDK tracer provider; :func:`open_tracer` makes one."""
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        assert isinstance(provider, TracerProvider)
        self._provider = provider
        self._trace = trace
        self._tracer = provider.get_tracer("retrieval-kd")
        self._propagator = TraceContextTextMapPropagator()

    def span(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> AbstractContextManager[object]:
        """Return a span named after the method, with the attributes of OpenTelemetry's RPC conventions."""
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        service, _, name = method.lstrip("/").partition("/")
        return self._tracer.start_as_current_span(
            method.lstrip("/"),
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )

    def stages(self, nanoseconds: dict[str, int]) -> None:
        """Set one attribute for each stage that ran."""
        span = self._trace.get_current_span()
        for name, value in nanoseconds.items():
            if value:
                span.set_attribute(f"rkd.{name}_ns", value)

    def close(self) -> None:
        """Flush."""
        self._provider.shutdown()


def open_tracer(endpoint: str | None) -> Tracer:
    """Return a tracer that sends to ``HOST:PORT`` in plain text OTLP over gRPC, or one that traces nothing.

    Raises:
        ServeError: the extra is not installed.
    """
    if endpoint is None:
        return NoTracer()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ServeError(f"tracing needs {error.name}; pip install 'retrieval-kd[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "retrieval-kd"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, insecure=True)))
    return OtelTracer(provider)
