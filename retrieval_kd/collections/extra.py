"""Texts beside the training queries, for losses that need a text and its teacher vector but no judgement.

LEAF (arXiv 2509.12539) owes its quality away from home to millions of these; one collection's queries alone teach a
student to search that collection.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import re
from collections.abc import Iterator, Sequence

from retrieval_kd.collections.base import Collection, held_out_words, split_queries, words_of

# As long as queries are: at equal cost phrases teach a student more of its teacher's queries than sentences do.
_LEAST_WORDS = 3
_MOST_WORDS = 14
_BOUNDARY = re.compile(r"(?<=[.!?])\s+")


def extra_texts(collection: Collection, others: Sequence[Collection], phrases: bool, most: int) -> dict[str, str]:
    """Return texts by id: the train queries of other collections, and phrases of the documents of all.

    A text that is also a dev or test query of one of the collections is left out, and so is a second copy of a text.
    Of more than ``most`` those with the smallest hashes are taken, and no more of them are ever in memory: what a
    training cannot read is neither kept nor encoded, however large the corpus.

    Args:
        collection: The collection that is trained on; its queries are not among the texts.
        others: Collections whose train queries are; the queries of their other splits never are.
        phrases: Take the documents' sentences too, cut into phrases of 3 to 14 words; where, a hash of the document's
            id and the sentence's number says.
        most: Texts wanted, at least 1.

    Raises:
        DataError: as :func:`retrieval_kd.collections.base.split_queries` and ``dev_queries``.
    """
    sources = (collection, *others)
    held_out = set().union(*map(held_out_words, sources))
    streams = [_queries(other) for other in others]
    if phrases:
        streams += [_phrases(source) for source in sources]
    # The largest hash comes first, to make room; the place keeps the order of the streams.
    kept: list[tuple[int, int, str, str]] = []
    hashes: set[int] = set()
    for place, (text_id, text) in enumerate(itertools.chain.from_iterable(streams)):
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
        full = len(kept) == most
        if number in hashes or (full and number > -kept[0][0]) or words_of(text) in held_out:
            continue
        hashes.add(number)
        item = (-number, place, text_id, text)
        if full:
            hashes.discard(-heapq.heapreplace(kept, item)[0])
        else:
            heapq.heappush(kept, item)
    return {text_id: text for _, _, text_id, text in sorted(kept, key=lambda item: item[1])}


def _queries(collection: Collection) -> Iterator[tuple[str, str]]:
    # Those that are also held out are left out with every other text that is.
    for query_id, text in split_queries(collection, "train").items():
        yield f"{collection.name}/query/{query_id}", text


def _phrases(collection: Collection) -> Iterator[tuple[str, str]]:
    for document in collection.documents():
        for number, sentence in enumerate(_BOUNDARY.split(document.text)):
            words = sentence.split()
            draw = hashlib.sha256(f"{document.doc_id}/{number}".encode()).digest()
            start = 0
            for byte in itertools.cycle(draw):
                # A rest too short for a phrase, and a heading or a list's number, is none.
                if len(words) - start < _LEAST_WORDS:
                    break
                phrase = words[start : start + _LEAST_WORDS + byte % (_MOST_WORDS - _LEAST_WORDS + 1)]
                yield f"{collection.name}/document/{document.doc_id}/{number}/{start}", " ".join(phrase)
                start += len(phrase)
