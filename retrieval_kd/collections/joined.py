"""A collection whose corpus is enlarged by documents that nobody judges: a harder, more lifelike search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from retrieval_kd.artifacts import fingerprint
from retrieval_kd.collections.base import Collection, Document, Qrels
from retrieval_kd.collections.files import checked_id
from retrieval_kd.errors import DataError


class JoinedCollection:
    """A base collection and distractor corpora.

    Queries and judgements are the base's. A distractor's document ids are prefixed with its
    collection's name and a colon, so they never clash with the base's or with one another's.
    """

    def __init__(self, base: Collection, distractors: Sequence[Collection]) -> None:
        """Take the base and at least one distractor.

        Raises:
            DataError: two of the collections share a name, or a distractor's has white space.
        """
        names = [base.name, *(distractor.name for distractor in distractors)]
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"distractors: {name!r} joins twice; name each collection once, rename a folder")
        for name in names[1:]:
            checked_id(name, "distractors", "collection")
        self._base = base
        self._distractors = {f"{distractor.name}:": distractor for distractor in distractors}

    @property
    def name(self) -> str:
        """Return the names joined by ``+``, the base first."""
        return "+".join([self._base.name, *(distractor.name for distractor in self._distractors.values())])

    @cached_property
    def corpus_fingerprint(self) -> str:
        """Return the sha256 over the corpora's fingerprints and the distractors' prefixes."""
        return fingerprint({"base": self._base.corpus_fingerprint, "distractors": self._distractor_fingerprints()})

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over the base's fingerprint and the distractors' corpora."""
        return fingerprint({"base": self._base.fingerprint, "distractors": self._distractor_fingerprints()})

    @property
    def base(self) -> Collection:
        """Return the collection whose queries and judgements these are."""
        return self._base

    @property
    def parts(self) -> list[tuple[str, Collection]]:
        """Return the corpora that are joined, each with the prefix of its ids; the base's is empty."""
        return [("", self._base), *self._distractors.items()]

    def documents(self) -> Iterator[Document]:
        """Stream the base's documents, then each distractor's.

        Raises:
            DataError: a document of the base has an id that looks like a distractor's.
        """
        for document in self._base.documents():
            if self._prefix(document.doc_id) is not None:
                raise DataError(
                    f"{self._base.name}: document id {document.doc_id!r} could be a distractor's; rename that folder"
                )
            yield document
        for prefix, distractor in self._distractors.items():
            for document in distractor.documents():
                yield replace(document, doc_id=prefix + document.doc_id)

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return the content of each id; an unknown id is a :class:`DataError`."""
        contents = dict.fromkeys(doc_ids, "")
        by_prefix: dict[str | None, list[str]] = {}
        for doc_id in contents:
            by_prefix.setdefault(self._prefix(doc_id), []).append(doc_id)
        contents.update(self._base.contents(by_prefix.pop(None, [])))
        for prefix, prefixed in by_prefix.items():
            assert prefix is not None
            own = self._distractors[prefix].contents(doc_id.removeprefix(prefix) for doc_id in prefixed)
            contents.update({prefix + doc_id: text for doc_id, text in own.items()})
        return contents

    def queries(self) -> Mapping[str, str]:
        """Return the base's queries."""
        return self._base.queries()

    def splits(self) -> tuple[str, ...]:
        """Return the base's splits."""
        return self._base.splits()

    def qrels(self, split: str) -> Qrels:
        """Return the base's judgements of a split."""
        return self._base.qrels(split)

    def _prefix(self, doc_id: str) -> str | None:
        return next((prefix for prefix in self._distractors if doc_id.startswith(prefix)), None)

    def _distractor_fingerprints(self) -> dict[str, str]:
        return {prefix: distractor.corpus_fingerprint for prefix, distractor in self._distractors.items()}
