"""Quality on dev while training: the number that picks the best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retrieval_kd.collections.base import Collection, Qrels
from retrieval_kd.encoders.base import Encoder
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.exact import exact_search
from retrieval_kd.quality import ndcg_at_10


@dataclass(frozen=True)
class DevSet:
    """The held-out queries that choose among checkpoints.

    Attributes:
        queries: Query id to text.
        qrels: Their judgements.
        corpus: Asymmetric mode: the frozen document vectors, searched whole. None in symmetric mode.
        pool: Symmetric mode: ids of the documents searched, since encoding the whole corpus with
            every candidate student would cost more than training it. Positives are among them.
        collection: Where the pool's texts are looked up.
    """

    queries: Mapping[str, str]
    qrels: Qrels
    collection: Collection
    corpus: EncodedCorpus | None
    pool: tuple[str, ...] = ()

    @property
    def documents(self) -> int:
        """Return how many documents the dev queries search."""
        return len(self.corpus.ids) if self.corpus else len(self.pool)

    def ndcg_at_10(self, student: Encoder, documents: Encoder | None = None) -> float:
        """Return the student's nDCG@10 on the dev queries; ``documents`` encodes the pool if the student does not."""
        ids = list(self.queries)
        vectors = student.encode([self.queries[query_id] for query_id in ids], "query")
        return ndcg_at_10(
            exact_search(ids, vectors, self.corpus or self._encode_pool(documents or student), 10), self.qrels
        )

    def _encode_pool(self, encoder: Encoder) -> EncodedCorpus:
        contents = self.collection.contents(self.pool)
        ids = sorted(contents)
        vectors = encoder.encode([contents[doc_id] for doc_id in ids], "document")
        return EncodedCorpus(ids, vectors, encoder.card, fingerprint="", texts_fingerprint="")
