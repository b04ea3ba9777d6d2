"""Texts beside the training queries, for losses that need a text and its teacher vector but no judgement.

LEAF (arXiv 2509.12539) owes its quality away from home to millions of these; one collection's queries alone teach a
student to search that collection.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

from retrieval_kd.collections.base import Collection, training_queries, unseen

# A heading or a list's number is no sentence; a sentence longer than any query costs time and teaches little more.
_LEAST_WORDS = 4
_MOST_WORDS = 24
_BOUNDARY = re.compile(r"(?<=[.!?])\s+")


def extra_texts(collection: Collection, others: Sequence[Collection], sentences: bool) -> dict[str, str]:
    """Return texts by id: the train queries of other collections, and one sentence of each document of all.

    A text that is also a dev or test query of one of the collections is left out, and so is a second copy of a text.

    Args:
        collection: The collection that is trained on; its queries are not among the texts.
        others: Collections whose train queries are; the queries of their other splits never are.
        sentences: Take a sentence of each document too, chosen by a hash of the document's id.

    Raises:
        DataError: as :func:`retrieval_kd.collections.base.training_queries`.
    """
    texts: dict[str, str] = {}
    for other in others:
        texts.update((f"{other.name}/query/{query_id}", text) for query_id, text in training_queries(other).items())
    if sentences:
        for source in (collection, *others):
            texts.update(_sentences(source))
    for source in (collection, *others):
        texts = unseen(texts, source)
    first = {text: text_id for text_id, text in reversed(texts.items())}
    return {text_id: text for text_id, text in texts.items() if first[text] == text_id}


def _sentences(collection: Collection) -> Iterator[tuple[str, str]]:
    for document in collection.documents():
        words = [sentence.split() for sentence in _BOUNDARY.split(document.text)]
        long = [sentence[:_MOST_WORDS] for sentence in words if len(sentence) >= _LEAST_WORDS]
        if long:
            chosen = int.from_bytes(hashlib.sha256(document.doc_id.encode()).digest()[:8]) % len(long)
            yield f"{collection.name}/document/{document.doc_id}", " ".join(long[chosen])
