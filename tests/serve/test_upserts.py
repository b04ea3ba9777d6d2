"""A document that is upserted is the document that a build would have made of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from serve_fakes import CARD, FakeEncoder, FakeReranker, Start

from index.build import build_index
from index.search import Searcher
from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from retrieval_kd.collections import base
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.recipes.schema import IndexSpec
from serve.client import Document, Options, RetrievalClient
from serve.indexes import StoreSource
from serve.limits import Limits
from serve.validate import upsert_violations

TOKEN = "0123456789abcdef-admin"
DOCUMENTS = [
    base.Document("both", "red wine", "goes with cheese"),
    base.Document("same", "red wine", "red wine"),
    base.Document("untitled", "", "white wine with fish"),
    base.Document("titled", "a rose", ""),
]


class Collection:
    """Documents alone."""

    name = fingerprint = corpus_fingerprint = "documents"

    def documents(self) -> Iterator[base.Document]:
        """Stream them."""
        yield from DOCUMENTS


class Reader(FakeReranker):
    """Remembers what it was given to read."""

    def __init__(self) -> None:
        self.read = []

    def score(self, query: str, texts: Sequence[str]) -> Vectors:
        """Remember the texts."""
        self.read += texts
        return super().score(query, texts)


def built(folder: Path) -> StoreSource:
    documents = sorted(DOCUMENTS, key=lambda document: document.doc_id)
    vectors = FakeEncoder().texts_vectors([document.content for document in documents])
    corpus = EncodedCorpus([document.doc_id for document in documents], vectors, CARD, "encoding", "documents")
    build_index(corpus, IndexSpec("exact"), folder, CARD, collection=Collection(), fields=("title", "text"))
    return StoreSource(folder)


@pytest.mark.parametrize("beside", [True, False], ids=["text beside the fields", "text among the fields"])
def test_a_document_upserted_is_the_document_built(start: Start, tmp_path: Path, beside: bool) -> None:
    """Without it a correction of one word would move a document to another place in every ranking."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    reader = Reader()
    running = start(searcher=built(tmp_path / "store"), tokens=tmp_path / "tokens", reranker=reader)

    def seen() -> tuple[object, ...]:
        queries = [document.content for document in DOCUMENTS]
        results = client.batch_search(queries, 4, options=Options(fields=["title", "text"]))
        # A field that is empty and one that is absent are alike.
        hits = [
            (hit.doc_id, hit.score, {name: text for name, text in hit.fields.items() if text})
            for result in results
            for hit in result.hits
        ]
        reader.read.clear()
        client.search("wine", top_k=1, options=Options(rerank_depth=4))
        client.rerank("wine", [document.doc_id for document in DOCUMENTS])
        return hits, sorted(reader.read)

    with RetrievalClient(running.target, token=TOKEN) as client:
        before = seen()
        given = [
            Document(one.doc_id, one.text, fields={"title": one.title})
            if beside
            else Document(one.doc_id, fields={"title": one.title, "text": one.text})
            for one in DOCUMENTS
        ]
        client.upsert(given)
        assert seen() == before
    hits, read = before
    assert max(score for _, score, _ in hits) == pytest.approx(1.0)
    assert read == sorted([document.content for document in DOCUMENTS] * 2)


def violations(**parts: object) -> list[tuple[str, str]]:
    fields = parts.pop("fields", {})
    document = pb.Document(doc_id="a", **parts)
    document.fields.update(fields)
    request = pb.UpsertDocumentsRequest(documents=[document])
    return [(one.field, one.description) for one in upsert_violations(request, Limits(max_text_bytes=8), 2, {})]


def test_what_is_encoded_of_a_document_is_judged_as_a_whole() -> None:
    """Without it a title could bring the encoder more than the limit, and what is stored could be another text."""
    assert violations(text="1234", fields={"title": "123"}) == []
    assert violations(fields={"title": "title"}) == []
    assert violations(text="a", fields={"title": None, "text": "a"}) == []
    whole, at = "documents[0].text", "documents[0].fields"
    assert violations(text="1234", fields={"title": "1234"}) == [(whole, "has 9 bytes; the limit is 8")]
    assert violations(fields={"title": " "}) == [(whole, "is blank; give at least one word")]
    assert violations(text="a", fields={"title": 5}) == [(f"{at}.title", "is no text; give one")]
    vector = pb.Vector(floats=pb.FloatVector(values=np.ones(2)))
    for more in ({}, {"vector": vector}):
        ((place, said),) = violations(text="a", fields={"text": "b"}, **more)
        assert (place, said[:30]) == (f"{at}.text", "is another text than the docum")


def test_the_number_of_documents_that_is_shown_follows_other_processes(start: Start, tmp_path: Path) -> None:
    """A page of several workers shows the lowest number, that of whoever did not write; it would stay the old one."""
    source = built(tmp_path / "store")
    running = start(searcher=source)
    running.wait_for("rkd_index_documents", 4)
    running.wait_for("rkd_index_updates", 0)
    with Searcher.open(tmp_path / "store") as other:
        for doc_id, updates in (("new", 1), ("new", 1), ("newer", 2)):
            other.upsert([doc_id], FakeEncoder().texts_vectors([doc_id]))
            running.reload()
            running.wait_for("rkd_index_updates", updates)
            running.wait_for("rkd_index_documents", 4 + updates)
        other.delete(["new"])
        running.reload()
        running.wait_for("rkd_index_updates", 1)


def test_a_write_says_which_encoder_made_its_vectors_and_where_the_time_went(start: Start, tmp_path: Path) -> None:
    """Without it a slow or strange upsert cannot be told from a slow disk or another encoder."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    running = start(searcher=built(tmp_path / "store"), tokens=tmp_path / "tokens")
    with RetrievalClient(running.target, token=TOKEN) as client:
        written = client.upsert([Document("new", text="some words")])
        removed = client.delete(["new"])
    assert (written.document_encoder, removed.document_encoder) == (FakeEncoder().card.fingerprint, "")
    spent = written.timings
    assert min(spent.tokenize_ns, spent.encode_ns) > 0
    assert spent.tokenize_ns + spent.queue_ns + spent.encode_ns < spent.total_ns
    assert removed.timings.total_ns > 0
