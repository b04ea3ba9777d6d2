"""The administration: publishing, rolling back, and single documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from serve.documents import content, stored_fields
from serve.engine import EngineSlot
from serve.errors import InvalidRequestError, Violation
from serve.indexes import DocumentSearcher
from serve.limits import Limits
from serve.validate import UNFIT, delete_violations, upsert_violations
from serve.vectors import from_message

Context = grpc.aio.ServicerContext[Any, Any]


def add_admin_service(server: grpc.aio.Server, slot: EngineSlot, limits: Limits) -> None:
    """Register the administration."""
    rpc.add_IndexAdminServiceServicer_to_server(IndexAdmin(slot, limits), server)


class IndexAdmin(rpc.IndexAdminServiceServicer):
    """Changes what is searched; a failure changes nothing and says why."""

    def __init__(self, slot: EngineSlot, limits: Limits) -> None:
        self._slot = slot
        self._limits = limits

    async def PublishIndex(self, request: pb.PublishIndexRequest, context: Context) -> pb.PublishIndexResponse:  # noqa: N802
        """Serve a version and make it the store's current one."""
        now, before = await self._slot.engine.index.publish(request.index_version)
        return pb.PublishIndexResponse(index_version=now, previous_version=before)

    async def RollbackIndex(self, request: pb.RollbackIndexRequest, context: Context) -> pb.RollbackIndexResponse:  # noqa: N802
        """Serve the version before the one being served."""
        now, before = await self._slot.engine.index.rollback()
        return pb.RollbackIndexResponse(index_version=now, previous_version=before)

    async def UpsertDocuments(  # noqa: N802
        self, request: pb.UpsertDocumentsRequest, context: Context
    ) -> pb.UpsertDocumentsResponse:
        """Add documents or replace them."""
        arrived = time.perf_counter_ns()
        engine = self._slot.engine
        searcher = engine.index.searcher
        _refuse(upsert_violations(request, self._limits, searcher.dimension, searcher.field_types))
        documents = request.documents
        texts = [content(document) for document in documents if not document.HasField("vector")]
        seconds = context.time_remaining()
        embedded = await engine.embed(texts, "document", seconds)
        encoded = iter(embedded.vectors)
        vectors = np.stack([from_message(one.vector) if one.HasField("vector") else next(encoded) for one in documents])
        ids = [document.doc_id for document in documents]

        def write(searcher: DocumentSearcher) -> None:
            types = searcher.field_types
            searcher.upsert(ids, vectors, [stored_fields(document, types) for document in documents])

        version, count = await self._write("documents", write)
        timings = pb.Timings(
            tokenize_ns=embedded.tokenize_ns,
            queue_ns=embedded.queue_ns,
            encode_ns=embedded.encode_ns,
            total_ns=time.perf_counter_ns() - arrived,
        )
        return pb.UpsertDocumentsResponse(
            index_version=version,
            document_count=count,
            document_encoder=engine.encoder.card.fingerprint,
            timings=timings,
        )

    async def DeleteDocuments(  # noqa: N802
        self, request: pb.DeleteDocumentsRequest, context: Context
    ) -> pb.DeleteDocumentsResponse:
        """Remove documents."""
        arrived = time.perf_counter_ns()
        _refuse(delete_violations(request, self._limits))
        ids = list(request.doc_ids)
        version, count = await self._write("doc_ids", lambda searcher: searcher.delete(ids))
        timings = pb.Timings(total_ns=time.perf_counter_ns() - arrived)
        return pb.DeleteDocumentsResponse(index_version=version, document_count=count, timings=timings)

    async def _write(self, field: str, change: Callable[[DocumentSearcher], None]) -> tuple[str, int]:
        try:
            return await self._slot.engine.index.write(change)
        except UNFIT as error:
            raise InvalidRequestError([Violation(field, str(error))]) from error


def _refuse(violations: Sequence[Violation]) -> None:
    if violations:
        raise InvalidRequestError(violations)
