"""Collections of ir_datasets (https://ir-datasets.com) by id: ``irds:beir/scifact``, ``irds:msmarco-passage``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from types import ModuleType
from typing import Any

from retrieval_kd.artifacts import canonical_json, fingerprint
from retrieval_kd.collections.base import Document, Qrels
from retrieval_kd.collections.files import (
    Judgement,
    checked_id,
    collect_qrels,
    require_split,
    unknown_document,
)
from retrieval_kd.errors import DataError, did_you_mean
from retrieval_kd.progress import progress

PREFIX = "irds:"
# Sub-datasets that ir_datasets has under the names on the right are our splits on the left.
_SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "val"), "test": ("test",)}


class IrdsCollection:
    """A dataset of ir_datasets.

    Its splits are its sub-datasets ``train``, ``dev`` (or ``validation``, ``val``) and ``test`` that have
    judgements. A dataset without such parts that is judged itself has one split, named after the last
    part of its id if that is one of those names, else ``test``.
    """

    def __init__(self, dataset_id: str) -> None:
        """Take the id, without ``irds:``; nothing is downloaded yet.

        Raises:
            DataError: ir_datasets is not installed, does not know the id, or has no documents or
                judgements under it.
        """
        library = _library()
        self._dataset_id = dataset_id
        self._corpus = _dataset(library, dataset_id)
        self._parts = _parts(library, dataset_id, self._corpus)
        if not self._corpus.has_docs() or not self._parts:
            raise DataError(
                f"{self.name}: has no {'judgements' if self._corpus.has_docs() else 'documents'}; give the id of a "
                "dataset with documents, queries and qrels, see https://ir-datasets.com"
            )

    @property
    def name(self) -> str:
        """Return ``irds:`` and the id."""
        return PREFIX + self._dataset_id

    @cached_property
    def corpus_fingerprint(self) -> str:
        """Return the sha256 over the documents, streamed once."""
        digest = hashlib.sha256()
        with progress(f"hash {self.name}", self._corpus.docs_count(), "documents") as advance:
            for document in self.documents():
                digest.update(canonical_json([document.doc_id, document.title, document.text]).encode() + b"\n")
                advance(1)
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over documents, queries and judgements."""
        judged = {split: self.qrels(split) for split in self.splits()}
        return fingerprint({"corpus": self.corpus_fingerprint, "queries": self._queries, "qrels": judged})

    def documents(self) -> Iterator[Document]:
        """Stream the documents in the dataset's order."""
        for number, raw in enumerate(self._corpus.docs_iter(), start=1):
            document = _document(raw)
            checked_id(document.doc_id, f"{self.name}: document {number}", "document")
            yield document

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return the content of each id; an unknown id is a :class:`DataError`."""
        wanted = list(dict.fromkeys(doc_ids))
        found = self._corpus.docs_store().get_many(wanted)
        for doc_id in wanted:
            if doc_id not in found:
                unknown_document(doc_id, self.name)
        return {doc_id: _document(found[doc_id]).content for doc_id in wanted}

    def queries(self) -> Mapping[str, str]:
        """Return query id to text, all splits together.

        Raises:
            DataError: an id with two texts or an empty text.
        """
        return self._queries

    def splits(self) -> tuple[str, ...]:
        """Return the splits there are, of train, dev, test."""
        return tuple(self._parts)

    def qrels(self, split: str) -> Qrels:
        """Return the judgements of a split.

        Raises:
            DataError: the split does not exist, or judges what is not there.
        """
        require_split(self.name, split, self.splits())
        part = f"{self.name} {split}"
        rows = (
            Judgement(f"{part} qrels: row {number}", row.query_id, row.doc_id, str(row.relevance))
            for number, row in enumerate(self._parts[split].qrels_iter(), start=1)
        )
        return collect_qrels(f"{part} qrels", rows, self._queries, self._doc_ids)

    @cached_property
    def _queries(self) -> dict[str, str]:
        queries: dict[str, str] = {}
        for split, part in self._parts.items():
            for number, raw in enumerate(part.queries_iter(), start=1):
                where = f"{self.name} {split} queries: row {number}"
                query_id, text = checked_id(raw.query_id, where, "query"), raw.default_text()
                if not text.strip():
                    raise DataError(f"{where}: query {query_id!r} has an empty text; use another dataset")
                if queries.setdefault(query_id, text) != text:
                    raise DataError(f"{where}: query {query_id!r} has another text in another split")
        return queries

    @cached_property
    def _doc_ids(self) -> frozenset[str]:
        return frozenset(document.doc_id for document in self.documents())


def _library() -> ModuleType:
    try:
        import ir_datasets
    except ImportError:
        raise DataError(
            f"{PREFIX}: ir_datasets is not installed; pip install 'retrieval-kd[eval]' or give a folder"
        ) from None
    return ir_datasets  # type: ignore[no-any-return]


def _dataset(library: ModuleType, dataset_id: str) -> Any:  # the library has no types
    try:
        return library.load(dataset_id)
    except KeyError:
        hint = did_you_mean(dataset_id, library.registry)
        raise DataError(f"{PREFIX}{dataset_id}: ir_datasets has no such id{hint}") from None


def _parts(library: ModuleType, dataset_id: str, dataset: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for split, names in _SPLIT_NAMES.items():
        for name in names:
            part_id = f"{dataset_id}/{name}"
            if part_id in library.registry:
                part = library.load(part_id)
                if part.has_queries() and part.has_qrels():
                    parts.setdefault(split, part)
    if not parts and dataset.has_queries() and dataset.has_qrels():
        last = dataset_id.rsplit("/", 1)[-1]
        parts[next((split for split, names in _SPLIT_NAMES.items() if last in names), "test")] = dataset
    return parts


def _document(raw: Any) -> Document:
    if hasattr(raw, "title") and hasattr(raw, "text"):
        return Document(raw.doc_id, raw.title or "", raw.text or "")
    return Document(raw.doc_id, "", raw.default_text())
