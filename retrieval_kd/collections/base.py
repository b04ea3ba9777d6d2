"""What a collection is: documents, queries, and relevance judgements, by string ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from retrieval_kd.errors import DataError

Qrels = Mapping[str, Mapping[str, int]]
"""Query id to document id to relevance grade; grades above 0 are relevant."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document as its collection has it.

    Attributes:
        doc_id: The id, never empty, unique in its collection.
        title: The title, often empty.
        text: The body, sometimes empty.
        metadata: Whatever else the collection has about it, JSON values by name.
    """

    doc_id: str
    title: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def content(self) -> str:
        """Return the text that rankers read: title and body joined by a space, as MTEB does."""
        return f"{self.title} {self.text}".strip()


class Collection(Protocol):
    """A corpus with queries and judgements. Documents stream; queries and judgements fit in memory."""

    @property
    def name(self) -> str:
        """Return the name that reports print."""

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of everything that can change a result: corpus, queries, judgements."""

    @property
    def corpus_fingerprint(self) -> str:
        """Return the sha256 of the documents alone: what an index or a vector cache depends on."""

    def documents(self) -> Iterator[Document]:
        """Stream the documents in the collection's own order."""

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return :attr:`Document.content` of each id; an unknown id is a :class:`DataError`."""

    def queries(self) -> Mapping[str, str]:
        """Return query id to text, all splits together."""

    def splits(self) -> tuple[str, ...]:
        """Return the names of the splits that have judgements."""

    def qrels(self, split: str) -> Qrels:
        """Return the judgements of a split; a split that does not exist is a :class:`DataError`."""


def split_queries(collection: Collection, split: str) -> dict[str, str]:
    """Return the texts of the queries that a split judges, in the order of its judgements.

    Raises:
        DataError: the split does not exist, or judges a query that has no text.
    """
    texts = collection.queries()
    judged = collection.qrels(split)
    for query_id in judged:
        if query_id not in texts:
            raise DataError(
                f"{collection.name}: split {split!r} judges query {query_id!r}, which has no text; "
                "add it to the queries"
            )
    return {query_id: texts[query_id] for query_id in judged}


def dev_queries(collection: Collection) -> tuple[dict[str, str], Qrels]:
    """Return the texts and judgements of the queries that choose among models.

    They are the dev split, or, where a collection has none, a tenth of train picked by a hash of the
    query id, which :func:`training_queries` then leaves out.
    """
    if "dev" in collection.splits():
        return split_queries(collection, "dev"), collection.qrels("dev")
    judged = {query_id: grades for query_id, grades in collection.qrels("train").items() if _held_out(query_id)}
    if not judged:
        raise DataError(
            f"{collection.name}: no dev split, and too few train queries to hold a tenth out; add judgements for dev"
        )
    texts = split_queries(collection, "train")
    return {query_id: texts[query_id] for query_id in judged}, judged


def training_queries(collection: Collection) -> dict[str, str]:
    """Return the train split's queries without dev's and without those whose text also occurs in another split.

    Texts are compared by their words: "where is windsor" in train is "where is windsor?" in test, and a
    student trained on it has seen the exam.

    Raises:
        DataError: no query of the train split is left.
    """
    texts = split_queries(collection, "train")
    left = unseen(texts, collection)
    if not left:
        raise DataError(
            f"{collection.name}: each of the {len(texts)} train queries is asked in dev or another split too, so none "
            "is left to train on; give train queries of its own"
        )
    return left


def unseen(texts: Mapping[str, str], collection: Collection) -> dict[str, str]:
    """Return the texts by id that are no query of the collection's dev split or of any split but train."""
    seen = held_out_words(collection)
    return {text_id: text for text_id, text in texts.items() if words_of(text) not in seen}


def held_out_words(collection: Collection) -> set[str]:
    """Return the :func:`words_of` each query of the collection's dev split and of every split but train."""
    dev, _ = dev_queries(collection)
    seen = {words_of(text) for text in dev.values()}
    for split in collection.splits():
        if split != "train":
            seen.update(words_of(text) for text in split_queries(collection, split).values())
    return seen


def _held_out(query_id: str) -> bool:
    return hashlib.sha256(query_id.encode()).digest()[0] % 10 == 0


def words_of(text: str) -> str:
    """Return the words of a text alone; a text without any is compared as it is."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def normalised(text: str) -> str:
    """Return the text as duplicates are judged by: case folded, white space collapsed."""
    return " ".join(text.casefold().split())
