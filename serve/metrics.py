"""What the server counts, for Prometheus; a registry for each server, or files that several workers share.

``prometheus_client`` decides at its import, by ``PROMETHEUS_MULTIPROC_DIR``, whether values live in memory
or in files of that folder. The supervisor of several workers sets it for them and serves the sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from retrieval_kd.errors import ServeError

_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0, 8.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The server's counters; one method for each thing that happens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "rkd_requests", "Calls answered, by method and status code.", ("method", "code"), registry=self.registry
        )
        self._request_seconds = Histogram(
            "rkd_request_seconds",
            "Time from a call's arrival to its answer.",
            ("method",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stage_seconds = Histogram(
            "rkd_stage_seconds",
            "Time of each stage of a search: tokenize, queue, encode, search, rescore.",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "rkd_requests_in_flight",
            "Calls being answered.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._queued = Gauge(
            "rkd_queued",
            "What waits for the encoder, in texts and in tokens.",
            ("unit",),
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._batch_texts = Histogram(
            "rkd_batch_texts", "Texts encoded together.", buckets=_TEXTS, registry=self.registry
        )
        self._dropped = Counter(
            "rkd_dropped_texts",
            "Texts refused or dropped before encoding: full, late (could not be in time), abandoned by the caller.",
            ("reason",),
            registry=self.registry,
        )
        self._reloads = Counter(
            "rkd_index_loads", "Index versions opened, by outcome.", ("outcome",), registry=self.registry
        )
        self._version = Gauge(
            "rkd_index_version",
            "Number of the index version being served; the lowest of the workers'.",
            registry=self.registry,
            multiprocess_mode="livemin",
        )
        self._documents = Gauge(
            "rkd_index_documents",
            "Documents that can be found.",
            registry=self.registry,
            multiprocess_mode="livemin",
        )

        self._updates = Gauge(
            "rkd_index_updates",
            "Documents added or replaced since the build, which every search compares with one by one: build anew "
            "before they are more than a few thousand.",
            registry=self.registry,
            multiprocess_mode="livemax",
        )

    def began(self) -> None:
        """Count a call that arrived."""
        self._in_flight.inc()

    def ended(self, method: str, code: str, seconds: float) -> None:
        """Count a call's answer."""
        self._in_flight.dec()
        self._requests.labels(method, code).inc()
        self._request_seconds.labels(method).observe(seconds)

    def stage(self, name: str, nanoseconds: int) -> None:
        """Count the time of one stage; a stage that did not run is not counted."""
        if nanoseconds:
            self._stage_seconds.labels(name).observe(nanoseconds / 1e9)

    def queued(self, texts: int, tokens: int) -> None:
        """Tell what waits for the encoder."""
        self._queued.labels("texts").set(texts)
        self._queued.labels("tokens").set(tokens)

    def batch(self, texts: int) -> None:
        """Count a batch."""
        self._batch_texts.observe(texts)

    def dropped(self, reason: str, texts: int) -> None:
        """Count texts that were not encoded."""
        self._dropped.labels(reason).inc(texts)

    def index(self, version: str, documents: int, updates: int) -> None:
        """Tell which version is served; its name begins with its number."""
        self._reloads.labels("ok").inc()
        self._version.set(int(version.split("-")[0]))
        self.documents(documents, updates)

    def documents(self, count: int, updates: int) -> None:
        """Tell how many documents can be found, and how many of them came after the build."""
        self._documents.set(count)
        self._updates.set(updates)

    def index_refused(self) -> None:
        """Count a version that could not be opened or failed its test."""
        self._reloads.labels("failed").inc()


@contextlib.contextmanager
def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> Iterator[int]:
    """Answer Prometheus on a port of its own, in a thread, until the block ends; yield the bound port.

    Raises:
        ServeError: the port cannot be opened.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ServeError(f"cannot serve metrics on {host}:{port} ({error.strerror}); give another port") from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def merged_registry(folder: str) -> CollectorRegistry:
    """Return a registry that sums what several workers wrote to the files of a folder."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=folder)  # type: ignore[no-untyped-call]
    return registry
