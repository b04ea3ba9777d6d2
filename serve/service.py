"""The servicers: messages in, the engine's work, messages out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import grpc
import numpy as np

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd import __version__
from retrieval_kd.collections.base import Document
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, Side
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Ranking, rank
from serve.engine import Embedded, Engine, EngineSlot
from serve.errors import InvalidRequestError, OverloadedError, PreconditionError, UnknownError, Violation, to_status
from serve.fields import stored_to_message
from serve.filters import filter_from_message
from serve.indexes import DocumentSearcher, IndexHandle
from serve.limits import Limits
from serve.reranking import Candidates, Reranker
from serve.searches import Finish
from serve.streams import in_order
from serve.tracing import Tracer
from serve.validate import (
    UNFIT,
    AnyQuery,
    batch_search_violations,
    embed_violations,
    rerank_violations,
    search_violations,
)
from serve.vectors import from_message, to_message

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request", pb.SearchRequest, pb.BatchSearchRequest)
Answer = TypeVar("Answer", pb.SearchResponse, pb.BatchSearchResponse)
Response = TypeVar("Response")
Outcome = TypeVar("Outcome")
Fields = Sequence[Mapping[str, Any]]
ADMIN_SERVICE = "dense.retrieval.v1.IndexAdminService"
SERVICES = tuple(
    service.full_name for service in pb.DESCRIPTOR.services_by_name.values() if service.full_name != ADMIN_SERVICE
)
TEXT_FIELDS = ("title", "text")
_SIDES: Mapping[int, Side] = {pb.INPUT_TYPE_DOCUMENT: "document"}


def add_services(server: grpc.aio.Server, slot: EngineSlot, limits: Limits, tracer: Tracer) -> None:
    """Register every service of ``dense.retrieval.v1`` but the administration."""
    rpc.add_RetrievalServiceServicer_to_server(Retrieval(slot, limits, tracer), server)
    rpc.add_RerankServiceServicer_to_server(Rerank(slot, limits, tracer), server)
    rpc.add_EmbeddingServiceServicer_to_server(Embedding(slot, limits, tracer), server)
    rpc.add_IndexServiceServicer_to_server(Index(slot), server)
    rpc.add_ServerInfoServiceServicer_to_server(ServerInfo(slot, limits), server)


class _Servicer:
    def __init__(self, slot: EngineSlot, limits: Limits, tracer: Tracer) -> None:
        self._slot = slot
        self._limits = limits
        self._tracer = tracer

    def _finish(self, timings: pb.Timings, arrived: int) -> None:
        """Close the timings and hand them to metrics and traces."""
        timings.total_ns = time.perf_counter_ns() - arrived
        stages = {name: getattr(timings, f"{name}_ns") for name in ("tokenize", "queue", "encode", "search", "rescore")}
        for name, nanoseconds in stages.items():
            self._slot.engine.metrics.stage(name, nanoseconds)
        self._tracer.stages(stages)

    async def _patiently(self, work: Callable[[float], Awaitable[Response]], context: Context) -> Response | Exception:
        """Answer one request of a stream: it waits where a single call would be refused, and fails alone."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._limits.seconds_for(context.time_remaining())
        try:
            async with asyncio.timeout_at(give_up):
                while True:
                    try:
                        return await work(give_up - loop.time())
                    except OverloadedError as busy:
                        await asyncio.sleep(busy.retry_after)
        except Exception as error:  # noqa: BLE001 - every failure becomes the request's own status
            return error


