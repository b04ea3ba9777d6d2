"""Exhaustive search: the ground truth that indexes are measured against, and the dense first stage.

A matrix product in float32 is fast, but its last digits depend on how many queries and documents share
the call. So the product only proposes: every document that can be among the best within the product's
error bound is kept and scored again by one path, a float64 sum of products rounded to float32. One query
or many, small blocks or large, the ranking and its scores are the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import DataError
from retrieval_kd.pages import forget_pages
from retrieval_kd.progress import progress
from retrieval_kd.runs import Ranking, Scores, rank

_QUERY_ROWS = 1024
_DOT_ROWS = 128  # the products of so many rows stay in a core's cache
_UNIT_ROUNDOFF = 2.0**-24
_SMALLEST_NORMAL = 2.0**-126


def exact_search(
    query_ids: Sequence[str],
    query_vectors: Vectors,
    corpus: EncodedCorpus,
    k: int,
    block_rows: int = 16384,
) -> dict[str, Ranking]:
    """Return each query's ``k`` documents of greatest dot product, ties broken by document id.

    Memory beside the ids: ``4 * block_rows * min(queries, 1024)`` bytes of scores, a block of the corpus,
    and 12 bytes for each of the ``k`` entries of a query. The pages of a large mapped corpus are given back
    block by block, so that a million documents of 384 numbers are searched in less than 2 GB.

    Args:
        query_ids: The queries' ids, each once.
        query_vectors: float32 ``[len(query_ids), d]``.
        corpus: The documents' ids and vectors, float32 ``[n, d]``.
        k: Documents wanted; fewer come when the corpus is smaller.
        block_rows: Documents in one matrix product.

    Raises:
        DataError: shapes do not fit, a query id occurs twice, ``k`` or ``block_rows`` is below 1, or a
            vector is not finite; names the query or document.
    """
    _check(query_ids, query_vectors, corpus, k, block_rows)
    order = _id_order(corpus.ids)
    run: dict[str, Ranking] = {}
    chunks = range(0, len(query_ids), _QUERY_ROWS)
    with progress("exact search", len(chunks) * len(corpus.ids), "documents") as advance:
        for first in chunks:
            queries = query_vectors[first : first + _QUERY_ROWS]
            exact_queries = queries.astype(np.float64)
            best = [_Best() for _ in queries]
            for start in range(0, len(corpus.ids), block_rows):
                block = np.array(corpus.vectors[start : start + block_rows], dtype=np.float32)
                slack = _error_bound(queries, block, corpus.ids[start : start + block_rows])
                for row, scores in enumerate(queries @ block.T):
                    hits = _proposals(scores, float(slack[row]), best[row].floor(k), k)
                    if len(hits):
                        best[row].add(start + hits, _dot(block, hits, exact_queries[row]), order, k)
                forget_pages(corpus.vectors)
                advance(len(block))
            for query_id, found in zip(query_ids[first : first + _QUERY_ROWS], best, strict=True):
                run[query_id] = rank([corpus.ids[row] for row in found.rows.tolist()], found.scores)
    return run


class _Best:
    """The best documents of one query so far: rows and exact scores, best first."""

    __slots__ = ("rows", "scores")

    def __init__(self) -> None:
        self.rows: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.scores: Scores = np.empty(0, dtype=np.float32)

    def floor(self, k: int) -> np.float32 | None:
        """Return the score a document needs to be among the best ``k``; None while there are fewer."""
        return None if len(self.rows) < k else self.scores[k - 1]

    def add(self, rows: npt.NDArray[np.int64], scores: Scores, order: npt.NDArray[np.int64] | None, k: int) -> None:
        """Put documents in and keep the best ``k`` by (score descending, id ascending)."""
        rows, scores = np.concatenate([self.rows, rows]), np.concatenate([self.scores, scores])
        kept = np.lexsort((rows if order is None else order[rows], -scores))[:k]
        self.rows, self.scores = rows[kept], scores[kept]


def _id_order(ids: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """Return each row's place in ascending order of id; None when the rows are in that order, as encodings are."""
    if all(before < after for before, after in itertools.pairwise(ids)):
        return None
    order = np.empty(len(ids), dtype=np.int64)
    order[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    return order


def _check(query_ids: Sequence[str], query_vectors: Vectors, corpus: EncodedCorpus, k: int, block_rows: int) -> None:
    if k < 1 or block_rows < 1:
        raise DataError(f"exact search: k {k} and block_rows {block_rows} must be at least 1")
    if query_vectors.shape != (len(query_ids), corpus.vectors.shape[1]):
        raise DataError(
            f"exact search: query vectors of shape {query_vectors.shape}, expected {len(query_ids)} ids by "
            f"{corpus.vectors.shape[1]} numbers of the documents; encode both sides in one space"
        )
    if len(set(query_ids)) != len(query_ids):
        twice = next(query_id for i, query_id in enumerate(query_ids) if query_id in query_ids[:i])
        raise DataError(f"exact search: query {twice!r} occurs twice; keep one of them")
    finite = np.isfinite(query_vectors).all(axis=1)
    if not finite.all():
        raise DataError(
            f"exact search: the vector of query {query_ids[int(np.argmin(finite))]!r} is not finite; encode it again"
        )


def _error_bound(queries: Vectors, block: Vectors, ids: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return, for each query, how far a proposed score can lie from the exact one.

    A sum of d products in float32, in any order, is within ``d * u / (1 - d * u) * |q| * |x|`` of the real
    one (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). One more ``u`` covers the
    rounding of the exact score, another the rounding of the norms; products that underflow are lost whole.
    """
    squares = np.einsum("ij,ij->i", block, block)
    if not np.isfinite(squares).all():
        worst = ids[int(np.argmin(np.isfinite(squares)))]
        raise DataError(f"exact search: the vector of document {worst!r} is not finite; encode the corpus again")
    terms = (block.shape[1] + 2) * _UNIT_ROUNDOFF
    # A square that underflows is lost whole, too.
    longest = np.sqrt(float(squares.max()) + block.shape[1] * _SMALLEST_NORMAL)
    norms = np.linalg.norm(queries.astype(np.float64), axis=1)
    bound: npt.NDArray[np.float64] = 1.01 * terms / (1 - terms) * norms * longest + block.shape[1] * _SMALLEST_NORMAL
    return bound


def _proposals(scores: Scores, slack: float, floor: np.float32 | None, k: int) -> npt.NDArray[np.int64]:
    """Return the positions of a block that can be among the best ``k``, given the ``k``-th score so far."""
    hits = np.arange(len(scores)) if floor is None else np.flatnonzero(scores >= _at_most(float(floor) - slack))
    if len(hits) > k:
        kth = float(np.partition(scores[hits], len(hits) - k)[len(hits) - k])
        hits = hits[scores[hits] >= _at_most(kth - 2 * slack)]
    return hits


def _at_most(value: float) -> np.float32:
    below: np.float32 = np.nextafter(np.float32(value), np.float32(-np.inf))
    return below


def _dot(block: Vectors, hits: npt.NDArray[np.int64], query: npt.NDArray[np.float64]) -> Scores:
    # numpy sums each row of a C-ordered product on its own, whatever the number of rows.
    scores = np.empty(len(hits), dtype=np.float32)
    for start in range(0, len(hits), _DOT_ROWS):
        part = slice(start, start + _DOT_ROWS)
        products = block[hits[part]].astype(np.float64)
        products *= query
        scores[part] = products.sum(axis=1)
    return scores
