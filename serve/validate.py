"""What can be wrong with a request, found before any work is done, all of it at once.

Of a batch beyond the limit only as many entries are examined as the limit allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from google.protobuf.struct_pb2 import Value

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.errors import DataError
from serve.documents import content
from serve.errors import Violation
from serve.fields import LARGEST, is_of
from serve.limits import Limits
from serve.vectors import from_message

AnyQuery = pb.SearchRequest | pb.Query
UNFIT = (DataError, pa.ArrowException, OverflowError)
"""What an index raises over values in a request that its fields cannot hold or be compared with."""
_SMALLEST_HIT = len(pb.SearchResult(hits=[pb.Hit(doc_id="1", score=1.0, rank=1)]).SerializeToString())
_BYTES = {"f32_le": 4, "f16_le": 2}


def search_violations(request: pb.SearchRequest, limits: Limits, dimension: int) -> list[Violation]:
    """Return everything wrong with a Search request; ``dimension`` is the index's vector width."""
    return [
        *_query(request, "", limits, dimension),
        *_top_k(request.top_k, limits),
        *_options(request.options, request.top_k, [request], limits),
    ]


def batch_search_violations(request: pb.BatchSearchRequest, limits: Limits, dimension: int) -> list[Violation]:
    """Return everything wrong with a BatchSearch request; ``dimension`` is the index's vector width."""
    violations = [*_count("queries", len(request.queries), limits), *_top_k(request.top_k, limits)]
    queries = request.queries[: limits.max_batch_queries]
    for i, query in enumerate(queries):
        violations.extend(_query(query, f"queries[{i}].", limits, dimension))
    size = len(request.queries) * request.top_k * _SMALLEST_HIT
    if not violations and size > limits.max_message_bytes:
        violations.append(
            Violation(
                "top_k",
                f"makes a response of {size} bytes at least, the limit is {limits.max_message_bytes}; lower it",
            )
        )
    return [*violations, *_options(request.options, request.top_k, queries, limits)]


def embed_violations(request: pb.EmbedRequest, limits: Limits) -> list[Violation]:
    """Return everything wrong with an Embed request."""
    violations = list(_count("texts", len(request.texts), limits))
    for field, kind in (("vector_encoding", pb.VectorEncoding), ("input_type", pb.InputType)):
        number = getattr(request, field)
        if number not in kind.values():
            violations.append(Violation(field, f"{number} is unknown; give one of {', '.join(kind.keys())}"))
    for i, text in enumerate(request.texts[: limits.max_batch_queries]):
        violations.extend(_text(text, f"texts[{i}]", limits))
    return violations


def rerank_violations(request: pb.RerankRequest, limits: Limits) -> list[Violation]:
    """Return everything wrong with a Rerank request."""
    violations = [*_text(request.query, "query", limits)]
    count = len(request.documents)
    if not 1 <= count <= limits.max_rerank_documents:
        violations.append(Violation("documents", f"has {count} entries; give 1 to {limits.max_rerank_documents}"))
    if request.top_k > limits.max_top_k:
        violations.append(Violation("top_k", f"is {request.top_k}; give 0 to {limits.max_top_k}"))
    documents = request.documents[: limits.max_rerank_documents]
    violations.extend(_ids([document.doc_id for document in documents], "documents[{}].doc_id", limits))
    for i, document in enumerate(documents):
        if document.text:
            violations.extend(_text(document.text, f"documents[{i}].text", limits))
    return violations


def upsert_violations(
    request: pb.UpsertDocumentsRequest, limits: Limits, dimension: int, types: Mapping[str, str]
) -> list[Violation]:
    """Return everything wrong with an UpsertDocuments request, of an index of that vector width and those fields."""
    violations = list(_writes("documents", len(request.documents), limits))
    documents = request.documents[: limits.max_write_documents]
    violations.extend(_ids([document.doc_id for document in documents], "documents[{}].doc_id", limits))
    for i, document in enumerate(documents):
        for name, value in document.fields.fields.items():
            whole = not is_of(types.get(name, ""), "float")
            violations.extend(_json(value, f"documents[{i}].fields.{name}", whole))
        if document.HasField("vector"):
            violations.extend(_vector(document.vector, f"documents[{i}].vector", dimension))
        else:
            violations.extend(_text(content(document), f"documents[{i}].text", limits))
        violations.extend(_title_and_text(document, f"documents[{i}].fields"))
    return violations