class Retrieval(_Servicer, rpc.RetrievalServiceServicer):
    """Search, alone, in a batch and in a stream: one path, so a ranking does not depend on which of them asked."""

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:  # noqa: N802
        """Rank documents against one query."""
        return await self._search(request, self._limits.seconds_for(context.time_remaining()))

    async def BatchSearch(self, request: pb.BatchSearchRequest, context: Context) -> pb.BatchSearchResponse:  # noqa: N802
        """Rank documents against many queries."""
        seconds = self._limits.seconds_for(context.time_remaining())
        return await self._answer(request, request.queries, batch_search_violations, _batch_response, seconds)

    async def StreamSearch(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.StreamSearchRequest], context: Context
    ) -> AsyncIterator[pb.StreamSearchResponse]:
        """Rank documents against queries as they come."""

        async def answer(item: pb.StreamSearchRequest) -> pb.StreamSearchResponse:
            outcome = await self._patiently(lambda seconds: self._search(item.search, seconds), context)
            if isinstance(outcome, Exception):
                return pb.StreamSearchResponse(tag=item.tag, error=to_status(outcome))
            return pb.StreamSearchResponse(tag=item.tag, response=outcome)

        async for response in in_order(request_iterator, answer, self._limits.max_stream_in_flight):
            yield response

    async def _search(self, request: pb.SearchRequest, seconds: float) -> pb.SearchResponse:
        return await self._answer(request, [request], search_violations, _search_response, seconds)

    async def _answer(
        self,
        request: Request,
        queries: Sequence[AnyQuery],
        violations: Callable[[Request, Limits, int], Sequence[Violation]],
        build: Callable[..., Answer],
        seconds: float,
    ) -> Answer:
        arrived = time.perf_counter_ns()
        engine = self._slot.engine
        with engine.index.hold() as handle:
            _refuse(violations(request, self._limits, handle.searcher.dimension))

            def finish(searcher: DocumentSearcher, rankings: Sequence[Ranking], timings: pb.Timings) -> Answer:
                response = build(
                    _hits(searcher, rankings, request.options.fields),
                    index_version=searcher.version,
                    query_encoder=engine.encoder.card.fingerprint,
                    timings=timings,
                )
                _refuse(_size_violations(response.ByteSize(), self._limits))
                return response

            response = await _rank(engine, handle, queries, request.top_k, request.options, seconds, finish)
        self._finish(response.timings, arrived)
        return response


class Rerank(_Servicer, rpc.RerankServiceServicer):
    """The second stage by itself."""

    async def Rerank(self, request: pb.RerankRequest, context: Context) -> pb.RerankResponse:  # noqa: N802
        """Order documents by the reranker's score."""
        arrived = time.perf_counter_ns()
        engine = self._slot.engine
        reranker = _reranker(engine)
        _refuse(rerank_violations(request, self._limits))
        left = _countdown(self._limits.seconds_for(context.time_remaining()))
        engine.require_in_time(0, len(request.documents), left())
        texts = {document.doc_id: document.text for document in request.documents}
        stored = [doc_id for doc_id, text in texts.items() if not text]
        with engine.index.hold() as handle:
            version = handle.searcher.version
            if stored:
                texts |= await engine.searches.run(handle, lambda searcher: _stored_texts(searcher, stored))
        for doc_id, text in texts.items():
            if not text:
                raise UnknownError("dense.retrieval/text", doc_id, f"the index stores no text of {doc_id!r}; send it")
        started = time.perf_counter_ns()
        (logits,) = await engine.rerank(reranker, [Candidates(request.query, list(texts.values()))], left())
        timings = pb.Timings(rescore_ns=time.perf_counter_ns() - started)
        ranking = rank(list(texts), logits, request.top_k or None)
        self._finish(timings, arrived)
        return pb.RerankResponse(
            hits=_ranked_hits(ranking), index_version=version, reranker=reranker.fingerprint, timings=timings
        )


class Embedding(_Servicer, rpc.EmbeddingServiceServicer):
    """Texts to vectors."""

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """Encode texts."""
        side = _SIDES.get(request.input_type, "query")
        return await self._embed(request, side, side, self._limits.seconds_for(context.time_remaining()))

    async def StreamEmbed(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.StreamEmbedRequest], context: Context
    ) -> AsyncIterator[pb.StreamEmbedResponse]:
        """Encode texts as they come, after the queries of others."""

        async def answer(item: pb.StreamEmbedRequest) -> pb.StreamEmbedResponse:
            side = _SIDES.get(item.embed.input_type, "query")
            outcome = await self._patiently(lambda seconds: self._embed(item.embed, side, "document", seconds), context)
            if isinstance(outcome, Exception):
                return pb.StreamEmbedResponse(tag=item.tag, error=to_status(outcome))
            return pb.StreamEmbedResponse(tag=item.tag, response=outcome)

        async for response in in_order(request_iterator, answer, self._limits.max_stream_in_flight):
            yield response

    async def _embed(self, request: pb.EmbedRequest, side: Side, turn: Side, seconds: float) -> pb.EmbedResponse:
        arrived = time.perf_counter_ns()
        engine = self._slot.engine
        version = engine.index.searcher.version
        _refuse(embed_violations(request, self._limits))
        embedded = await engine.embed(request.texts, side, seconds, turn)
        response = pb.EmbedResponse(
            vectors=[to_message(vector, request.vector_encoding) for vector in embedded.vectors],
            query_encoder=engine.encoder.card.fingerprint,
            timings=_timings(embedded),
            index_version=version,
        )
        self._finish(response.timings, arrived)
        return response


