"""The one exact way of scoring: float64 sums, row by row, of whatever can be among the best.

A float32 score, by whatever library and in whatever company, only proposes. Every document that can be among the
best within the error bound of those scores is scored again, so that a query's ranking never depends on the others
it came with, and ties are ties.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from index.vectors import Rows, StoredVectors
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.runs import Ranking, Scores, rank

_BLOCK_ROWS = 16384
_QUERIES_AT_ONCE = 64


@dataclass(frozen=True)
class Scored:
    """One query's candidates, in no order.

    Attributes:
        doc_ids: The best documents, and with them all that tie with the last of these.
        scores: float32 ``[len(doc_ids)]``, exact.
    """

    doc_ids: list[str]
    scores: Scores

    def joined(self, other: Scored) -> Scored:
        """Return the candidates of both, which have none in common."""
        return Scored(self.doc_ids + other.doc_ids, np.append(self.scores, other.scores))

    def ranked(self, k: int) -> Ranking:
        """Return the best ``k``, as :func:`retrieval_kd.runs.rank` orders them."""
        order = self.scores.argsort()[::-1][: k + 1]
        values = self.scores[order]
        if (values[1:] < values[:-1]).all():
            # Without a tie there is nothing to break.
            return Ranking(tuple(self.doc_ids[i] for i in order[:k].tolist()), values[:k])
        return rank(self.doc_ids, self.scores, k)


NOTHING = Scored([], np.empty(0, dtype=np.float32))


@dataclass(frozen=True)
class Scorer:
    """Scores documents exactly.

    Attributes:
        vectors: Their vectors.
        longest: Length of the longest.
        doc_ids: The ids of rows.
    """

    vectors: StoredVectors
    longest: float
    doc_ids: Callable[[Rows], list[str]]

    def best(self, queries: Vectors, scores: Scores, rows: Rows, k: int) -> list[Scored]:
        """Return each query's best ``k``, given float32 scores of candidates.

        Args:
            queries: float32 ``[n, d]``.
            scores: float32 ``[n, width]``, the candidates' dot products summed in any order; ``-inf`` for none.
            rows: int64 ``[n, width]``, the candidates; below 0 for none.
            k: How many are wanted, at most ``width``.
        """
        parts = [slice(start, start + _QUERIES_AT_ONCE) for start in range(0, len(queries), _QUERIES_AT_ONCE)]
        return [scored for part in parts for scored in self._best(queries[part], scores[part], rows[part], k)]

    def _best(self, queries: Vectors, scores: Scores, rows: Rows, k: int) -> list[Scored]:
        kth = np.partition(scores, -k, axis=1)[:, -k]
        floors = kth - 2 * self.vectors.error_bound(queries, self.longest)
        kept = (scores >= floors[:, np.newaxis]) & (rows >= 0)
        of_query, columns = kept.nonzero()
        found = rows[of_query, columns]
        doc_ids, exact = self.doc_ids(found), self.vectors.dots(queries, of_query, found)
        ends = itertools.accumulate(np.count_nonzero(kept, axis=1).tolist(), initial=0)
        return [Scored(doc_ids[start:end], exact[start:end]) for start, end in itertools.pairwise(ends)]

    def outright(self, queries: Vectors, selected: Rows, k: int) -> Iterator[Scored]:
        """Yield each query's best ``k`` of the selected rows, all of which are scored."""
        k = min(k, len(selected))
        if k == 0:
            yield from itertools.repeat(NOTHING, len(queries))
            return
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            some = queries[start : start + _QUERIES_AT_ONCE]
            scores = np.empty((len(some), len(selected)), dtype=np.float32)
            for first in range(0, len(selected), _BLOCK_ROWS):
                part = slice(first, first + _BLOCK_ROWS)
                scores[:, part] = some @ self.vectors.rows(selected[part]).T
            yield from self.best(some, scores, np.broadcast_to(selected, scores.shape), k)

    def float32_dots(self, queries: Vectors, rows: Rows) -> Scores:
        """Return float32 ``[n, width]`` dot products of each query with its own rows; those below 0 stand for any."""
        scores = np.empty(rows.shape, dtype=np.float32)
        for i, query in enumerate(queries):
            np.dot(self.vectors.rows(rows[i]), query, out=scores[i])
        return scores
