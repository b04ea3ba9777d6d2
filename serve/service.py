"""The servicers: messages in, the engine's work, messages out; no logic of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import grpc
import numpy as np

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd import __version__
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.runs import Ranking
from serve.engine import Embedded, Engine, EngineSlot
from serve.errors import InvalidRequestError, Violation
from serve.limits import Limits
from serve.validate import AnyQuery, batch_search_violations, embed_violations, search_violations
from serve.vectors import from_message, to_message

Context = grpc.aio.ServicerContext[Any, Any]
SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())


def add_services(server: grpc.aio.Server, slot: EngineSlot, limits: Limits) -> None:
    """Register every service of ``dense.retrieval.v1``."""
    rpc.add_RetrievalServiceServicer_to_server(Retrieval(slot, limits), server)
    rpc.add_EmbeddingServiceServicer_to_server(Embedding(slot, limits), server)
    rpc.add_IndexServiceServicer_to_server(Index(slot), server)
    rpc.add_ServerInfoServiceServicer_to_server(ServerInfo(slot, limits), server)


class Retrieval(rpc.RetrievalServiceServicer):
    """Search and BatchSearch: one path, so a query's ranking does not depend on which of them asked."""

    def __init__(self, slot: EngineSlot, limits: Limits) -> None:
        self._slot = slot
        self._limits = limits

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:  # noqa: N802
        """Rank documents against one query."""
        arrived = time.perf_counter_ns()
        engine = self._slot.engine
        _refuse(search_violations(request, self._limits, engine.searcher.dimension))
        (ranking,), timings = await _rank(engine, [request], request.top_k)
        timings.total_ns = time.perf_counter_ns() - arrived
        return pb.SearchResponse(
            hits=_hits(ranking),
            index_version=engine.searcher.version,
            query_encoder=engine.encoder.card.fingerprint,
            timings=timings,
        )

    async def BatchSearch(self, request: pb.BatchSearchRequest, context: Context) -> pb.BatchSearchResponse:  # noqa: N802
        """Rank documents against many queries."""
        arrived = time.perf_counter_ns()
        engine = self._slot.engine
        _refuse(batch_search_violations(request, self._limits, engine.searcher.dimension))
        rankings, timings = await _rank(engine, request.queries, request.top_k)
        response = pb.BatchSearchResponse(
            results=[pb.SearchResult(hits=_hits(ranking)) for ranking in rankings],
            index_version=engine.searcher.version,
            query_encoder=engine.encoder.card.fingerprint,
            timings=timings,
        )
        response.timings.total_ns = time.perf_counter_ns() - arrived
        _refuse(_size_violations(response.ByteSize(), self._limits))
        return response


class Embedding(rpc.EmbeddingServiceServicer):
    """Texts to vectors."""

    def __init__(self, slot: EngineSlot, limits: Limits) -> None:
        self._slot = slot
        self._limits = limits

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """Encode texts as queries."""
        arrived = time.perf_counter_ns()
        engine = self._slot.engine
        _refuse(embed_violations(request, self._limits))
        embedded = await engine.embed(request.texts)
        timings = _timings(embedded)
        response = pb.EmbedResponse(
            vectors=[to_message(vector, request.vector_encoding) for vector in embedded.vectors],
            query_encoder=engine.encoder.card.fingerprint,
            timings=timings,
        )
        response.timings.total_ns = time.perf_counter_ns() - arrived
        return response


class Index(rpc.IndexServiceServicer):
    """What is searched."""

    def __init__(self, slot: EngineSlot) -> None:
        self._slot = slot

    async def GetIndex(self, request: pb.GetIndexRequest, context: Context) -> pb.GetIndexResponse:  # noqa: N802
        """Describe the index version being searched."""
        searcher = self._slot.engine.searcher
        return pb.GetIndexResponse(
            index_version=searcher.version,
            kind=searcher.kind,
            document_count=searcher.count,
            dimension=searcher.dimension,
            document_encoder=_encoder_info(searcher.card),
        )


class ServerInfo(rpc.ServerInfoServiceServicer):
    """What serves."""

    def __init__(self, slot: EngineSlot, limits: Limits) -> None:
        self._slot = slot
        self._limits = limits

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:  # noqa: N802
        """Describe the server, its query encoder and its limits."""
        return pb.GetServerInfoResponse(
            server_version=__version__,
            query_encoder=_encoder_info(self._slot.engine.encoder.card),
            limits=pb.Limits(**asdict(self._limits)),
        )


async def _rank(engine: Engine, queries: Sequence[AnyQuery], k: int) -> tuple[list[Ranking], pb.Timings]:
    embedded = await engine.embed([query.text for query in queries if query.HasField("text")])
    encoded = iter(embedded.vectors)
    vectors = np.stack([next(encoded) if query.HasField("text") else from_message(query.vector) for query in queries])
    found = await engine.search(vectors, k)
    timings = _timings(embedded)
    timings.search_ns = found.search_ns
    return found.rankings, timings


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


def _hits(ranking: Ranking) -> list[pb.Hit]:
    pairs = zip(ranking.doc_ids, ranking.scores.tolist(), strict=True)
    return [pb.Hit(doc_id=doc_id, score=score, rank=rank) for rank, (doc_id, score) in enumerate(pairs, start=1)]


def _timings(embedded: Embedded) -> pb.Timings:
    return pb.Timings(tokenize_ns=embedded.tokenize_ns, queue_ns=embedded.queue_ns, encode_ns=embedded.encode_ns)


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
