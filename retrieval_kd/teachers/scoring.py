"""Scoring candidates: teachers that read texts, the pairs or triples of any number of lists, and stores of the results.

Shards are cut from the order of the lists alone and each is scored by itself, so a run that was killed goes on with
the first missing shard and ends with the same bytes as one that was not. The texts of one shard are in memory at a
time, however many there are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from retrieval_kd.artifacts import Artifact, Spec, build, canonical_json
from retrieval_kd.collections.base import Collection
from retrieval_kd.errors import DataError
from retrieval_kd.progress import Advance, progress
from retrieval_kd.runs import Scores, Shortlist
from retrieval_kd.scores import preferences, store
from retrieval_kd.scores.preferences import Triple, preferences_path, write_preferences
from retrieval_kd.scores.store import PAIRS_PER_SHARD, Pair, ScoreSource, shard_path, write_shard

# The ids of a row, and its texts: as many.
_Ids = TypeVar("_Ids", Pair, Triple)


class Ranker(Protocol):
    """A teacher that reads texts."""

    @property
    def name(self) -> str:
        """Return what tables print."""

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over everything that changes what it says."""

    @property
    def source(self) -> ScoreSource:
        """Return what a store's manifest says about this teacher."""

    @property
    def parameters(self) -> int:
        """Return the number of weights."""


class PairScorer(Ranker, Protocol):
    """A teacher that reads a query's and a document's text."""

    def score(self, pairs: Sequence[tuple[str, str]], on_rows: Callable[[int], None] | None = None) -> Scores:
        """Return the raw score of each (query, document) pair, float32; ``on_rows`` hears how many are done."""


class TripleScorer(Ranker, Protocol):
    """A teacher that reads a query's and two documents' texts."""

    def preferences(
        self, triples: Sequence[tuple[str, str, str]], on_rows: Callable[[int], None] | None = None
    ) -> Scores:
        """Return the probability that the first document of each (query, first, second) is more relevant, float32."""


def score_candidates(
    teacher: PairScorer,
    collection: Collection,
    lists: Iterable[Shortlist],
    folder: Path,
    pairs_per_shard: int = PAIRS_PER_SHARD,
    asked: Mapping[str, Any] = {},
) -> Artifact:
    """Score every pair of the lists once and keep the raw logits as a store.

    Args:
        teacher: The ranker.
        collection: Where texts are looked up.
        lists: The candidates, read several times; a pair that several lists share is scored once.
        folder: Where the store lives; see :class:`retrieval_kd.scores.store.ScoreStore`.
        pairs_per_shard: Pairs whose work is lost when the run is killed.
        asked: As in :class:`retrieval_kd.artifacts.Spec`.

    Raises:
        DataError: no pairs, a query or document the collection does not have (found before the first
            pair is scored), or a score that is not finite; names the id.
    """
    pairs = _DistinctPairs(lists)
    work = _Work(
        label=f"score with {teacher.name}",
        unit="pairs",
        size=pairs_per_shard,
        path=shard_path,
        texts=lambda shard: _pair_texts(collection, shard),
        score=teacher.score,
        write=write_shard,
    )
    return _scored(store.STAGE, teacher, collection, pairs, work, folder, asked)


def compare_candidates(
    teacher: TripleScorer,
    collection: Collection,
    lists: Iterable[Shortlist],
    folder: Path,
    comparisons: int = 0,
    seed: int = 0,
    triples_per_shard: int = PAIRS_PER_SHARD,
    asked: Mapping[str, Any] = {},
) -> Artifact:
    """Compare the documents of each list two at a time, in both orders, and keep the preferences as a store.

    Args:
        teacher: The pairwise ranker.
        collection: Where texts are looked up.
        lists: The candidates, read several times; one list a query.
        folder: Where the store lives; see :class:`retrieval_kd.scores.preferences.PreferenceStore`.
        comparisons: Pairs of documents compared in each list, drawn by the query's id and ``seed``, or as many as it
            has documents where these are more, so that each is compared with two others; all when 0.
        seed: Seed of the draws.
        triples_per_shard: Comparisons whose work is lost when the run is killed.
        asked: As in :class:`retrieval_kd.artifacts.Spec`.

    Raises:
        DataError: nothing to compare, a query or document the collection does not have (found before the first
            comparison), or a value that is no probability; names the id.
    """
    triples = _Triples(lists, comparisons, seed)
    work = _Work(
        label=f"compare with {teacher.name}",
        unit="comparisons",
        size=triples_per_shard,
        path=preferences_path,
        texts=lambda shard: _triple_texts(collection, shard),
        score=teacher.preferences,
        write=write_preferences,
    )
    return _scored(preferences.STAGE, teacher, collection, triples, work, folder, asked)


@dataclass(frozen=True)
class _Work(Generic[_Ids]):
    """How a shard of ids becomes a file; ``texts`` fails where there is none."""

    label: str
    unit: str
    size: int
    path: Callable[[Path, int], Path]
    texts: Callable[[Sequence[_Ids]], list[_Ids]]
    score: Callable[[list[_Ids], Advance], Scores]
    write: Callable[[Path, int, Sequence[_Ids], Scores], None]