def delete_violations(request: pb.DeleteDocumentsRequest, limits: Limits) -> list[Violation]:
    """Return everything wrong with a DeleteDocuments request."""
    ids = request.doc_ids[: limits.max_write_documents]
    return [*_writes("doc_ids", len(request.doc_ids), limits), *_ids(ids, "doc_ids[{}]", limits)]


def _query(query: AnyQuery, path: str, limits: Limits, dimension: int) -> Iterator[Violation]:
    match query.WhichOneof("query"):
        case "text":
            yield from _text(query.text, f"{path}text", limits)
        case "vector":
            yield from _vector(query.vector, f"{path}vector", dimension)
        case "sets":
            yield from _sets(query.sets, f"{path}sets", limits, dimension)
        case _:
            yield Violation(f"{path}query", "is missing; set text, vector or sets")


def _sets(sets: pb.SetExpression, path: str, limits: Limits, dimension: int) -> Iterator[Violation]:
    count = sum(len(term.members) for term in sets.terms)
    if not 1 <= count <= limits.max_set_members:
        yield Violation(path, f"has {count} members; give 1 to {limits.max_set_members}")
        return
    for t, term in enumerate(sets.terms):
        if not term.members:
            yield Violation(f"{path}.terms[{t}].members", "is empty; give at least one")
        if term.operation not in pb.SetOperation.values():
            names = ", ".join(pb.SetOperation.keys())
            yield Violation(f"{path}.terms[{t}].operation", f"{term.operation} is unknown; give one of {names}")
        for m, member in enumerate(term.members):
            place = f"{path}.terms[{t}].members[{m}]"
            match member.WhichOneof("member"):
                case "text":
                    yield from _text(member.text, f"{place}.text", limits)
                case "vector":
                    yield from _vector(member.vector, f"{place}.vector", dimension)
                case _:
                    yield Violation(place, "is missing; set text or vector")


def _options(options: pb.SearchOptions, top_k: int, queries: Sequence[AnyQuery], limits: Limits) -> Iterator[Violation]:
    if options.HasField("filter"):
        yield from _filter(options.filter, limits)
    if len(options.fields) > limits.max_fields:
        yield Violation("options.fields", f"has {len(options.fields)} names; the limit is {limits.max_fields}")
    for field, number in options.effort.ListFields():
        if not 1 <= number <= limits.max_effort:
            yield Violation(f"options.effort.{field.name}", f"is {number}; give 1 to {limits.max_effort}")
    depth = options.rerank_depth
    if depth == 0:
        return
    if not top_k <= depth <= limits.max_rerank_documents:
        yield Violation(
            "options.rerank_depth", f"is {depth}; give top_k ({top_k}) to {limits.max_rerank_documents}, or 0"
        )
    pairs = len(queries) * depth
    if pairs > limits.max_rerank_pairs:
        yield Violation(
            "options.rerank_depth",
            f"makes {pairs} pairs of query and document, the limit is {limits.max_rerank_pairs}; lower it or send less",
        )
    if any(query.WhichOneof("query") in ("vector", "sets") for query in queries):
        yield Violation("options.rerank_depth", "needs queries of text; the reranker reads no vectors")


def _filter(root: pb.Filter, limits: Limits) -> Iterator[Violation]:
    """Bound a filter's size before anything walks it by recursion; its sense is the index's to judge."""
    terms = 0
    level = [root]
    for _ in range(limits.max_filter_depth):
        terms += sum(max(1, len(one.among.values)) for one in level)
        if terms > limits.max_filter_terms:
            yield Violation("options.filter", f"has more than {limits.max_filter_terms} comparisons; simplify it")
            return
        level = [child for one in level for child in _children(one)]
        if not level:
            return
    yield Violation("options.filter", f"is more than {limits.max_filter_depth} levels deep; flatten it")


