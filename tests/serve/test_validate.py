"""Every way a request can be wrong, and the edges where it is still right."""

import numpy as np
import pytest

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from serve.limits import Limits
from serve.validate import (
    batch_search_violations,
    delete_violations,
    embed_violations,
    rerank_violations,
    search_violations,
    upsert_violations,
)

LIMITS = Limits(max_batch_queries=3, max_top_k=5, max_text_bytes=8)


def floats(*values: float) -> pb.Vector:
    return pb.Vector(floats=pb.FloatVector(values=values))


def f32(*values: float) -> pb.Vector:
    return pb.Vector(f32_le=np.array(values, dtype="<f4").tobytes())


GOOD = [
    pb.SearchRequest(text="a", top_k=1),
    pb.SearchRequest(text="x" * 8, top_k=5),
    pb.SearchRequest(text="éééé", top_k=5),
    pb.SearchRequest(vector=floats(1, 0), top_k=1),
    pb.SearchRequest(vector=f32(3, 4), top_k=1),
    pb.SearchRequest(vector=f32(1e-30, 0), top_k=1),
]


@pytest.mark.parametrize("request_", GOOD)
def test_what_lies_on_the_limit_passes(request_: pb.SearchRequest) -> None:
    """An off-by-one would refuse what the limits advertise, or count letters where bytes are meant."""
    assert search_violations(request_, LIMITS, 2) == []


BAD = [
    (pb.SearchRequest(top_k=1), "query", "missing"),
    (pb.SearchRequest(text="", top_k=1), "text", "blank"),
    (pb.SearchRequest(text=" \n\t\u3000", top_k=1), "text", "blank"),
    (pb.SearchRequest(text="ééééé", top_k=1), "text", "10 bytes; the limit is 8"),
    (pb.SearchRequest(text="a"), "top_k", "is 0; give 1 to 5"),
    (pb.SearchRequest(text="a", top_k=6), "top_k", "is 6; give 1 to 5"),
    (pb.SearchRequest(vector=pb.Vector(), top_k=1), "vector", "no numbers"),
    (pb.SearchRequest(vector=floats(1), top_k=1), "vector.floats", "has 1 numbers; the index's vectors have 2"),
    (pb.SearchRequest(vector=floats(1, 2, 3), top_k=1), "vector.floats", "has 3 numbers"),
    (pb.SearchRequest(vector=floats(), top_k=1), "vector.floats", "has 0 numbers"),
    (pb.SearchRequest(vector=f32(1), top_k=1), "vector.f32_le", "has 4 bytes; 2 32-bit floats take 8"),
    (pb.SearchRequest(vector=pb.Vector(f32_le=b"1234567"), top_k=1), "vector.f32_le", "has 7 bytes"),
    (pb.SearchRequest(vector=floats(1, float("nan")), top_k=1), "vector.floats", "NaN or infinity"),
    (pb.SearchRequest(vector=f32(1, float("inf")), top_k=1), "vector.f32_le", "NaN or infinity"),
    (pb.SearchRequest(vector=floats(0, 0), top_k=1), "vector.floats", "length zero"),
    (pb.SearchRequest(vector=floats(3e38, 3e38), top_k=1), "vector.floats", "beyond 32-bit range"),
]


@pytest.mark.parametrize(("request_", "field", "part"), BAD)
def test_each_fault_names_its_field_and_remedy(request_: pb.SearchRequest, field: str, part: str) -> None:
    """A refused caller who is not told the field has to guess."""
    (violation,) = search_violations(request_, LIMITS, 2)
    assert violation.field == field
    assert part in violation.description


def test_all_violations_come_at_once_with_the_place_in_the_batch() -> None:
    """Told one fault at a time, a caller needs as many round trips as there are faults."""
    request = pb.BatchSearchRequest(queries=[pb.Query(text="ok"), pb.Query(text=" "), pb.Query(vector=floats(1))])
    fields = [violation.field for violation in batch_search_violations(request, LIMITS, 2)]
    assert fields == ["top_k", "queries[1].text", "queries[2].vector.floats"]


def test_batches_must_have_one_to_the_limit_entries() -> None:
    """An empty batch has no answer to stack; one too large holds everybody else up."""
    empty = batch_search_violations(pb.BatchSearchRequest(top_k=1), LIMITS, 2)
    assert [str(v) for v in empty] == ["queries: has 0 entries; give 1 to 3"]
    many = batch_search_violations(pb.BatchSearchRequest(queries=[pb.Query(text="a")] * 4, top_k=1), LIMITS, 2)
    assert [str(v) for v in many] == ["queries: has 4 entries; give 1 to 3"]
    assert [v.field for v in embed_violations(pb.EmbedRequest(), LIMITS)] == ["texts"]
    assert embed_violations(pb.EmbedRequest(texts=["a"] * 3), LIMITS) == []


def test_an_oversized_batch_is_not_examined_entry_by_entry() -> None:
    """Sixteen MiB of empty queries would otherwise cost the event loop seconds before they are refused."""
    request = pb.BatchSearchRequest(queries=[pb.Query()] * 1000, top_k=1)
    assert len(batch_search_violations(request, LIMITS, 2)) == 1 + LIMITS.max_batch_queries
    assert len(embed_violations(pb.EmbedRequest(texts=[""] * 1000), LIMITS)) == 1 + LIMITS.max_batch_queries


def nested(levels: int) -> pb.Filter:
    wanted = pb.Filter(equals=pb.FilterEquals(field="a", value=pb.FilterValue(integer=1)))
    for _ in range(levels - 1):
        wanted = pb.Filter(all_of=pb.FilterList(filters=[wanted]))
    return wanted


def test_ids_and_filters_keep_to_the_limits_that_the_server_reports() -> None:
    """Without it a caller who goes by the reported limits is refused, or what is beyond them let in."""
    limits = Limits(max_id_bytes=4, max_filter_depth=3)
    for doc_id, wrong in (("éé", 0), ("ééa", 1)):
        assert len(delete_violations(pb.DeleteDocumentsRequest(doc_ids=[doc_id]), limits)) == wrong
        document = pb.Document(doc_id=doc_id, text="a")
        assert len(upsert_violations(pb.UpsertDocumentsRequest(documents=[document]), limits, 2, {})) == wrong
        reranked = pb.RerankRequest(query="a", documents=[pb.RerankDocument(doc_id=doc_id)])
        assert len(rerank_violations(reranked, limits)) == wrong
    for levels, wrong in ((3, 0), (4, 1)):
        request = pb.SearchRequest(text="a", top_k=1, options=pb.SearchOptions(filter=nested(levels)))
        assert len(search_violations(request, limits, 2)) == wrong
    deepest = pb.SearchOptions(filter=nested(Limits().max_filter_depth))
    assert pb.SearchOptions.FromString(deepest.SerializeToString()) == deepest, "protobuf itself refuses what is deeper"


def test_an_unknown_encoding_is_refused_by_name() -> None:
    """Proto3 lets unknown enum numbers through; a server that trusts them answers in a format nobody asked for."""
    (violation,) = embed_violations(pb.EmbedRequest(texts=["a"], vector_encoding=9), LIMITS)
    assert violation.field == "vector_encoding"
    assert "9 is unknown" in violation.description
    assert "VECTOR_ENCODING_F32_LE" in violation.description
