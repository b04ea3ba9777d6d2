"""BM25, the lexical first stage and baseline: bm25s with Lucene's formula and Snowball's English stemmer.

Words are runs of letters and digits, one-letter words included as in Lucene's StandardTokenizer, without
Lucene's 33 English stop words. Close to Anserini's flat index and not the same: nDCG@10 on the test splits of
SciFact and NFCorpus is .680 and .321, Anserini's .679 and .322. Six tokenisations were compared on those two
splits (with and without stop words, one-letter words, possessives; Porter's first stemmer), all within .01.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from retrieval_kd.collections.base import Collection
from retrieval_kd.errors import DataError
from retrieval_kd.progress import progress
from retrieval_kd.runs import Ranking, rank

VARIANT = "bm25s lucene k1=0.9 b=0.4, English stop words, Snowball English"
_K1, _B = 0.9, 0.4
_WORD = r"\b\w+\b"


class BM25Index:
    """An inverted index in memory: the documents' token ids while it is built, postings afterwards."""

    def __init__(self, doc_ids: list[str], tokenizer: Any, model: Any) -> None:  # bm25s has no types
        """Take what :meth:`build` made."""
        self._doc_ids = doc_ids
        self._tokenizer = tokenizer
        self._model = model

    @classmethod
    def build(cls, collection: Collection) -> BM25Index:
        """Index every document; texts are streamed and not kept.

        Raises:
            DataError: bm25s or PyStemmer is missing, or the collection has no word to index.
        """
        try:
            import bm25s
            import Stemmer
            from bm25s.tokenization import Tokenizer
        except ImportError as error:
            raise DataError(f"BM25: {error.name} is not installed; pip install 'retrieval-kd[train]'") from None
        # bm25s sets its own logger to DEBUG and announces every step.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        tokenizer = Tokenizer(splitter=_WORD, stopwords="english", stemmer=Stemmer.Stemmer("english"))
        doc_ids: list[str] = []
        tokens: list[list[int]] = []
        with progress("index for BM25", None, "documents") as advance:
            for document in collection.documents():
                doc_ids.append(document.doc_id)
                tokens.extend(tokenizer.streaming_tokenize([document.content], allow_empty=False))
                advance(1)
        if not any(tokens):
            raise DataError(f"{collection.name}: no word in {len(doc_ids)} documents; BM25 has nothing to index")
        model = bm25s.BM25(method="lucene", k1=_K1, b=_B)
        model.index((tokens, tokenizer.get_vocab_dict()), create_empty_token=False, show_progress=False)
        return cls(doc_ids, tokenizer, model)

    def search(self, queries: Mapping[str, str], k: int) -> dict[str, Ranking]:
        """Return each query's best ``k`` documents among those that share a word with it.

        A query without any word of the corpus gets an empty ranking.

        Args:
            queries: Query id to text.
            k: Documents wanted, at least 1; fewer come when fewer match.

        Raises:
            DataError: ``k`` is below 1.
        """
        if k < 1:
            raise DataError(f"BM25: k {k} must be at least 1")
        run = {}
        with progress("search with BM25", len(queries), "queries") as advance:
            for query_id, text in queries.items():
                run[query_id] = self._search_one(text, k)
                advance(1)
        return run

    def _search_one(self, text: str, k: int) -> Ranking:
        # False still maps a new form of a known stem ("never" would drop it); new stems are left out.
        (tokens,) = self._tokenizer.streaming_tokenize([text], update_vocab=False, allow_empty=False)
        if not tokens:
            return Ranking((), np.zeros(0, dtype=np.float32))
        scores = self._model.get_scores_from_ids(tokens)
        matches = np.flatnonzero(scores > 0)
        if len(matches) > k:
            # Everything tied with the k-th stays until rank() breaks the tie by id.
            kth = np.partition(scores[matches], len(matches) - k)[len(matches) - k]
            matches = matches[scores[matches] >= kth]
        return rank([self._doc_ids[match] for match in matches], scores[matches], k)
