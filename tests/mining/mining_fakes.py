"""A collection in memory for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from retrieval_kd.collections.base import Document, Qrels
from retrieval_kd.errors import DataError


@dataclass
class MemoryCollection:
    """Documents, queries and judgements as given."""

    texts: Mapping[str, str]
    asked: Mapping[str, str] = field(default_factory=dict)
    judged: Mapping[str, Qrels] = field(default_factory=dict)
    name: str = "memory"
    fingerprint: str = "f"
    corpus_fingerprint: str = "c"

    def documents(self) -> Iterator[Document]:
        """Stream the texts."""
        for doc_id, text in self.texts.items():
            yield Document(doc_id, "", text)

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Look texts up."""
        wanted = list(doc_ids)
        for doc_id in wanted:
            if doc_id not in self.texts:
                raise DataError(f"memory: no document {doc_id!r}")
        return {doc_id: self.texts[doc_id] for doc_id in wanted}

    def queries(self) -> Mapping[str, str]:
        """Return what is asked."""
        return self.asked

    def splits(self) -> tuple[str, ...]:
        """Return what is judged."""
        # With a dev split, even an empty one, no training query is set aside for it.
        return tuple({"dev": None, **self.judged})

    def qrels(self, split: str) -> Qrels:
        """Return a split's judgements."""
        return self.judged.get(split, {})
