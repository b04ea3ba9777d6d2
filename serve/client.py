"""Typed clients, one that blocks and one for asyncio; importing them loads neither encoder nor index library.

Both keep one connection, give every call a deadline, and repeat a call only when the server has said
when to (``RetryInfo``) and the deadline allows it: clients that retry on their own keep an overloaded
server overloaded. Every failure is a :class:`ServeError` with one line that says what went wrong.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.errors import ServeError
from serve import messages
from serve.health import check_health
from serve.limits import Limits
from serve.messages import (
    DEADLINE_SECONDS,
    EMBED_TEXTS,
    RETRIES,
    Document,
    EncoderInfo,
    Hit,
    IndexInfo,
    IndexSummary,
    Options,
    SearchResult,
    ServerInfo,
    Timings,
    Tls,
    Write,
)

__all__ = [
    "AsyncRetrievalClient",
    "Document",
    "EncoderInfo",
    "Hit",
    "IndexInfo",
    "IndexSummary",
    "Options",
    "RetrievalClient",
    "SearchResult",
    "ServeError",
    "ServerInfo",
    "Timings",
    "Tls",
    "Write",
]

Response = TypeVar("Response")
_POLL_SECONDS = 0.05
_KEEPALIVE_OPTIONS = [
    # A stream has no deadline, and a connection that a network swallows says nothing: only a ping finds out. Servers
    # hang up on clients that ping more often than every 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    # Some versions of gRPC go by one of the two, some by the other.
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # gRPC would stop pinging after two pings without data, just when a stream is quiet.
    ("grpc.http2.max_pings_without_data", 0),
]


class _Connection:
    """What both clients know about their server."""

    def __init__(self, target: str, timeout: float, tls: Tls | None, token: str | None, retries: int) -> None:
        if not target or not target.isprintable():
            raise ServeError(f"{target!r} is no server's address; give HOST:PORT")
        self.target = target
        self.timeout = timeout
        self.retries = retries
        self.metadata = messages.token_metadata(target, token, tls)
        self.credentials = None if tls is None else tls.credentials()
        self.options = [*Limits().message_options(), *_KEEPALIVE_OPTIONS]

    def failed(self, name: str, error: grpc.RpcError) -> ServeError:
        return ServeError(f"{name} at {self.target}: {messages.explain(error, self.timeout)}")

    def pause(self, error: grpc.RpcError, attempt: int, give_up: float) -> float | None:
        """Return how long to wait before the next attempt; None when there shall be none."""
        seconds = messages.retry_seconds(error)
        if seconds is None or attempt >= self.retries or time.monotonic() + seconds >= give_up:
            return None
        return seconds

    def searched(self, answer: pb.StreamSearchResponse) -> SearchResult | ServeError:
        """Return what became of one query of a stream; the others have outcomes of their own."""
        if answer.WhichOneof("outcome") == "error":
            why = messages.explain_status(answer.error)
            return ServeError(f"search_stream at {self.target}: query {answer.tag}: {why}")
        return messages.read_search(answer.response)

    def embedded(self, answer: pb.StreamEmbedResponse) -> npt.NDArray[np.float32]:
        """Return the vectors of some texts of a stream, which are of no use without those of the others."""
        if answer.WhichOneof("outcome") == "error":
            why, start = messages.explain_status(answer.error), answer.tag * EMBED_TEXTS
            raise ServeError(f"embed_stream at {self.target}: of the {EMBED_TEXTS} texts from number {start}: {why}")
        return messages.read_vectors(answer.response)

    def is_ready(self, timeout: float, give_up: float) -> bool:
        """Ask once whether the server answers requests; False while there is time to ask again."""
        patience = max(_POLL_SECONDS, min(self.timeout, give_up - time.monotonic()))
        try:
            check_health(self.target, patience, self.credentials)
        except ServeError as error:
            if time.monotonic() >= give_up:
                raise ServeError(f"{error}; waited {timeout:g} s") from None
            return False
        return True


class _Stubs:
    def __init__(self, channel: Any) -> None:
        self.retrieval = rpc.RetrievalServiceStub(channel)
        self.rerank = rpc.RerankServiceStub(channel)
        self.embedding = rpc.EmbeddingServiceStub(channel)
        self.index = rpc.IndexServiceStub(channel)
        self.admin = rpc.IndexAdminServiceStub(channel)
        self.info = rpc.ServerInfoServiceStub(channel)


class RetrievalClient:
    """Talks to one server over one channel; safe to share between threads."""

    def __init__(
        self,
        target: str,
        timeout: float = DEADLINE_SECONDS,
        tls: Tls | None = None,
        token: str | None = None,
        retries: int = RETRIES,
    ) -> None:
        """Prepare a channel; nothing is sent yet.

        Args:
            target: ``HOST:PORT``.
            timeout: Seconds that each call may take, its retries included.
            tls: Encrypt the connection; plain text when None.
            token: Bearer token.
            retries: How often a call is repeated when the server asks for it.

        Raises:
            ServeError: a TLS file cannot be read, or a token would travel in plain text.
        """
        self._to = _Connection(target, timeout, tls, token, retries)
        if self._to.credentials is None:
            self._channel = grpc.insecure_channel(target, options=self._to.options)
        else:
            self._channel = grpc.secure_channel(target, self._to.credentials, options=self._to.options)
        self._stubs = _Stubs(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def search(
        self,
        text: str | None = None,
        vector: npt.ArrayLike | None = None,
        top_k: int = 10,
        options: Options | None = None,
    ) -> SearchResult:
        """Rank documents against one text or one vector ``[d]``; give exactly one of the two."""
        request = messages.search_request(text, vector, top_k, options)
        return messages.read_search(self._call("search", self._stubs.retrieval.Search, request))

    def search_sets(
        self,
        like: Sequence[Sequence[str]],
        unlike: Sequence[Sequence[str]] = (),
        top_k: int = 10,
        options: Options | None = None,
    ) -> SearchResult:
        """Rank documents by likeness to some sets of example texts and unlikeness to others (arXiv 2404.17606)."""
        request = messages.sets_request(like, unlike, top_k, options)
        return messages.read_search(self._call("search_sets", self._stubs.retrieval.Search, request))

    def batch_search(
        self,
        texts: Sequence[str] | None = None,
        top_k: int = 10,
        *,
        vectors: npt.ArrayLike | None = None,
        options: Options | None = None,
    ) -> list[SearchResult]:
        """Rank documents against many texts, or vectors ``[n, d]``, as many in each call as servers take, in order."""
        found = []
        for request in messages.batch_requests(texts, vectors, top_k, options):
            found += messages.read_batch(self._call("batch_search", self._stubs.retrieval.BatchSearch, request))
        return found

    def search_stream(
        self, texts: Iterable[str], top_k: int = 10, options: Options | None = None
    ) -> Iterator[SearchResult | ServeError]:
        """Rank documents against texts as they come; an outcome for each in their order, without a deadline.

        A text that cannot be searched for, such as a blank line, yields the error, and the stream goes on. Where
        ``texts`` itself raises, that is raised here after the answers to what came before.

        Raises:
            ServeError: the stream itself failed, or a text is not valid Unicode.
        """
        requests = messages.tagged_searches(texts, top_k, options)
        yield from map(self._to.searched, self._stream("search_stream", self._stubs.retrieval.StreamSearch, requests))

    def embed(self, texts: Sequence[str], documents: bool = False) -> npt.NDArray[np.float32]:
        """Return the vectors of queries, or of documents, float32 ``[len(texts), d]``."""
        request = messages.embed_request("embed", texts, documents)
        return messages.read_vectors(self._call("embed", self._stubs.embedding.Embed, request))

    def embed_stream(self, texts: Sequence[str], documents: bool = False) -> npt.NDArray[np.float32]:
        """Return the vectors of many texts, float32 ``[len(texts), d]``; the server serves queries first.

        Raises:
            ServeError: the stream failed, or the server refused a text; says which.
        """
        requests = messages.tagged_embeds(texts, documents)
        answers = self._stream("embed_stream", self._stubs.embedding.StreamEmbed, requests)
        return np.concatenate([self._to.embedded(answer) for answer in answers])

    def rerank(self, query: str, documents: Mapping[str, str] | Sequence[str], top_k: int = 0) -> SearchResult:
        """Order documents by the server's reranker: texts by id, or ids whose texts the index stores."""
        request = messages.rerank_request(query, documents, top_k)
        return messages.read_rerank(self._call("rerank", self._stubs.rerank.Rerank, request))

    def server_info(self) -> ServerInfo:
        """Return what serves, and its limits."""
        return messages.read_server_info(
            self._call("server_info", self._stubs.info.GetServerInfo, pb.GetServerInfoRequest())
        )

    def index(self) -> IndexInfo:
        """Return what is searched."""
        return messages.read_index(self._call("index", self._stubs.index.GetIndex, pb.GetIndexRequest()))

    def indexes(self) -> list[IndexSummary]:
        """Return every version that the store keeps, oldest first."""
        return messages.read_indexes(self._call("indexes", self._stubs.index.ListIndexes, pb.ListIndexesRequest()))

    def publish(self, index_version: str = "", timeout: float = 600.0) -> str:
        """Let the server serve a version, the store's current one when empty; return the one served before."""
        request = messages.publish_request(index_version)
        response: pb.PublishIndexResponse = self._call("publish", self._stubs.admin.PublishIndex, request, timeout)
        return response.previous_version

    def rollback(self, timeout: float = 600.0) -> str:
        """Let the server serve the version before the one it serves; return its name."""
        request = pb.RollbackIndexRequest()
        response: pb.RollbackIndexResponse = self._call("rollback", self._stubs.admin.RollbackIndex, request, timeout)
        return response.index_version

    def upsert(self, documents: Sequence[Document], timeout: float = 60.0) -> Write:
        """Add documents or replace those of the same id."""
        request = messages.upsert_request(documents)
        return messages.read_write(self._call("upsert", self._stubs.admin.UpsertDocuments, request, timeout))

    def delete(self, doc_ids: Sequence[str], timeout: float = 60.0) -> Write:
        """Remove documents."""
        request = messages.delete_request(doc_ids)
        return messages.read_write(self._call("delete", self._stubs.admin.DeleteDocuments, request, timeout))

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Return once the server answers requests; ``timeout`` in seconds."""
        give_up = time.monotonic() + timeout
        while not self._to.is_ready(timeout, give_up):
            time.sleep(_POLL_SECONDS)

    def _call(
        self, name: str, method: Callable[..., Response], request: Message, timeout: float | None = None
    ) -> Response:
        give_up = time.monotonic() + (timeout or self._to.timeout)
        attempt = 0
        while True:
            try:
                return method(request, timeout=max(0.0, give_up - time.monotonic()), metadata=self._to.metadata)
            except ValueError as error:
                raise _closed(name, error) from None
            except grpc.RpcError as error:
                pause = self._to.pause(error, attempt, give_up)
                if pause is None:
                    raise self._to.failed(name, error) from None
            attempt += 1
            time.sleep(pause)

    def _stream(self, name: str, method: Callable[..., Iterable[Response]], requests: Iterator[Any]) -> Iterator[Any]:
        source = _Source()
        try:
            yield from method(source.each(requests), metadata=self._to.metadata)
        except ValueError as error:
            raise _closed(name, error) from None
        except grpc.RpcError as error:
            raise self._to.failed(name, error) from None
        source.check()


def _closed(name: str, error: Exception) -> ServeError:
    """Return the failure of a call on a closed channel, which is all that gRPC raises so once a request is made."""
    return ServeError(f"{name}: {error} Make a new client.")


class _Source:
    """A stream's requests, which end where making one fails.

    gRPC reads them where an error has nobody to go to: it would be logged, and the answers on their way lost.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None

    def each(self, requests: Iterator[Any]) -> Iterator[Any]:
        """Hand on requests."""
        try:
            yield from requests
        except Exception as error:  # noqa: BLE001  whatever the caller's own iterator raises is the caller's
            self._error = error

    async def each_async(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Hand on requests that come asynchronously."""
        try:
            async for request in requests:
                yield request
        except Exception as error:  # noqa: BLE001  whatever the caller's own iterator raises is the caller's
            self._error = error

    def check(self) -> None:
        """Raise what ended the requests early, now that all that were sent are answered."""
        if self._error is not None:
            raise self._error


class AsyncRetrievalClient:
    """Talks to one server over one channel, on the event loop that makes it; as :class:`RetrievalClient` otherwise."""

    def __init__(
        self,
        target: str,
        timeout: float = DEADLINE_SECONDS,
        tls: Tls | None = None,
        token: str | None = None,
        retries: int = RETRIES,
    ) -> None:
        """Prepare a channel; nothing is sent yet. For the arguments see :class:`RetrievalClient`."""
        self._to = _Connection(target, timeout, tls, token, retries)
        if self._to.credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=self._to.options)
        else:
            self._channel = grpc.aio.secure_channel(target, self._to.credentials, options=self._to.options)
        self._stubs = _Stubs(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(None)

    async def search(
        self,
        text: str | None = None,
        vector: npt.ArrayLike | None = None,
        top_k: int = 10,
        options: Options | None = None,
    ) -> SearchResult:
        """Rank documents against one text or one vector ``[d]``; give exactly one of the two."""
        request = messages.search_request(text, vector, top_k, options)
        return messages.read_search(await self._call("search", self._stubs.retrieval.Search, request))

    async def search_sets(
        self,
        like: Sequence[Sequence[str]],
        unlike: Sequence[Sequence[str]] = (),
        top_k: int = 10,
        options: Options | None = None,
    ) -> SearchResult:
        """Rank documents by likeness to some sets of example texts and unlikeness to others (arXiv 2404.17606)."""
        request = messages.sets_request(like, unlike, top_k, options)
        return messages.read_search(await self._call("search_sets", self._stubs.retrieval.Search, request))

    async def batch_search(
        self,
        texts: Sequence[str] | None = None,
        top_k: int = 10,
        *,
        vectors: npt.ArrayLike | None = None,
        options: Options | None = None,
    ) -> list[SearchResult]:
        """Rank documents against many texts, or vectors ``[n, d]``, as many in each call as servers take, in order."""
        found = []
        for request in messages.batch_requests(texts, vectors, top_k, options):
            found += messages.read_batch(await self._call("batch_search", self._stubs.retrieval.BatchSearch, request))
        return found

    async def search_stream(
        self, texts: Iterable[str] | AsyncIterable[str], top_k: int = 10, options: Options | None = None
    ) -> AsyncIterator[SearchResult | ServeError]:
        """Rank documents against texts as they come; an outcome for each, as :class:`RetrievalClient` has it.

        A plain iterable is read on the event loop: texts that are waited for should come asynchronously.
        """
        requests: Iterator[Any] | AsyncIterator[Any]
        if isinstance(texts, AsyncIterable):
            requests = messages.tagged_searches_as_they_come(texts, top_k, options)
        else:
            requests = messages.tagged_searches(texts, top_k, options)
        async for answer in self._stream("search_stream", self._stubs.retrieval.StreamSearch, requests):
            yield self._to.searched(answer)

    async def embed(self, texts: Sequence[str], documents: bool = False) -> npt.NDArray[np.float32]:
        """Return the vectors of queries, or of documents, float32 ``[len(texts), d]``."""
        request = messages.embed_request("embed", texts, documents)
        return messages.read_vectors(await self._call("embed", self._stubs.embedding.Embed, request))

    async def embed_stream(self, texts: Sequence[str], documents: bool = False) -> npt.NDArray[np.float32]:
        """Return the vectors of many texts, float32 ``[len(texts), d]``; the server serves queries first."""
        requests = messages.tagged_embeds(texts, documents)
        answers = self._stream("embed_stream", self._stubs.embedding.StreamEmbed, requests)
        return np.concatenate([self._to.embedded(answer) async for answer in answers])

    async def rerank(self, query: str, documents: Mapping[str, str] | Sequence[str], top_k: int = 0) -> SearchResult:
        """Order documents by the server's reranker: texts by id, or ids whose texts the index stores."""
        request = messages.rerank_request(query, documents, top_k)
        return messages.read_rerank(await self._call("rerank", self._stubs.rerank.Rerank, request))

    async def server_info(self) -> ServerInfo:
        """Return what serves, and its limits."""
        request = pb.GetServerInfoRequest()
        return messages.read_server_info(await self._call("server_info", self._stubs.info.GetServerInfo, request))

    async def index(self) -> IndexInfo:
        """Return what is searched."""
        request = pb.GetIndexRequest()
        return messages.read_index(await self._call("index", self._stubs.index.GetIndex, request))

    async def indexes(self) -> list[IndexSummary]:
        """Return every version that the store keeps, oldest first."""
        return messages.read_indexes(
            await self._call("indexes", self._stubs.index.ListIndexes, pb.ListIndexesRequest())
        )

    async def publish(self, index_version: str = "", timeout: float = 600.0) -> str:  # noqa: ASYNC109  as RetrievalClient has it
        """Let the server serve a version, the store's current one when empty; return the one served before."""
        request = messages.publish_request(index_version)
        response: pb.PublishIndexResponse = await self._call(
            "publish", self._stubs.admin.PublishIndex, request, timeout
        )
        return response.previous_version

    async def rollback(self, timeout: float = 600.0) -> str:  # noqa: ASYNC109  as RetrievalClient has it
        """Let the server serve the version before the one it serves; return its name."""
        request = pb.RollbackIndexRequest()
        response: pb.RollbackIndexResponse = await self._call(
            "rollback", self._stubs.admin.RollbackIndex, request, timeout
        )
        return response.index_version

    async def upsert(self, documents: Sequence[Document], timeout: float = 60.0) -> Write:  # noqa: ASYNC109  as RetrievalClient has it
        """Add documents or replace those of the same id."""
        request = messages.upsert_request(documents)
        return messages.read_write(await self._call("upsert", self._stubs.admin.UpsertDocuments, request, timeout))

    async def delete(self, doc_ids: Sequence[str], timeout: float = 60.0) -> Write:  # noqa: ASYNC109  as RetrievalClient has it
        """Remove documents."""
        request = messages.delete_request(doc_ids)
        return messages.read_write(await self._call("delete", self._stubs.admin.DeleteDocuments, request, timeout))

    async def wait_until_ready(self, timeout: float = 60.0) -> None:  # noqa: ASYNC109  as RetrievalClient has it
        """Return once the server answers requests; ``timeout`` in seconds."""
        give_up = time.monotonic() + timeout
        while not await asyncio.to_thread(self._to.is_ready, timeout, give_up):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_SECONDS)

    async def _call(
        self, name: str, method: Callable[..., Awaitable[Response]], request: Message, seconds: float | None = None
    ) -> Response:
        give_up = time.monotonic() + (seconds or self._to.timeout)
        attempt = 0
        while True:
            try:
                return await method(request, timeout=max(0.0, give_up - time.monotonic()), metadata=self._to.metadata)
            except grpc.aio.UsageError as error:
                raise _closed(name, error) from None
            except grpc.RpcError as error:
                pause = self._to.pause(error, attempt, give_up)
                if pause is None:
                    raise self._to.failed(name, error) from None
            attempt += 1
            await asyncio.sleep(pause)

    async def _stream(
        self, name: str, method: Callable[..., Any], requests: Iterator[Any] | AsyncIterator[Any]
    ) -> AsyncIterator[Any]:
        source = _Source()
        handed: Any = source.each_async(requests) if isinstance(requests, AsyncIterator) else source.each(requests)
        try:
            async for answer in method(handed, metadata=self._to.metadata):
                yield answer
        except grpc.aio.UsageError as error:
            raise _closed(name, error) from None
        except grpc.RpcError as error:
            raise self._to.failed(name, error) from None
        source.check()