class Index(rpc.IndexServiceServicer):
    """What is searched."""

    def __init__(self, slot: EngineSlot) -> None:
        self._slot = slot

    async def ListIndexes(self, request: pb.ListIndexesRequest, context: Context) -> pb.ListIndexesResponse:  # noqa: N802
        """Describe every version of the store."""
        host = self._slot.engine.index
        versions = await host.versions()
        served = host.searcher.version
        return pb.ListIndexesResponse(
            indexes=[
                pb.IndexSummary(
                    index_version=one.version,
                    serving=one.version == served,
                    created_at=one.created_at,
                    kind=one.kind,
                    document_count=one.count,
                    dimension=one.dimension,
                )
                for one in versions
            ]
        )

    async def GetIndex(self, request: pb.GetIndexRequest, context: Context) -> pb.GetIndexResponse:  # noqa: N802
        """Describe the index version being searched."""
        engine = self._slot.engine
        with engine.index.hold() as handle:
            # Counting reads what other processes have written since.
            return await engine.searches.run(handle, _index_info)


class ServerInfo(rpc.ServerInfoServiceServicer):
    """What serves."""

    def __init__(self, slot: EngineSlot, limits: Limits) -> None:
        self._slot = slot
        self._limits = limits

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:  # noqa: N802
        """Describe the server, its query encoder and its limits."""
        engine = self._slot.engine
        return pb.GetServerInfoResponse(
            server_version=__version__,
            query_encoder=_encoder_info(engine.encoder.card),
            limits=pb.Limits(**asdict(self._limits)),
            index_version=engine.index.searcher.version,
            reranker=engine.reranker.fingerprint if engine.reranker is not None else "",
        )


async def _rank(
    engine: Engine,
    handle: IndexHandle,
    queries: Sequence[AnyQuery],
    k: int,
    options: pb.SearchOptions,
    seconds: float,
    finish: Callable[[DocumentSearcher, Sequence[Ranking], pb.Timings], Answer],
) -> Answer:
    """Rank documents and make the answer of them; making it takes longer than finding them, so not on the loop."""
    reranker = _reranker(engine) if options.rerank_depth else None
    left = _countdown(seconds)
    engine.require_in_time(len(queries), len(queries) * options.rerank_depth, left())
    embedded = await engine.embed([text for query in queries for text in _texts(query)], "query", left())
    encoded = iter(embedded.vectors)
    vectors = np.stack([_vector(query, encoded) for query in queries])
    if any(query.WhichOneof("query") == "sets" for query in queries):
        _refuse(_cancelled_out(vectors))
    timings = _timings(embedded)
    started = time.perf_counter_ns()

    def answer(searcher: DocumentSearcher, rankings: Sequence[Ranking], found: int) -> Answer:
        timings.search_ns = found - started
        return finish(searcher, rankings, timings)

    def candidates(
        searcher: DocumentSearcher, rankings: Sequence[Ranking], found: int
    ) -> tuple[DocumentSearcher, Sequence[Ranking]]:
        timings.search_ns = found - started
        return searcher, rankings

    if reranker is None:
        return await _searched(engine, handle, vectors, k, options, left(), answer)
    depth = max(k, options.rerank_depth)
    state, first = await _searched(engine, handle, vectors, depth, options, left(), candidates)
    started = time.perf_counter_ns()
    rankings = await _reranked(engine, reranker, handle, [query.text for query in queries], state, first, k, left())
    timings.rescore_ns = time.perf_counter_ns() - started
    return await engine.searches.run(handle, lambda _: finish(state, rankings, timings))


