"""What can be wrong with a request, found before any work is done, all of it at once.

Of a batch beyond the limit only as many entries are examined as the limit allows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from retrieval_kd.encoders.base import Vectors
from serve.errors import Violation
from serve.limits import Limits
from serve.vectors import from_message

AnyQuery = pb.SearchRequest | pb.Query


def search_violations(request: pb.SearchRequest, limits: Limits, dimension: int) -> list[Violation]:
    """Return everything wrong with a Search request; ``dimension`` is the index's vector width."""
    return [*_query(request, "", limits, dimension), *_top_k(request.top_k, limits)]


def batch_search_violations(request: pb.BatchSearchRequest, limits: Limits, dimension: int) -> list[Violation]:
    """Return everything wrong with a BatchSearch request; ``dimension`` is the index's vector width."""
    violations = [*_count("queries", len(request.queries), limits), *_top_k(request.top_k, limits)]
    for i, query in enumerate(request.queries[: limits.max_batch_queries]):
        violations.extend(_query(query, f"queries[{i}].", limits, dimension))
    return violations


def embed_violations(request: pb.EmbedRequest, limits: Limits) -> list[Violation]:
    """Return everything wrong with an Embed request."""
    violations = list(_count("texts", len(request.texts), limits))
    if request.vector_encoding not in pb.VectorEncoding.values():
        names = ", ".join(pb.VectorEncoding.keys())
        violations.append(Violation("vector_encoding", f"{request.vector_encoding} is unknown; give one of {names}"))
    for i, text in enumerate(request.texts[: limits.max_batch_queries]):
        violations.extend(_text(text, f"texts[{i}]", limits))
    return violations


def _query(query: AnyQuery, path: str, limits: Limits, dimension: int) -> Iterator[Violation]:
    match query.WhichOneof("query"):
        case "text":
            yield from _text(query.text, f"{path}text", limits)
        case "vector":
            yield from _vector(query.vector, f"{path}vector", dimension)
        case _:
            yield Violation(f"{path}query", "is missing; set text or vector")


def _text(text: str, path: str, limits: Limits) -> Iterator[Violation]:
    if not text.strip():
        yield Violation(path, "is blank; give at least one word")
    size = len(text.encode())
    if size > limits.max_text_bytes:
        yield Violation(path, f"has {size} bytes; the limit is {limits.max_text_bytes}")


def _vector(message: pb.Vector, path: str, dimension: int) -> Iterator[Violation]:
    encoding = message.WhichOneof("encoding")
    if encoding is None:
        yield Violation(path, "has no numbers; set floats or f32_le")
        return
    if encoding == "f32_le" and len(message.f32_le) != 4 * dimension:
        yield Violation(
            f"{path}.f32_le", f"has {len(message.f32_le)} bytes; {dimension} 32-bit floats take {4 * dimension}"
        )
        return
    vector = from_message(message)
    if len(vector) != dimension:
        yield Violation(f"{path}.{encoding}", f"has {len(vector)} numbers; the index's vectors have {dimension}")
    elif not np.isfinite(vector).all():
        yield Violation(f"{path}.{encoding}", "holds NaN or infinity; give finite numbers")
    elif not _usable_length(vector):
        yield Violation(f"{path}.{encoding}", "has length zero or beyond 32-bit range; give a vector with a direction")


def _usable_length(vector: Vectors) -> bool:
    """Tell whether dot products with the vector are finite and not all zero."""
    with np.errstate(over="ignore"):
        return bool(vector.any() and np.isfinite(vector @ vector))


def _count(field: str, count: int, limits: Limits) -> Iterator[Violation]:
    if not 1 <= count <= limits.max_batch_queries:
        yield Violation(field, f"has {count} entries; give 1 to {limits.max_batch_queries}")


def _top_k(top_k: int, limits: Limits) -> Iterator[Violation]:
    if not 1 <= top_k <= limits.max_top_k:
        yield Violation("top_k", f"is {top_k}; give 1 to {limits.max_top_k}")
