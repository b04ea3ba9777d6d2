"""A typed client; importing it loads neither an encoder nor an index library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar, cast

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.errors import ServeError
from serve.health import check_health
from serve.limits import Limits
from serve.vectors import from_message, to_message

Response = TypeVar("Response")
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Hit:
    """One document: its id, its float32 score, its rank from 1."""

    doc_id: str
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the server's time went, in nanoseconds."""

    tokenize_ns: int
    queue_ns: int
    encode_ns: int
    search_ns: int
    total_ns: int


@dataclass(frozen=True, slots=True)
class SearchResult:
    """One query's ranking.

    Attributes:
        hits: Best first.
        index_version: The index version that was searched.
        query_encoder: Fingerprint of the query encoder being served.
        timings: The server's time; of the whole batch when the query came in one.
    """

    hits: tuple[Hit, ...]
    index_version: str
    query_encoder: str
    timings: Timings


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """Identity of an encoder, as ``EncoderInfo`` of the protocol."""

    name: str
    fingerprint: str
    space_fingerprint: str
    dimension: int
    max_length: int
    normalized: bool
    precision: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server's version, its query encoder and its limits."""

    server_version: str
    query_encoder: EncoderInfo
    limits: Limits


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """The index version being searched."""

    index_version: str
    kind: str
    document_count: int
    dimension: int
    document_encoder: EncoderInfo


class RetrievalClient:
    """Talks to one server over one channel; safe to share between threads.

    Every method raises :class:`ServeError` with one line that says what went wrong.
    """

    def __init__(self, target: str, timeout: float = 5.0) -> None:
        """Prepare a channel; nothing is sent yet.

        Args:
            target: ``HOST:PORT``.
            timeout: Seconds that each call may take.
        """
        self._target = target
        self._timeout = timeout
        self._channel = grpc.insecure_channel(target, options=Limits().message_options())
        self._retrieval = rpc.RetrievalServiceStub(self._channel)
        self._embedding = rpc.EmbeddingServiceStub(self._channel)
        self._index = rpc.IndexServiceStub(self._channel)
        self._info = rpc.ServerInfoServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def search(self, text: str | None = None, vector: npt.ArrayLike | None = None, top_k: int = 10) -> SearchResult:
        """Rank documents against one text or one vector ``[d]``; give exactly one of the two."""
        if text is not None and vector is None:
            request = pb.SearchRequest(text=text, top_k=_top_k(top_k))
        elif vector is not None and text is None:
            request = pb.SearchRequest(vector=_vector(vector), top_k=_top_k(top_k))
        else:
            raise ServeError("search: give either a text or a vector")
        response = self._call("search", self._retrieval.Search, request)
        return SearchResult(
            _hits(response.hits), response.index_version, response.query_encoder, _timings(response.timings)
        )

    def batch_search(
        self, texts: Sequence[str] | None = None, top_k: int = 10, *, vectors: npt.ArrayLike | None = None
    ) -> list[SearchResult]:
        """Rank documents against many texts, or against vectors ``[n, d]``; results in their order."""
        if (texts is None) == (vectors is None):
            raise ServeError("batch_search: give either texts or vectors")
        if texts is not None:
            queries = [pb.Query(text=text) for text in _texts("batch_search", texts)]
        else:
            queries = [pb.Query(vector=_vector(vector)) for vector in _rows(vectors)]
        request = pb.BatchSearchRequest(queries=queries, top_k=_top_k(top_k))
        response = self._call("batch_search", self._retrieval.BatchSearch, request)
        timings = _timings(response.timings)
        return [
            SearchResult(_hits(result.hits), response.index_version, response.query_encoder, timings)
            for result in response.results
        ]

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the texts' query vectors, float32 ``[len(texts), d]``."""
        request = pb.EmbedRequest(texts=_texts("embed", texts), vector_encoding=pb.VECTOR_ENCODING_F32_LE)
        response = self._call("embed", self._embedding.Embed, request)
        return np.stack([from_message(vector) for vector in response.vectors])

    def server_info(self) -> ServerInfo:
        """Return what serves, and its limits."""
        response = self._call("server_info", self._info.GetServerInfo, pb.GetServerInfoRequest())
        limits = Limits(**{field.name: getattr(response.limits, field.name) for field in pb.Limits.DESCRIPTOR.fields})
        return ServerInfo(response.server_version, _encoder(response.query_encoder), limits)

    def index(self) -> IndexInfo:
        """Return what is searched."""
        response = self._call("index", self._index.GetIndex, pb.GetIndexRequest())
        return IndexInfo(
            response.index_version,
            response.kind,
            response.document_count,
            response.dimension,
            _encoder(response.document_encoder),
        )

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Return once the server answers requests; ``timeout`` in seconds."""
        give_up = time.monotonic() + timeout
        while True:
            try:
                return check_health(self._target, max(_POLL_SECONDS, min(self._timeout, give_up - time.monotonic())))
            except ServeError as error:
                if time.monotonic() >= give_up:
                    raise ServeError(f"{error}; waited {timeout:g} s") from None
            time.sleep(_POLL_SECONDS)

    def _call(self, name: str, method: Callable[..., Response], request: Message) -> Response:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise ServeError(f"{name} at {self._target}: {_explain(cast('grpc.Call', error), self._timeout)}") from None


def _explain(error: grpc.Call, timeout: float) -> str:
    status = rpc_status.from_call(error)
    retry = error_details_pb2.RetryInfo()
    if status is not None:
        hint = ""
        for detail in status.details:
            if detail.Unpack(retry):
                hint = f" (retry after {retry.retry_delay.ToMilliseconds()} ms)"
        return f"{status.message}{hint}"
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return f"nothing answers there ({error.details()}); start the server or mend the address"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer within {timeout:g} s; allow more time or send less at once"
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return f"{error.details()}; send less at once"
        case code:
            return f"{code.name} {error.details()}"


def _top_k(top_k: int) -> int:
    """Refuse here what the wire cannot carry; every other limit is the server's to judge."""
    if not 0 <= top_k < 2**32:
        raise ServeError(f"top_k: is {top_k}; give 1 or more")
    return top_k


def _texts(name: str, texts: Sequence[str]) -> Sequence[str]:
    """Refuse a bare string: it is a sequence of texts of one letter each."""
    if isinstance(texts, str):
        raise ServeError(f"{name}: give a list of texts, not one text")
    return texts


def _rows(vectors: npt.ArrayLike | None) -> npt.NDArray[np.float32]:
    rows = np.asarray(vectors, dtype=np.float32)
    if rows.ndim != 2:
        raise ServeError(f"batch_search: vectors of shape {rows.shape}; give (n, d)")
    return rows


def _vector(vector: npt.ArrayLike) -> pb.Vector:
    numbers = np.asarray(vector, dtype=np.float32)
    if numbers.ndim != 1:
        raise ServeError(f"search: a vector of shape {numbers.shape}; give one of shape (d,)")
    return to_message(numbers, pb.VECTOR_ENCODING_F32_LE)


def _hits(hits: Iterable[pb.Hit]) -> tuple[Hit, ...]:
    return tuple(Hit(hit.doc_id, hit.score, hit.rank) for hit in hits)


def _timings(message: pb.Timings) -> Timings:
    return Timings(message.tokenize_ns, message.queue_ns, message.encode_ns, message.search_ns, message.total_ns)


def _encoder(message: pb.EncoderInfo) -> EncoderInfo:
    return EncoderInfo(
        message.name,
        message.fingerprint,
        message.space_fingerprint,
        message.dimension,
        message.max_length,
        message.normalized,
        message.precision,
    )
