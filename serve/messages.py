"""What both clients share: typed results, requests made from Python values, failures said in one line."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import numpy as np
import numpy.typing as npt
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from retrieval_kd.errors import ServeError
from serve.fields import fields_of_hit, fields_to_message
from serve.filters import filter_to_message
from serve.limits import Limits
from serve.texts import sendable
from serve.tls import is_loopback
from serve.vectors import from_message, to_message

T = TypeVar("T")
Texts = TypeVar("Texts", bound=Iterable[str] | AsyncIterable[str])
DEADLINE_SECONDS = 5.0
"""A call without a deadline waits for ever when a network swallows it."""
RETRIES = 3
EMBED_TEXTS = 32
_DETAILS = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Hit:
    """One document: its id, its float32 score, its rank from 1, and the stored fields that were asked for.

    Among the fields a whole number is an ``int``; an integer beyond ``2**53 - 1`` in magnitude is its decimal string.
    """

    doc_id: str
    score: float
    rank: int
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the server's time went, in nanoseconds."""

    tokenize_ns: int
    queue_ns: int
    encode_ns: int
    search_ns: int
    rescore_ns: int
    total_ns: int


@dataclass(frozen=True, slots=True)
class SearchResult:
    """One query's ranking.

    Attributes:
        hits: Best first.
        index_version: The index version that was searched.
        query_encoder: Fingerprint of the query encoder being served; of the reranker after a rerank.
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
    """The server's version, its query encoder, its limits, the index version it serves, and its reranker if any."""

    server_version: str
    query_encoder: EncoderInfo
    limits: Limits
    index_version: str
    reranker: str


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """The index version being searched."""

    index_version: str
    kind: str
    document_count: int
    dimension: int
    document_encoder: EncoderInfo


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """One version that the store keeps."""

    index_version: str
    serving: bool
    created_at: str
    kind: str
    document_count: int
    dimension: int


@dataclass(frozen=True, slots=True)
class Write:
    """What a change of documents led to.

    Attributes:
        index_version: The index version that was changed.
        document_count: Documents that can be found from now on.
        document_encoder: Fingerprint of the encoder that encoded them; empty after a deletion.
        timings: The server's time.
    """

    index_version: str
    document_count: int
    document_encoder: str
    timings: Timings


@dataclass(frozen=True, slots=True)
class Document:
    """A document to be searched.

    Attributes:
        doc_id: Its id.
        text: Its text without its title, stored as the field ``text``.
        vector: Its vector; when None the server encodes title and text as a build does, joined by a space.
        fields: What else is stored with it, its ``title`` among it; JSON values.
    """

    doc_id: str
    text: str = ""
    vector: npt.ArrayLike | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Options:
    """How to search.

    Attributes:
        filter: Which documents may be found, such as ``{"range": {"year": {"ge": 2020}}}``; see
            :func:`serve.filters.filter_to_message`.
        fields: Stored fields to return with each hit; ``"*"`` for all.
        exact: Compare with every document, whatever the index's kind.
        ef_search: Nodes that a graph keeps in view; as tuned when None.
        probes: Lists that are opened; as tuned when None.
        oversample: Candidates scored for each document wanted; as tuned when None.
        rerank_depth: How many of the best documents the server's reranker orders again.
    """

    filter: Mapping[str, Any] | None = None
    fields: Sequence[str] = ()
    exact: bool = False
    ef_search: int | None = None
    probes: int | None = None
    oversample: int | None = None
    rerank_depth: int = 0

    def to_message(self) -> pb.SearchOptions:
        """Return the options as the protocol has them."""
        depth = checked_count("rerank_depth", self.rerank_depth)
        message = pb.SearchOptions(fields=self.fields, exact=self.exact, rerank_depth=depth)
        if self.filter is not None:
            message.filter.CopyFrom(filter_to_message(self.filter))
        for name in ("ef_search", "probes", "oversample"):
            if (number := getattr(self, name)) is not None:
                setattr(message.effort, name, checked_count(name, number))
        return message


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of an encrypted connection.

    Attributes:
        ca: Authorities of the server's certificate; the system's when None.
        certificate: The client's own certificate, for servers that ask for one.
        key: The private key of ``certificate``.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            ServeError: one cannot be read or is not PEM, or the key is not the certificate's.
        """
        if (self.certificate is None) != (self.key is None):
            raise ServeError("a client's certificate and its key belong together; give both")
        try:
            ca, key, certificate = (
                None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.certificate)
            )
        except OSError as error:
            raise ServeError(f"{error.filename}: cannot be read ({error.strerror}); give a PEM file") from None
        self._require_pem()
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def _require_pem(self) -> None:
        """Check the files: gRPC itself takes what is no PEM in silence and then fails every connection."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        wrong = f"{self.ca}: not the certificate of an authority"
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            if self.certificate is not None:
                wrong = f"{self.certificate}, {self.key}: not a certificate and its key"
                # An empty password, for one would be asked for on the terminal, and gRPC reads no encrypted key.
                context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            raise ServeError(f"{wrong} ({error}); give them as PEM") from None


