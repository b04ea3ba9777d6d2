"""What happens to a ranking between the system and the measure: self-matches, passages to documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from retrieval_kd.artifacts import fingerprint
from retrieval_kd.collections.base import Collection, Document, Qrels
from retrieval_kd.collections.joined import JoinedCollection
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Ranking, Run, rank

# BEIR's tasks whose queries stand in the corpus under their own ids.
_SELF_MATCHING = frozenset(
    {"arguana", "quora", "irds:beir/arguana", "irds:beir/quora", "irds:beir/quora/dev", "irds:beir/quora/test"}
)
_SEPARATOR = "#"
_PASSAGES_PER_DOCUMENT = 10


def matches_itself(collection: str) -> bool:
    """Tell whether a task, by its published name, has its queries in its corpus (ArguAna, Quora)."""
    return collection.casefold() in _SELF_MATCHING


@dataclass(frozen=True)
class Shape:
    """How rankings are made ready for measuring.

    Attributes:
        remove_self: Drop the document whose id is the query's, as BEIR's evaluator and pyserini's
            ``--remove-query`` do.
        maxp: Ranked ids are passages ``document#number``; a document gets its best passage's score
            (MaxP: Dai and Callan, arXiv 1905.09217).
    """

    remove_self: bool = False
    maxp: bool = False

    @classmethod
    def of(cls, collection: Collection, remove_self: bool | None = None, maxp: bool = False) -> Shape:
        """Return how a collection's rankings are shaped; distractors leave its queries in its corpus.

        Args:
            collection: What is measured, joined by distractors or not.
            remove_self: None does what :func:`matches_itself` says of the collection.
            maxp: Whether passages are searched.
        """
        base = collection.base if isinstance(collection, JoinedCollection) else collection
        return cls(matches_itself(base.name) if remove_self is None else remove_self, maxp)

    @property
    def notes(self) -> list[str]:
        """Return what a report says of the shape: figures after such a step do not compare with those before it."""
        notes = []
        if self.remove_self:
            notes.append("Documents with the query's own id were removed from every ranking.")
        if self.maxp:
            notes.append("Passages were searched; a document has its best passage's score (MaxP).")
        return notes

    def search_depth(self, depth: int) -> int:
        """Return how many results a system must give so that ``depth`` documents are left."""
        return (_PASSAGES_PER_DOCUMENT if self.maxp else 1) * (depth + self.remove_self)

    def __call__(self, run: Run, depth: int) -> dict[str, Ranking]:
        """Return the rankings as they are measured, at most ``depth`` documents each."""
        return {query_id: self._shaped(query_id, ranking).top(depth) for query_id, ranking in run.items()}

    def _shaped(self, query_id: str, ranking: Ranking) -> Ranking:
        if self.maxp:
            ranking = best_passages(ranking)
        if self.remove_self and query_id in ranking.doc_ids:
            keep = np.array([doc_id != query_id for doc_id in ranking.doc_ids])
            ids = tuple(doc_id for doc_id in ranking.doc_ids if doc_id != query_id)
            ranking = Ranking(ids, ranking.scores[keep])
        return ranking


def best_passages(ranking: Ranking) -> Ranking:
    """Rank documents by their best passage; an id without a passage number is a document's own."""
    best: dict[str, float] = {}
    for passage_id, score in zip(ranking.doc_ids, ranking.scores.tolist(), strict=True):
        best.setdefault(passage_id.rpartition(_SEPARATOR)[0] or passage_id, score)
    return rank(list(best), list(best.values()))


def of_passages(run: Run) -> bool:
    """Tell whether a run over :class:`Passages` ranks those and not documents, whose ids have no separator."""
    return any(_SEPARATOR in doc_id for ranking in run.values() for doc_id in ranking.doc_ids)


class Passages:
    """A collection whose documents are cut into overlapping windows of words, each with the title before it.

    A passage's id is ``document#number``, numbered from 0; queries and judgements are the documents'.
    """

    def __init__(self, base: Collection, words: int = 225, stride: int = 200) -> None:
        """Cut each body into windows of ``words``, one every ``stride``.

        Raises:
            DataError: windows that leave words out, or a document id that looks like a passage's.
        """
        if not 1 <= stride <= words:
            raise DataError(f"passages: a stride of {stride} must lie in 1..{words}, the words of a passage")
        self._base = base
        self._words = words
        self._stride = stride

    @property
    def name(self) -> str:
        """Return the documents' name."""
        return self._base.name

    @cached_property
    def corpus_fingerprint(self) -> str:
        """Return the sha256 over the documents' fingerprint and the windows."""
        return fingerprint({"documents": self._base.corpus_fingerprint, "words": self._words, "stride": self._stride})

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over the base's fingerprint and the windows."""
        return fingerprint({"base": self._base.fingerprint, "passages": self.corpus_fingerprint})

    def documents(self) -> Iterator[Document]:
        """Stream the passages, document by document."""
        for document in self._base.documents():
            if _SEPARATOR in document.doc_id:
                raise DataError(
                    f"{self.name}: document id {document.doc_id!r} looks like a passage's; replace its {_SEPARATOR!r}"
                )
            words = document.text.split()
            for number, text in enumerate(self._windows(words)):
                yield Document(f"{document.doc_id}{_SEPARATOR}{number}", document.title, text)

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return the text of each passage; an unknown id is a :class:`DataError`."""
        wanted = dict.fromkeys(doc_ids, "")
        missing = set(wanted)
        for passage in self.documents():
            if passage.doc_id in missing:
                wanted[passage.doc_id] = passage.content
                missing.remove(passage.doc_id)
        if missing:
            raise DataError(f"{self.name}: no passage {min(missing)!r}; the run was made with other windows")
        return wanted

    def queries(self) -> Mapping[str, str]:
        """Return the base's queries."""
        return self._base.queries()

    def splits(self) -> tuple[str, ...]:
        """Return the base's splits."""
        return self._base.splits()

    def qrels(self, split: str) -> Qrels:
        """Return the base's judgements, of documents."""
        return self._base.qrels(split)

    def _windows(self, words: list[str]) -> Iterator[str]:
        last = max(1, len(words) - (self._words - self._stride))
        for start in range(0, last, self._stride):
            yield " ".join(words[start : start + self._words])
