"""The dense first stage: an encoder's queries against encoded documents, exhaustively."""

from __future__ import annotations

from collections.abc import Mapping

from retrieval_kd.encoders.base import Encoder
from retrieval_kd.encoders.card import require_same_space
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.exact import exact_search
from retrieval_kd.runs import Ranking


def dense_run(encoder: Encoder, queries: Mapping[str, str], corpus: EncodedCorpus, k: int) -> dict[str, Ranking]:
    """Return each query's ``k`` documents of greatest dot product.

    Args:
        encoder: Encodes the queries.
        queries: Query id to text.
        corpus: The encoded documents.
        k: Documents wanted.

    Raises:
        EncoderMismatch: the encoder does not share the documents' space.
        DataError: as :func:`retrieval_kd.exact.exact_search`.
    """
    require_same_space(encoder.card, corpus.card)
    return exact_search(list(queries), encoder.encode(list(queries.values()), "query"), corpus, k)