def token_metadata(target: str, token: str | None, tls: Tls | None) -> list[tuple[str, str]]:
    """Return what a call carries to prove itself.

    Raises:
        ServeError: the token would travel in plain text to another machine, or no header can carry it.
    """
    if token is None:
        return []
    if not (token.isascii() and token.isprintable()):
        raise ServeError(
            f"{target}: the token is not printable ASCII, which alone a header carries; give the right one"
        )
    if tls is None and not is_loopback(target.rpartition(":")[0]):
        raise ServeError(f"{target}: a token in plain text could be read on its way; give tls")
    return [("authorization", f"Bearer {token}")]


@sendable("search")
def search_request(
    text: str | None, vector: npt.ArrayLike | None, top_k: int, options: Options | None
) -> pb.SearchRequest:
    """Return the request for one text or one vector ``[d]``."""
    if (text is None) == (vector is None):
        raise ServeError("search: give either a text or a vector")
    request = pb.SearchRequest(top_k=checked_count("top_k", top_k))
    if options is not None:
        request.options.CopyFrom(options.to_message())
    if text is not None:
        request.text = text
    else:
        request.vector.CopyFrom(_vector(vector))
    return request


@sendable("search_sets")
def sets_request(
    like: Sequence[Sequence[str]], unlike: Sequence[Sequence[str]], top_k: int, options: Options | None
) -> pb.SearchRequest:
    """Return the request for sets of example texts."""
    request = pb.SearchRequest(top_k=checked_count("top_k", top_k))
    if options is not None:
        request.options.CopyFrom(options.to_message())
    request.sets.SetInParent()
    for sets, operation in ((like, pb.SET_OPERATION_INTERSECTION), (unlike, pb.SET_OPERATION_DIFFERENCE)):
        for texts in sets:
            members = [pb.SetMember(text=text) for text in checked_texts("search_sets", texts)]
            request.sets.terms.append(pb.SetTerm(members=members, operation=operation))
    return request


@sendable("batch_search")
def batch_requests(
    texts: Sequence[str] | None, vectors: npt.ArrayLike | None, top_k: int, options: Options | None
) -> list[pb.BatchSearchRequest]:
    """Return the requests for many texts or vectors ``[n, d]``, none larger than servers take by default."""
    if (texts is None) == (vectors is None):
        raise ServeError("batch_search: give either texts or vectors")
    if texts is not None:
        queries = [pb.Query(text=text) for text in checked_texts("batch_search", texts)]
    else:
        queries = [pb.Query(vector=_vector(vector)) for vector in _rows(vectors)]
    message = None if options is None else options.to_message()
    return [
        pb.BatchSearchRequest(queries=some, top_k=checked_count("top_k", top_k), options=message)
        for some in chunks(queries, _batch_size(options)) or [[]]
    ]