def _scored(
    stage: str,
    teacher: Ranker,
    collection: Collection,
    rows: Iterable[_Ids],
    work: _Work[_Ids],
    folder: Path,
    asked: Mapping[str, Any],
) -> Artifact:
    count, digest = _counted(rows)
    if not count:
        raise DataError("no candidates to score; mine some first")
    spec = Spec(
        stage,
        config={**teacher.source.config(), f"{work.unit}_per_shard": work.size},
        inputs={"teacher": teacher.fingerprint, "collection": collection.fingerprint, work.unit: digest},
        asked=asked,
    )

    def make(target: Path) -> Mapping[str, Any]:
        queries: set[str] = set()
        for shard in _shards(rows, work.size):
            work.texts(shard)
            queries.update(ids[0] for ids in shard)
        with progress(work.label, count, work.unit) as advance:
            for number, shard in enumerate(_shards(rows, work.size)):
                if work.path(target, number).is_file():
                    advance(len(shard))
                else:
                    work.write(target, number, shard, work.score(work.texts(shard), advance))
        return {work.unit: count, "queries": len(queries)}

    return build(folder, spec, make)


def _counted(rows: Iterable[tuple[str, ...]]) -> tuple[int, str]:
    """Return how many rows there are, and the sha256 over them in their order."""
    count = 0
    digest = hashlib.sha256()
    for ids in rows:
        digest.update(f"{canonical_json(ids)}\n".encode())
        count += 1
    return count, digest.hexdigest()


def _shards(rows: Iterable[_Ids], size: int) -> Iterator[list[_Ids]]:
    left = iter(rows)
    while shard := list(islice(left, size)):
        yield shard


class _DistinctPairs:
    """The (query, document) pairs of lists, each once, in the order of their first appearance.

    Only documents of queries that have several lists are remembered while the pairs are read.
    """

    def __init__(self, lists: Iterable[Shortlist]) -> None:
        self._lists = lists
        seen: set[str] = set()
        self._again: set[str] = set()
        for item in lists:
            (self._again if item.query_id in seen else seen).add(item.query_id)

    def __iter__(self) -> Iterator[Pair]:
        known: defaultdict[str, set[str]] = defaultdict(set)
        for item in self._lists:
            for doc_id in dict.fromkeys(item.doc_ids):
                if item.query_id in self._again:
                    if doc_id in known[item.query_id]:
                        continue
                    known[item.query_id].add(doc_id)
                yield item.query_id, doc_id


class _Triples:
    """Both orders of the pairs of documents that are compared for each query."""

    def __init__(self, lists: Iterable[Shortlist], comparisons: int, seed: int) -> None:
        self._lists = lists
        self._comparisons = comparisons
        self._seed = seed

    def __iter__(self) -> Iterator[Triple]:
        for item in self._lists:
            for first, second in self._pairs(item):
                yield item.query_id, first, second
                yield item.query_id, second, first

    def _pairs(self, item: Shortlist) -> list[tuple[str, str]]:
        pairs = list(itertools.combinations(range(len(item.doc_ids)), 2))
        wanted = max(self._comparisons, len(item.doc_ids))
        if self._comparisons > 0 and wanted < len(pairs):
            of_query = int.from_bytes(hashlib.sha256(item.query_id.encode()).digest()[:8], "little")
            pairs = _drawn(pairs, len(item.doc_ids), wanted, np.random.default_rng([self._seed, of_query]))
        return [(item.doc_ids[first], item.doc_ids[second]) for first, second in pairs]


def _drawn(
    pairs: Sequence[tuple[int, int]], documents: int, wanted: int, generator: np.random.Generator
) -> list[tuple[int, int]]:
    """Return a random cycle through all documents, and random other pairs up to the number wanted."""
    # Pairs drawn one by one would leave documents out, whose scores nothing could be said about.
    ring = generator.permutation(documents).tolist()
    cycle = {(min(edge), max(edge)) for edge in itertools.pairwise([*ring, ring[0]])}
    others = [pair for pair in pairs if pair not in cycle]
    return sorted([*cycle, *(others[i] for i in generator.choice(len(others), wanted - documents, replace=False))])


def _pair_texts(collection: Collection, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    contents = collection.contents(dict.fromkeys(doc_id for _, doc_id in pairs))
    return [(_query(collection, query_id), contents[doc_id]) for query_id, doc_id in pairs]


def _triple_texts(collection: Collection, triples: Sequence[Triple]) -> list[tuple[str, str, str]]:
    contents = collection.contents(dict.fromkeys(doc_id for _, *doc_ids in triples for doc_id in doc_ids))
    return [(_query(collection, query_id), contents[first], contents[second]) for query_id, first, second in triples]


def _query(collection: Collection, query_id: str) -> str:
    text = collection.queries().get(query_id)
    if text is None:
        raise DataError(f"{collection.name}: no query {query_id!r}; mine the candidates from this collection")
    return text