async def _searched(
    engine: Engine,
    handle: IndexHandle,
    vectors: Vectors,
    k: int,
    options: pb.SearchOptions,
    seconds: float,
    finish: Finish[Outcome],
) -> Outcome:
    """Search the index and finish the answer where it was found."""
    if len(vectors) == 1 and not (options.exact or options.HasField("effort") or options.HasField("filter")):
        return await engine.searches.search(handle, vectors, k, finish, seconds)

    def search(searcher: DocumentSearcher, part: Vectors) -> list[Ranking]:
        return _search(searcher, part, k, options)

    return await engine.searches.search_batch(handle, vectors, search, finish, seconds)


def _search(searcher: DocumentSearcher, vectors: Vectors, k: int, options: pb.SearchOptions) -> list[Ranking]:
    effort = None
    if options.HasField("effort"):
        effort = replace(searcher.effort, **{field.name: number for field, number in options.effort.ListFields()})
    if not options.HasField("filter"):
        return searcher.search(vectors, k, exact=options.exact, effort=effort)
    try:
        wanted = filter_from_message(options.filter)
        return searcher.search(vectors, k, exact=options.exact, filter=wanted, effort=effort)
    except UNFIT as error:
        raise InvalidRequestError([Violation("options.filter", str(error))]) from error


def _fields(searcher: DocumentSearcher, rankings: Sequence[Ranking], wanted: Sequence[str]) -> Sequence[Fields]:
    names = list(searcher.field_types) if "*" in wanted else list(wanted)
    unknown = [name for name in names if name not in searcher.field_types]
    if unknown:
        known = ", ".join(searcher.field_types) or "none"
        _refuse([Violation("options.fields", f"no field {unknown[0]!r} is stored; the index stores {known}")])
    return [_stored(searcher, ranking.doc_ids, names) for ranking in rankings]


def _stored(searcher: DocumentSearcher, doc_ids: Sequence[str], names: Sequence[str]) -> Fields:
    """Return documents' stored fields; one that the index does not have has none."""
    try:
        return searcher.fields(doc_ids, names)
    except DataError:
        found: list[Mapping[str, Any]] = []
        for doc_id in doc_ids:
            try:
                found += searcher.fields([doc_id], names)
            except DataError:
                found.append({})
        return found


async def _reranked(
    engine: Engine,
    reranker: Reranker,
    handle: IndexHandle,
    queries: Sequence[str],
    state: DocumentSearcher,
    rankings: Sequence[Ranking],
    k: int,
    seconds: float,
) -> list[Ranking]:
    def candidates(_: DocumentSearcher) -> list[Candidates]:
        texts = [_stored_texts(state, ranking.doc_ids) if ranking.doc_ids else {} for ranking in rankings]
        return [Candidates(query, list(some.values())) for query, some in zip(queries, texts, strict=True)]

    logits = await engine.rerank(reranker, await engine.searches.run(handle, candidates), seconds)
    return [rank(ranking.doc_ids, some, k) for ranking, some in zip(rankings, logits, strict=True)]


def _stored_texts(searcher: DocumentSearcher, doc_ids: Sequence[str]) -> dict[str, str]:
    """Return what the encoder has read of documents, as far as it is stored."""
    names = [name for name in TEXT_FIELDS if name in searcher.field_types]
    if not names:
        raise PreconditionError("texts", "the index stores neither title nor text; build it with them, or send texts")
    stored = _stored(searcher, doc_ids, names)
    return {
        doc_id: Document(doc_id, fields.get("title", ""), fields.get("text", "")).content
        for doc_id, fields in zip(doc_ids, stored, strict=True)
    }


def _reranker(engine: Engine) -> Reranker:
    if engine.reranker is None:
        raise PreconditionError("reranker", "this server has no reranker; start it with --reranker")
    return engine.reranker