def _children(one: pb.Filter) -> Sequence[pb.Filter]:
    match one.WhichOneof("condition"):
        case "all_of":
            return one.all_of.filters
        case "any_of":
            return one.any_of.filters
        case "negated":
            return [one.negated]
        case _:
            return []


def _ids(ids: Sequence[str], path: str, limits: Limits) -> Iterator[Violation]:
    seen: set[str] = set()
    for i, doc_id in enumerate(ids):
        if not doc_id.strip() or len(doc_id.encode()) > limits.max_id_bytes:
            yield Violation(path.format(i), f"must have 1 to {limits.max_id_bytes} bytes")
        elif doc_id in seen:
            yield Violation(path.format(i), "occurs twice; give each id once")
        seen.add(doc_id)


def _writes(field: str, count: int, limits: Limits) -> Iterator[Violation]:
    if not 1 <= count <= limits.max_write_documents:
        yield Violation(field, f"has {count} entries; give 1 to {limits.max_write_documents}")


def _text(text: str, path: str, limits: Limits) -> Iterator[Violation]:
    if not text.strip():
        yield Violation(path, "is blank; give at least one word")
    size = len(text.encode())
    if size > limits.max_text_bytes:
        yield Violation(path, f"has {size} bytes; the limit is {limits.max_text_bytes}")


def _vector(message: pb.Vector, path: str, dimension: int) -> Iterator[Violation]:
    encoding = message.WhichOneof("encoding")
    if encoding is None:
        yield Violation(path, "has no numbers; set floats, f32_le or f16_le")
        return
    if encoding in _BYTES:
        size, expected = len(getattr(message, encoding)), _BYTES[encoding] * dimension
        if size != expected:
            yield Violation(
                f"{path}.{encoding}",
                f"has {size} bytes; {dimension} {8 * _BYTES[encoding]}-bit floats take {expected}",
            )
            return
    vector = from_message(message)
    if len(vector) != dimension:
        yield Violation(f"{path}.{encoding}", f"has {len(vector)} numbers; the index's vectors have {dimension}")
    elif not np.isfinite(vector).all():
        yield Violation(f"{path}.{encoding}", "holds NaN or infinity; give finite numbers")
    elif not _usable_length(vector):
        yield Violation(f"{path}.{encoding}", "has length zero or beyond 32-bit range; give a vector with a direction")


def _title_and_text(document: pb.Document, path: str) -> Iterator[Violation]:
    """Hold what is stored to what is encoded."""
    for name, value in document.fields.fields.items():
        kind = value.WhichOneof("kind")
        if name in ("title", "text") and kind not in ("string_value", "null_value"):
            yield Violation(f"{path}.{name}", "is no text; give one")
        elif name == "text" and kind == "string_value" and document.text not in ("", value.string_value):
            yield Violation(f"{path}.text", "is another text than the document's, which is stored; leave it out")


def _json(value: Value, path: str, whole: bool) -> Iterator[Violation]:
    """Find the numbers that JSON cannot write or, where they may be integers (``whole``), a double cannot hold.

    Protobuf bounds how deep a value is.
    """
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            if not math.isfinite(number):
                yield Violation(path, "is NaN or infinity; give a finite number, or leave the field out")
            elif whole and number.is_integer() and abs(number) > LARGEST:
                yield Violation(path, f"may be another integer, rounded to {number}; give it as a decimal string")
        case "struct_value":
            for name, member in value.struct_value.fields.items():
                yield from _json(member, f"{path}.{name}", whole)
        case "list_value":
            for i, member in enumerate(value.list_value.values):
                yield from _json(member, f"{path}[{i}]", whole)


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
