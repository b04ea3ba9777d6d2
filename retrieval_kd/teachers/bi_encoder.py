"""A bi-encoder as teacher: its own vectors, compared."""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Scores, Shortlist


def score_with_vectors(query_vectors: Vectors, corpus: EncodedCorpus, lists: Sequence[Shortlist]) -> list[Scores]:
    """Return the dot product of every candidate with its query (the cosine where vectors have unit length).

    Args:
        query_vectors: The vector of each list's query, float32 ``[len(lists), d]``, in the space of ``corpus``.
        corpus: The documents' vectors.
        lists: The candidates.

    Returns:
        For each list float32 ``[len(doc_ids)]``, aligned with its ``doc_ids``.

    Raises:
        DataError: there is not one vector of the corpus's width for each list, or a document has no
            vector; names it.
    """
    if query_vectors.shape != (len(lists), corpus.card.dimension):
        raise DataError(
            f"query vectors of shape {query_vectors.shape} for {len(lists)} lists over documents of dimension "
            f"{corpus.card.dimension}; encode each list's query with the documents' encoder"
        )
    return [
        corpus.vectors[[_row(corpus, doc_id) for doc_id in item.doc_ids]] @ vector
        for item, vector in zip(lists, query_vectors, strict=True)
    ]


def _row(corpus: EncodedCorpus, doc_id: str) -> int:
    row = corpus.row_of.get(doc_id)
    if row is None:
        raise DataError(f"document {doc_id!r} has no vector; encode the collection the candidates came from")
    return row
