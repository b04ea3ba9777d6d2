"""Stored fields on the wire: every value that an index stores comes back, and none is changed on its way in."""

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_fakes import CARD, DIMENSION, FakeSearcher, Start

from index.build import build_index
from index.filters import Eq
from index.search import Searcher
from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from retrieval_kd.collections.base import Document as Held
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import DataError, ServeError
from retrieval_kd.recipes.schema import IndexSpec
from serve.client import Document, Options, RetrievalClient
from serve.indexes import StoreSource
from serve.limits import Limits
from serve.validate import upsert_violations

TOKEN = "0123456789abcdef-admin"
SAFE = 2**53 - 1
LARGE = 2**60 + 8
VECTORS = np.eye(2, DIMENSION, dtype=np.float32)
TYPES = {"n": "int", "ns": "list of int", "f": "float", "fs": "list of float", "j": "json", "t": "text"}
BUILT = {
    "n": LARGE,
    "ns": [SAFE, -(2**63)],
    "f": 1e300,
    "fs": [2.0**60, 0.5],
    "j": {"deep": [2**70, 1, None, True, "7"]},
    "t": "9007199254740993",
}
READ = BUILT | {"n": str(LARGE), "ns": [SAFE, str(-(2**63))], "j": {"deep": [str(2**70), 1, None, True, "7"]}}


class Collection:
    """Documents with the same fields."""

    name = fingerprint = corpus_fingerprint = "fields"

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def documents(self) -> Iterator[Held]:
        """Stream them."""
        for doc_id in "ab":
            yield Held(doc_id, "", "", self.fields)


def build(folder: Path, **fields: Any) -> Path:
    corpus = EncodedCorpus(["a", "b"], VECTORS, CARD, "encoding", "fields")
    return build_index(corpus, IndexSpec(), folder, CARD, collection=Collection(**fields), fields=list(fields))


def test_every_integer_comes_back_and_what_came_back_can_be_upserted(start: Start, tmp_path: Path) -> None:
    """Without it an id of 64 bits is another document's after one trip, and a filter finds that one."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    build(tmp_path / "store", **BUILT)
    running = start(searcher=StoreSource(tmp_path / "store"), tokens=tmp_path / "tokens")
    with RetrievalClient(running.target, token=TOKEN) as client, Searcher.open(tmp_path / "store") as stored:

        def read() -> dict[str, Any]:
            return dict(client.search(vector=VECTORS[0], top_k=1, options=Options(fields=["*"])).hits[0].fields)

        assert stored.field_types == TYPES
        assert read() == READ
        for fields in (BUILT, read()):
            client.upsert([Document("a", vector=VECTORS[0], fields=fields)])
            assert read() == READ
            assert list(map(type, (read()["ns"][0], *read()["j"]["deep"]))) == [int, str, int, type(None), bool, str]
            assert list(map(type, (read()["f"], *read()["fs"]))) == [float] * 3
            # JSON kept as such does not tell a decimal string from an integer, which filters do not compare there.
            exact = [name for name in TYPES if name != "j"]
            assert stored.fields(["a"], exact) == [{name: BUILT[name] for name in exact}]
            client.delete(["b"])
            by_number = Options(filter={"eq": {"n": LARGE}})
            assert [hit.doc_id for hit in client.search(vector=VECTORS[0], options=by_number).hits] == ["a"]
            (nothing,) = stored.search(VECTORS[:1], 1, filter=Eq("n", 2**60))
            assert len(nothing) == 0
        client.upsert([Document("a", vector=VECTORS[0], fields={"f": 2**60, "t": "12"})])
        assert stored.fields(["a"], ["f", "t"]) == [{"f": 2.0**60, "t": "12"}]
        for name, value in (("n", 2**63), ("n", 10**400), ("f", 2**60 + 1), ("n", "1e3"), ("n", "٣")):
            with pytest.raises(ServeError, match=f"documents: field '{name}' holds"):
                client.upsert([Document("a", vector=VECTORS[0], fields={name: value})])


def violations(name: str, value: Any) -> list[tuple[str, str]]:
    document = pb.Document(doc_id="a", vector=pb.Vector(floats=pb.FloatVector(values=VECTORS[0])))
    document.fields.update({name: value})
    request = pb.UpsertDocumentsRequest(documents=[document])
    return [(one.field, one.description) for one in upsert_violations(request, Limits(), DIMENSION, TYPES)]


def test_a_number_that_may_have_been_rounded_is_refused_with_its_place() -> None:
    """Without it clients whose library makes doubles of integers store other integers, and nobody is told."""
    for name, sign in product(("n", "j", "t", "unknown"), (1, -1)):
        assert violations(name, sign * SAFE) == []
        ((place, said),) = violations(name, {"deep": [1, sign * 2.0**60]})
        assert place == f"documents[0].fields.{name}.deep[1]"
        assert said == f"may be another integer, rounded to {sign * 2.0**60}; give it as a decimal string"
    assert violations("n", 2.0**53) != []
    assert violations("f", 1e300) == violations("fs", [1e300]) == violations("n", 1e15 + 0.5) == []


def test_a_value_that_json_has_not_is_refused_before_it_is_sent(client: RetrievalClient) -> None:
    """Without it the caller sees an error of protobuf, which names no document."""
    for value in (np.int64(3), {1, 2}, 10**5000):
        with pytest.raises(ServeError, match=r"upsert: document 'a': a field is no JSON value \("):
            client.upsert([Document("a", vector=VECTORS[0], fields={"n": value})])


@pytest.mark.parametrize("value", [math.nan, -math.inf, [0.5, math.inf], {"deep": [{"er": math.nan}]}])
def test_a_build_refuses_numbers_that_json_has_not(tmp_path: Path, value: Any) -> None:
    """Without it every search that asks for the field fails, in the client, until the index is built again."""
    with pytest.raises(DataError, match="document 'a': field 'odd' holds NaN or infinity, which JSON has not; leave"):
        build(tmp_path, even=1, odd=value)


def test_an_index_that_holds_such_a_number_already_answers_null(start: Start) -> None:
    """Without it a store of an earlier version could not be served until somebody has built it again."""
    searcher = FakeSearcher()
    searcher.field_types = {"number": "float", "odd": "json"}
    searcher.stored = [{"number": math.nan, "odd": {"deep": [math.inf, 1.5]}}] * searcher.count
    with RetrievalClient(start(searcher=searcher).target) as client:
        hit = client.search("a", top_k=1, options=Options(fields=["*"])).hits[0]
        assert hit.fields == {"number": None, "odd": {"deep": [None, 1.5]}}
