"""What a request has to keep to; GetServerInfo returns all of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

from retrieval_kd.errors import ServeError, did_you_mean

MAX_MESSAGE_BYTES = 16 * 2**20
"""Both sides set it: gRPC's own 4 MB default, on the client too, is the most reported surprise of such services."""


@dataclass(frozen=True)
class Limits:
    """The server's limits; a request beyond one is refused and never cut.

    Attributes:
        max_batch_queries: Queries in one BatchSearch, texts in one Embed.
        max_top_k: Documents for each query.
        max_text_bytes: Size of one text in UTF-8 bytes.
        max_message_bytes: Size of one message in bytes, in either direction.
        default_deadline_ms: Deadline of a request that brings none, milliseconds.
        max_deadline_ms: A later deadline is cut to this, milliseconds.
        max_concurrent_requests: Requests the server works on at once.
        max_queued_texts: Texts that may wait for the encoder.
        max_queued_tokens: Tokens that may wait for the encoder.
        max_rerank_documents: Documents in one Rerank, and the deepest second stage of a search.
        max_filter_terms: Comparisons in one filter, and values in them together.
        max_fields: Stored fields that one search may name.
        max_set_members: Examples in one set expression.
        max_write_documents: Documents in one upsert, ids in one delete.
        max_stream_in_flight: Requests of one stream that are worked on at once.
        max_effort: Each number that says how hard an approximate index looks.
        max_stream_idle_ms: A stream ends when for so long no request came and no answer was taken, milliseconds.
        max_id_bytes: Size of one document id in a request, in UTF-8 bytes.
        max_filter_depth: Levels of one filter.
    """

    max_batch_queries: int = 256
    max_top_k: int = 1000
    max_text_bytes: int = 32 * 2**10
    max_message_bytes: int = MAX_MESSAGE_BYTES
    default_deadline_ms: int = 5_000
    max_deadline_ms: int = 30_000
    max_concurrent_requests: int = 512
    max_queued_texts: int = 512
    max_queued_tokens: int = 64 * 2**10
    max_rerank_documents: int = 100
    max_filter_terms: int = 256
    max_fields: int = 32
    max_set_members: int = 64
    max_write_documents: int = 256
    max_stream_in_flight: int = 16
    max_effort: int = 4096
    max_stream_idle_ms: int = 300_000
    max_id_bytes: int = 512
    max_filter_depth: int = 32

    @classmethod
    def of(cls, settings: Iterable[str]) -> Limits:
        """Return the limits with some set by ``NAME=NUMBER``.

        Raises:
            ServeError: no such limit, or a number that a limit cannot be.
        """
        known = [limit.name for limit in fields(cls)]
        given: dict[str, int] = {}
        for setting in settings:
            name, _, number = setting.partition("=")
            if name not in known:
                raise ServeError(f"--limit {setting}: no limit {name!r}{did_you_mean(name, known)}")
            # Twice a limit is still an option of gRPC's, a 32-bit integer.
            if not re.fullmatch("[0-9]{1,10}", number) or not 1 <= int(number) < 1 << 30:
                raise ServeError(f"--limit {setting}: give {name}=NUMBER, a whole number from 1 to 2^30 - 1")
            given[name] = int(number)
        return cls(**given)

    @property
    def max_rerank_pairs(self) -> int:
        """Return how many pairs of query and document one BatchSearch may have reranked.

        The protocol has no field for it; it follows from ``max_rerank_documents``, which has one.
        """
        return 10 * self.max_rerank_documents

    def seconds_for(self, remaining: float | None) -> float:
        """Return how many seconds a request may take whose caller waits ``remaining`` more (None: no deadline)."""
        return min(self.default_deadline_ms / 1e3 if remaining is None else remaining, self.max_deadline_ms / 1e3)

    def message_options(self) -> list[tuple[str, int]]:
        """Return the gRPC channel and server options that set the message size."""
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
        ]