def _batch_size(options: Options | None) -> int:
    """Return how many queries a server takes at once by default."""
    limits = Limits()
    depth = 0 if options is None else options.rerank_depth
    return min(limits.max_batch_queries, max(1, limits.max_rerank_pairs // max(1, depth)))


@sendable("embed")
def embed_request(name: str, texts: Sequence[str], documents: bool) -> pb.EmbedRequest:
    """Return the request for the vectors of texts."""
    return pb.EmbedRequest(
        texts=checked_texts(name, texts),
        vector_encoding=pb.VECTOR_ENCODING_F32_LE,
        input_type=pb.INPUT_TYPE_DOCUMENT if documents else pb.INPUT_TYPE_QUERY,
    )


@sendable("rerank")
def rerank_request(query: str, documents: Mapping[str, str] | Sequence[str], top_k: int) -> pb.RerankRequest:
    """Return the request to order texts by id, or ids whose texts the index stores."""
    texts = documents if isinstance(documents, Mapping) else dict.fromkeys(checked_texts("rerank", documents), "")
    return pb.RerankRequest(
        query=query,
        documents=[pb.RerankDocument(doc_id=doc_id, text=text) for doc_id, text in texts.items()],
        top_k=checked_count("top_k", top_k),
    )


@sendable("upsert")
def upsert_request(documents: Sequence[Document]) -> pb.UpsertDocumentsRequest:
    """Return the request to add or replace documents.

    Raises:
        ServeError: a field holds what JSON has not; names the document.
    """
    request = pb.UpsertDocumentsRequest()
    for document in documents:
        message = request.documents.add(doc_id=document.doc_id, text=document.text)
        if document.vector is not None:
            message.vector.CopyFrom(_vector(document.vector))
        try:
            message.fields.CopyFrom(fields_to_message(document.fields))
        except ValueError as error:
            raise ServeError(f"upsert: document {document.doc_id!r}: a field is no JSON value ({error})") from None
    return request


@sendable("publish")
def publish_request(index_version: str) -> pb.PublishIndexRequest:
    """Return the request to serve a version, the store's current one when empty."""
    return pb.PublishIndexRequest(index_version=index_version)


@sendable("delete")
def delete_request(doc_ids: Sequence[str]) -> pb.DeleteDocumentsRequest:
    """Return the request to remove documents."""
    return pb.DeleteDocumentsRequest(doc_ids=checked_texts("delete", doc_ids))


def read_search(response: pb.SearchResponse) -> SearchResult:
    """Return a search's result."""
    return SearchResult(
        _hits(response.hits), response.index_version, response.query_encoder, _timings(response.timings)
    )


def read_batch(response: pb.BatchSearchResponse) -> list[SearchResult]:
    """Return a batch's results in the order of its queries."""
    timings = _timings(response.timings)
    return [
        SearchResult(_hits(result.hits), response.index_version, response.query_encoder, timings)
        for result in response.results
    ]


def read_rerank(response: pb.RerankResponse) -> SearchResult:
    """Return a rerank's result."""
    return SearchResult(_hits(response.hits), response.index_version, response.reranker, _timings(response.timings))


def read_vectors(response: pb.EmbedResponse) -> npt.NDArray[np.float32]:
    """Return float32 ``[n, d]``."""
    return np.stack([from_message(vector) for vector in response.vectors])


def read_server_info(response: pb.GetServerInfoResponse) -> ServerInfo:
    """Return what serves."""
    limits = Limits(**{one.name: getattr(response.limits, one.name) for one in pb.Limits.DESCRIPTOR.fields})
    return ServerInfo(
        response.server_version,
        _encoder(response.query_encoder),
        limits,
        response.index_version,
        response.reranker,
    )


def read_index(response: pb.GetIndexResponse) -> IndexInfo:
    """Return what is searched."""
    return IndexInfo(
        response.index_version,
        response.kind,
        response.document_count,
        response.dimension,
        _encoder(response.document_encoder),
    )


def read_write(response: pb.UpsertDocumentsResponse | pb.DeleteDocumentsResponse) -> Write:
    """Return what a change of documents led to."""
    encoder = response.document_encoder if isinstance(response, pb.UpsertDocumentsResponse) else ""
    return Write(response.index_version, response.document_count, encoder, _timings(response.timings))


def read_indexes(response: pb.ListIndexesResponse) -> list[IndexSummary]:
    """Return the versions of a store."""
    return [
        IndexSummary(one.index_version, one.serving, one.created_at, one.kind, one.document_count, one.dimension)
        for one in response.indexes
    ]


def retry_seconds(error: grpc.RpcError) -> float | None:
    """Return after how many seconds the server wants the call again; None where it has not said so."""
    status = _status(error)
    return None if status is None else _retry_info(status)


def explain(error: grpc.RpcError, timeout: float) -> str:
    """Return what went wrong with a call, in one line."""
    status = _status(error)
    if status is not None:
        return explain_status(status)
    code, details = error.code(), error.details()
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return f"nothing answers there ({details}); start the server or mend the address"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer within {timeout:g} s; allow more time or send less at once"
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return f"{details}; send less at once"
        case _:
            return f"{code.name} {details}"


def explain_status(status: status_pb2.Status) -> str:
    """Return a status' message with the server's advice when to come back."""
    seconds = _retry_info(status)
    return str(status.message) if seconds is None else f"{status.message} (retry after {1e3 * seconds:.0f} ms)"


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut a sequence into pieces of at most ``size``."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def tagged_searches(texts: Iterable[str], top_k: int, options: Options | None) -> Iterator[pb.StreamSearchRequest]:
    """Return the requests of a stream of searches, numbered.

    Raises:
        ServeError: the wire cannot carry ``top_k`` or the filter, or one bare text.
    """
    tagged = _tagger(texts, top_k, options)
    return (tagged(tag, text) for tag, text in enumerate(texts))


def tagged_searches_as_they_come(
    texts: AsyncIterable[str], top_k: int, options: Options | None
) -> AsyncIterator[pb.StreamSearchRequest]:
    """Return what :func:`tagged_searches` does, of texts that come asynchronously."""
    tagged = _tagger(texts, top_k, options)

    async def requests() -> AsyncIterator[pb.StreamSearchRequest]:
        tag = 0
        async for text in texts:
            yield tagged(tag, text)
            tag += 1

    return requests()


def _tagger(
    texts: Iterable[str] | AsyncIterable[str], top_k: int, options: Options | None
) -> Callable[[int, str], pb.StreamSearchRequest]:
    checked_texts("search_stream", texts)
    # At once: gRPC reads a stream's requests where an error has nobody to go to.
    search_request("", None, top_k, options)
    return lambda tag, text: pb.StreamSearchRequest(tag=tag, search=search_request(text, None, top_k, options))


def tagged_embeds(texts: Sequence[str], documents: bool) -> Iterator[pb.StreamEmbedRequest]:
    """Return the requests of a stream of encodings, numbered.

    Raises:
        ServeError: there are no texts, so that nobody could say how wide their vectors are; one bare text; or a text
            that is not valid Unicode.
    """
    if len(checked_texts("embed_stream", texts)) == 0:
        raise ServeError("embed_stream: texts has 0 entries; give at least 1")
    with sendable("embed_stream"):
        for text in texts:
            text.encode()
    return (
        pb.StreamEmbedRequest(tag=tag, embed=embed_request("embed_stream", some, documents))
        for tag, some in enumerate(chunks(texts, EMBED_TEXTS))
    )


def checked_count(name: str, count: int) -> int:
    """Refuse here what the wire cannot carry; every other limit is the server's to judge."""
    if not 0 <= count < 2**32:
        raise ServeError(f"{name}: is {count}; give {'1 or more' if count < 0 else 'less than 2^32'}")
    return count


def checked_texts(name: str, texts: Texts) -> Texts:
    """Refuse a bare string: it is a sequence of texts of one letter each."""
    if isinstance(texts, str):
        raise ServeError(f"{name}: give a list of texts, not one text")
    return texts


def _rows(vectors: npt.ArrayLike | None) -> npt.NDArray[np.float32]:
    rows = _numbers("batch_search", vectors)
    if rows.ndim != 2:
        raise ServeError(f"batch_search: vectors of shape {rows.shape}; give (n, d)")
    return rows


def _numbers(name: str, vectors: npt.ArrayLike | None) -> npt.NDArray[np.float32]:
    try:
        # What no float32 holds becomes infinite, which the server refuses.
        with np.errstate(over="ignore"):
            return np.asarray(vectors, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ServeError(f"{name}: the vector is not an array of numbers ({error})") from None


def _vector(vector: npt.ArrayLike | None) -> pb.Vector:
    numbers = _numbers("search", vector)
    if numbers.ndim != 1:
        raise ServeError(f"search: a vector of shape {numbers.shape}; give one of shape (d,)")
    return to_message(numbers, pb.VECTOR_ENCODING_F32_LE)


def _hits(hits: Iterable[pb.Hit]) -> tuple[Hit, ...]:
    return tuple(
        Hit(hit.doc_id, hit.score, hit.rank, fields_of_hit(hit.fields) if hit.HasField("fields") else {})
        for hit in hits
    )


def _timings(message: pb.Timings) -> Timings:
    return Timings(
        message.tokenize_ns,
        message.queue_ns,
        message.encode_ns,
        message.search_ns,
        message.rescore_ns,
        message.total_ns,
    )


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


def _status(error: grpc.RpcError) -> status_pb2.Status | None:
    """Return the google.rpc status of a failed call, from either kind of client; None when it has none."""
    for key, value in cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ()):
        if key == _DETAILS:
            return status_pb2.Status.FromString(value)
    return None


def _retry_info(status: status_pb2.Status) -> float | None:
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToMilliseconds()) / 1e3
    return None
