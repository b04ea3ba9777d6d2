"""Scoring candidates: a teacher that reads texts, the pairs of any number of lists, and a store of raw logits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from retrieval_kd.artifacts import Artifact, Spec, build, canonical_json
from retrieval_kd.collections.base import Collection
from retrieval_kd.errors import DataError
from retrieval_kd.progress import progress
from retrieval_kd.runs import Scores, Shortlist
from retrieval_kd.scores.store import PAIRS_PER_SHARD, STAGE, Pair, ScoreSource, shard_path, write_shard


class PairScorer(Protocol):
    """A teacher that reads a query's and a document's text."""

    @property
    def name(self) -> str:
        """Return what tables print."""

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over everything that changes a score."""

    @property
    def source(self) -> ScoreSource:
        """Return what a score store's manifest says about this teacher."""

    @property
    def parameters(self) -> int:
        """Return the number of weights."""

    def score(self, pairs: Sequence[tuple[str, str]], on_rows: Callable[[int], None] | None = None) -> Scores:
        """Return the raw score of each (query, document) pair, float32; ``on_rows`` hears how many are done."""


def score_candidates(
    teacher: PairScorer,
    collection: Collection,
    lists: Iterable[Shortlist],
    folder: Path,
    pairs_per_shard: int = PAIRS_PER_SHARD,
) -> Artifact:
    """Score every pair of the lists once and keep the raw logits as a store.

    Shards are cut from the pairs' order alone and each is scored by itself, so a run that was killed
    goes on with the first missing shard and ends with the same bytes as one that was not. The texts of one shard are
    in memory at a time, and of the lists no more than the distinct query ids.

    Args:
        teacher: The ranker.
        collection: Where texts are looked up.
        lists: The candidates, read three times; a pair that several lists share is scored once.
        folder: Where the store lives; see :class:`retrieval_kd.scores.store.ScoreStore`.
        pairs_per_shard: Pairs whose work is lost when the run is killed.

    Raises:
        DataError: no pairs, a query or document the collection does not have (found before the first
            pair is scored), or a score that is not finite; names the id.
    """
    pairs = DistinctPairs(lists)
    if not pairs.count:
        raise DataError("no candidates to score; mine some first")
    spec = Spec(
        STAGE,
        config={**teacher.source.config(), "pairs_per_shard": pairs_per_shard},
        inputs={"teacher": teacher.fingerprint, "collection": collection.fingerprint, "pairs": pairs.fingerprint},
    )

    def work(target: Path) -> Mapping[str, Any]:
        for shard in _shards(pairs, pairs_per_shard):
            for _ in _texts(collection, shard):
                pass
        with progress(f"score with {teacher.name}", pairs.count, "pairs") as advance:
            for number, shard in enumerate(_shards(pairs, pairs_per_shard)):
                if shard_path(target, number).is_file():
                    advance(len(shard))
                else:
                    write_shard(target, number, shard, teacher.score(list(_texts(collection, shard)), advance))
        return {"pairs": pairs.count, "queries": pairs.queries}

    return build(folder, spec, work)


class DistinctPairs:
    """The (query, document) pairs of lists, each once, in the order of their first appearance.

    Only documents of queries that have several lists are remembered while the pairs are read.

    Attributes:
        count: Pairs in all.
        queries: Queries in all.
        fingerprint: sha256 over the pairs in their order.
    """

    def __init__(self, lists: Iterable[Shortlist]) -> None:
        """Read the lists twice: which queries come again, and how many pairs there are."""
        self._lists = lists
        seen: set[str] = set()
        self._again: set[str] = set()
        for item in lists:
            (self._again if item.query_id in seen else seen).add(item.query_id)
        self.queries = len(seen)
        self.count = 0
        digest = hashlib.sha256()
        for pair in self:
            digest.update(f"{canonical_json(pair)}\n".encode())
            self.count += 1
        self.fingerprint = digest.hexdigest()

    def __iter__(self) -> Iterator[Pair]:
        """Yield the pairs."""
        known: defaultdict[str, set[str]] = defaultdict(set)
        for item in self._lists:
            for doc_id in dict.fromkeys(item.doc_ids):
                if item.query_id in self._again:
                    if doc_id in known[item.query_id]:
                        continue
                    known[item.query_id].add(doc_id)
                yield item.query_id, doc_id


def _shards(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    rows = iter(pairs)
    while shard := list(islice(rows, size)):
        yield shard


def _texts(collection: Collection, pairs: Sequence[Pair]) -> Iterator[tuple[str, str]]:
    queries = collection.queries()
    contents = collection.contents(dict.fromkeys(doc_id for _, doc_id in pairs))
    for query_id, doc_id in pairs:
        if query_id not in queries:
            raise DataError(f"{collection.name}: no query {query_id!r}; mine the candidates from this collection")
        yield queries[query_id], contents[doc_id]