def _texts(query: AnyQuery) -> list[str]:
    """Return what has to be encoded for a query."""
    match query.WhichOneof("query"):
        case "text":
            return [query.text]
        case "sets":
            members = [member for term in query.sets.terms for member in term.members]
            return [member.text for member in members if member.HasField("text")]
        case _:
            return []


def _vector(query: AnyQuery, encoded: Iterator[Vectors]) -> Vectors:
    """Return a query's vector, taking from ``encoded`` in the order of :func:`_texts`."""
    match query.WhichOneof("query"):
        case "text":
            return next(encoded)
        case "sets":
            total = np.zeros(0)
            for term in query.sets.terms:
                members = [
                    next(encoded) if member.HasField("text") else from_message(member.vector) for member in term.members
                ]
                mean = np.mean(np.asarray(members, dtype=np.float64), axis=0)
                sign = -1.0 if term.operation == pb.SET_OPERATION_DIFFERENCE else 1.0
                total = sign * mean if not len(total) else total + sign * mean
            return total.astype(np.float32)
        case _:
            return from_message(query.vector)


def _cancelled_out(vectors: Vectors) -> list[Violation]:
    """A sum without direction would rank by rounding errors."""
    return [
        Violation(f"queries[{i}].sets", "its terms cancel each other out; no document is nearer than another")
        for i, vector in enumerate(vectors)
        if not (np.isfinite(vector).all() and np.linalg.norm(vector) > 1e-6)
    ]


def _countdown(seconds: float) -> Callable[[], float]:
    """Return what tells how many of the seconds are left."""
    give_up = time.monotonic() + seconds
    return lambda: give_up - time.monotonic()


def _refuse(violations: Sequence[Violation]) -> None:
    if violations:
        raise InvalidRequestError(violations)


def _size_violations(size: int, limits: Limits) -> list[Violation]:
    """A response beyond the message limit would reach the client as a transport error that names no cause."""
    if size <= limits.max_message_bytes:
        return []
    return [
        Violation(
            "top_k",
            f"makes a response of {size} bytes, the limit is {limits.max_message_bytes}; lower it or query less",
        )
    ]


def _search_response(hits: Sequence[Sequence[pb.Hit]], **about: Any) -> pb.SearchResponse:
    return pb.SearchResponse(hits=hits[0], **about)


def _batch_response(hits: Sequence[Sequence[pb.Hit]], **about: Any) -> pb.BatchSearchResponse:
    return pb.BatchSearchResponse(results=[pb.SearchResult(hits=some) for some in hits], **about)


def _hits(searcher: DocumentSearcher, rankings: Sequence[Ranking], fields: Sequence[str]) -> list[list[pb.Hit]]:
    hits = [_ranked_hits(ranking) for ranking in rankings]
    if fields:
        for some, stored in zip(hits, _fields(searcher, rankings, fields), strict=True):
            for hit, values in zip(some, stored, strict=True):
                hit.fields.CopyFrom(stored_to_message(values))
    return hits


def _ranked_hits(ranking: Ranking) -> list[pb.Hit]:
    pairs = zip(ranking.doc_ids, ranking.scores.tolist(), strict=True)
    return [pb.Hit(doc_id=doc_id, score=score, rank=rank) for rank, (doc_id, score) in enumerate(pairs, start=1)]


def _timings(embedded: Embedded) -> pb.Timings:
    return pb.Timings(tokenize_ns=embedded.tokenize_ns, queue_ns=embedded.queue_ns, encode_ns=embedded.encode_ns)


def _index_info(searcher: DocumentSearcher) -> pb.GetIndexResponse:
    return pb.GetIndexResponse(
        index_version=searcher.version,
        kind=searcher.kind,
        document_count=searcher.count,
        dimension=searcher.dimension,
        document_encoder=_encoder_info(searcher.card),
    )


def _encoder_info(card: EncoderCard) -> pb.EncoderInfo:
    return pb.EncoderInfo(
        name=card.name,
        fingerprint=card.fingerprint,
        space_fingerprint=card.space_fingerprint,
        dimension=card.dimension,
        max_length=card.max_length,
        normalized=card.normalize,
        precision=card.precision,
    )
