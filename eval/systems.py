"""Systems under evaluation: whatever turns queries into rankings, behind one small protocol."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from eval.latency import Latency, encode_latency, latency
from eval.measures import evaluate, require_measurable
from eval.results import Facts, SystemResult
from retrieval_kd.collections.base import Collection, Qrels
from retrieval_kd.collections.msmarco import is_msmarco_run, read_run
from retrieval_kd.encoders.base import Encoder
from retrieval_kd.errors import DataError
from retrieval_kd.progress import progress, silence
from retrieval_kd.runs import Ranking, Run, Scores, rank

if TYPE_CHECKING:
    from index.search import Searcher
    from retrieval_kd.mining.bm25 import BM25Index
    from retrieval_kd.teachers.scoring import PairScorer
    from serve.client import RetrievalClient

_BLOCK = 64


class System(Protocol):
    """Ranks documents for queries and knows what that costs."""

    @property
    def name(self) -> str:
        """Return what tables print."""

    @property
    def role(self) -> str:
        """Return ``bm25``, ``bi-encoder``, ``student``, ``reranker``, ``server`` or ``run``."""

    def run(self, queries: Mapping[str, str], depth: int) -> Run:
        """Return the best ``depth`` documents of each query; a query without results may be left out."""

    def facts(self, queries: Mapping[str, str], depth: int) -> Facts:
        """Return the cost, timed on ``queries`` one at a time."""


def assess(
    system: System,
    queries: Mapping[str, str],
    qrels: Qrels,
    measures: Sequence[str],
    depth: int,
    seed: int = 0,
    timed: int = 100,
) -> SystemResult:
    """Run a system on a split, measure it, and time it on a sample of the same queries.

    Args:
        system: What is evaluated.
        queries: Texts of the split's queries.
        qrels: The split's judgements.
        measures: ir_measures names.
        depth: Documents retrieved for each query.
        seed: Seed of the timed sample and of the bootstrap.
        timed: Most queries to time; 0 times nothing.
    """
    # Before the run: a misspelt name must not cost an hour of reranking.
    require_measurable(measures, depth)
    return judge(system, system.run(queries, depth), queries, qrels, measures, depth, seed, timed)


def judge(
    system: System,
    run: Run,
    queries: Mapping[str, str],
    qrels: Qrels,
    measures: Sequence[str],
    depth: int,
    seed: int = 0,
    timed: int = 100,
) -> SystemResult:
    """Measure a run that a system has given, and time the system; see :func:`assess`."""
    rng = np.random.default_rng([seed, 2])
    chosen = sorted(rng.choice(len(queries), size=min(timed, len(queries)), replace=False).tolist())
    texts = list(queries.items())
    facts = system.facts(dict(texts[i] for i in chosen), depth) if chosen else Facts()
    judged = evaluate(run, qrels, ["Judged@10"]).means["Judged@10"]
    return SystemResult.of(system.name, system.role, evaluate(run, qrels, measures), facts, run, seed, judged)


class BM25System:
    """BM25 over a collection, see :mod:`retrieval_kd.mining.bm25` for its variant; indexed once, when first asked."""

    role = "bm25"

    def __init__(self, collection: Collection, name: str = "BM25 (lucene, k1 0.9, b 0.4)") -> None:
        """Say what is searched."""
        self.name = name
        self._collection = collection

    @functools.cached_property
    def _index(self) -> BM25Index:
        from retrieval_kd.mining.bm25 import BM25Index

        return BM25Index.build(self._collection)

    def prepare(self) -> None:
        """Build the index now instead of with the first query."""
        _ = self._index

    def run(self, queries: Mapping[str, str], depth: int) -> Run:
        """Return BM25's rankings, without documents that share no word with the query."""
        return self._index.search(queries, depth)

    def facts(self, queries: Mapping[str, str], depth: int) -> Facts:
        """Time single queries; BM25 has no parameters and encodes nothing."""
        whole = _query_latency(self, queries, depth)
        return Facts(query_ms_p50=whole.p50_ms, query_ms_p95=whole.p95_ms)


class IndexSystem:
    """A query encoder over an index: a symmetric bi-encoder, or a student in the document encoder's space."""

    def __init__(
        self, name: str, role: str, encoder: Encoder, searcher: Searcher, collection: Collection | None = None
    ) -> None:
        """Put a query encoder before an index; with a collection, every result must be of it.

        Raises:
            EncoderMismatch: the encoder's vectors do not lie in the index's space.
            DataError: the index has another number of documents than the collection.
        """
        searcher.check_query_encoder(encoder.card)
        if collection is not None:
            _require_count(f"index {name!r}", searcher.count, f"version {searcher.version}", collection)
        self.name = name
        self.role = role
        self._encoder = encoder
        self._searcher = searcher
        self._collection = collection

    def run(self, queries: Mapping[str, str], depth: int) -> Run:
        """Encode the queries and search."""
        run: dict[str, Ranking] = {}
        with progress(f"search {self.name}", len(queries), "queries") as advance:
            for block in _blocks(queries):
                vectors = self._encoder.encode([queries[query_id] for query_id in block], "query")
                run.update(zip(block, self._searcher.search(vectors, depth), strict=True))
                advance(len(block))
        # A single query is a timed one: its whole run was checked before.
        if self._collection is not None and len(queries) > 1:
            require_known(f"index {self.name!r}", run, self._collection)
        return run

    def staged(self, text: str, depth: int) -> dict[str, float]:
        """Answer one query and return the seconds of its stages."""
        start = time.perf_counter()
        vectors = self._encoder.encode([text], "query")
        encoded = time.perf_counter()
        self._searcher.search(vectors, depth)
        return {"encode": encoded - start, "search": time.perf_counter() - encoded}

    def facts(self, queries: Mapping[str, str], depth: int) -> Facts:
        """Time encoding alone, and encoding with search."""
        encoding = encode_latency(self._encoder, list(queries.values()))
        whole = _query_latency(self, queries, depth)
        return Facts(
            params=self._encoder.card.parameters,
            encode_ms_p50=encoding.p50_ms,
            query_ms_p50=whole.p50_ms,
            query_ms_p95=whole.p95_ms,
            bytes_per_doc=self._searcher.bytes_per_doc,
        )


class RerankSystem:
    """A teacher that reorders the top of another system's rankings."""

    role = "reranker"

    def __init__(self, name: str, first: System, teacher: PairScorer, collection: Collection, depth: int) -> None:
        """Say what is reranked.

        Args:
            name: What tables print.
            first: The first stage.
            teacher: Reads query and document together.
            collection: Where texts are looked up.
            depth: Ranks of the first stage that are scored; what lies below keeps its order below them.
        """
        self.name = name
        self._first = first
        self._teacher = teacher
        self._collection = collection
        self._depth = depth

    def run(self, queries: Mapping[str, str], depth: int) -> Run:
        """Rerank the first stage's rankings."""
        first = self._first.run(queries, max(depth, self._depth))
        total = sum(min(self._depth, len(ranking)) for ranking in first.values())
        run: dict[str, Ranking] = {}
        with progress(f"rerank {self.name}", total, "pairs") as advance:
            for block in _blocks(first):
                tops = {query_id: first[query_id].top(self._depth) for query_id in block}
                texts = self._collection.contents({doc_id for top in tops.values() for doc_id in top.doc_ids})
                pairs = [(queries[query_id], texts[doc_id]) for query_id, top in tops.items() for doc_id in top.doc_ids]
                scores = self._teacher.score(pairs, on_rows=advance)
                ends = np.cumsum([len(top) for top in tops.values()])[:-1]
                for query_id, values in zip(block, np.split(scores, ends), strict=True):
                    run[query_id] = reranked(first[query_id], values).top(depth)
        return run

    def facts(self, queries: Mapping[str, str], depth: int) -> Facts:
        """Time the reranking of one query's candidates; the first stage is not in it."""
        first = self._first.run(queries, self._depth)
        if not first:
            return Facts(params=self._teacher.parameters)
        stored = RunSystem("first stage", first)
        alone = RerankSystem(self.name, stored, self._teacher, self._collection, self._depth)
        whole = _query_latency(alone, {query_id: queries[query_id] for query_id in first}, depth)
        return Facts(params=self._teacher.parameters, query_ms_p50=whole.p50_ms, query_ms_p95=whole.p95_ms)


@dataclass(frozen=True)
class ScoredRerank:
    """A reranker whose scores come from the score store, so that a killed evaluation does not score twice.

    Attributes:
        name: What tables print.
        scored: The reranked rankings.
        timed: The reranker itself, for its cost; None where no one model does it.
    """

    name: str
    scored: Run
    timed: RerankSystem | None
    role: str = "reranker"

    def run(self, queries: Mapping[str, str], depth: int) -> Run:
        """Return the stored rankings."""
        return {query_id: ranking.top(depth) for query_id, ranking in self.scored.items() if query_id in queries}

    def facts(self, queries: Mapping[str, str], depth: int) -> Facts:
        """Time real scoring."""
        return self.timed.facts(queries, depth) if self.timed else Facts()


@dataclass(frozen=True)
class ServerSystem:
    """A running gRPC server that serves an index of the collection."""

    name: str
    client: RetrievalClient
    collection: Collection
    params: int | None = None
    role: str = "server"

    def run(self, queries: Mapping[str, str], depth: int) -> Run:
        """Ask the server in batches.

        Raises:
            DataError: the server's index has another number of documents than the collection, it returns a
                document the collection does not have, or its limits lie below ``depth``.
        """
        batch = min(_BLOCK, self._checked_batch_limit(depth))
        run: dict[str, Ranking] = {}
        with progress(f"ask {self.name}", len(queries), "queries") as advance:
            for block in _blocks(queries, batch):
                results = self.client.batch_search([queries[query_id] for query_id in block], top_k=depth)
                for query_id, result in zip(block, results, strict=True):
                    run[query_id] = rank([hit.doc_id for hit in result.hits], [hit.score for hit in result.hits])
                advance(len(block))
        require_known(f"server {self.name!r}", run, self.collection)
        return run

    def staged(self, text: str, depth: int) -> dict[str, float]:
        """Answer one query and return the seconds of the server's stages; the rest of the total is the wire."""
        timings = self.client.search(text, top_k=depth).timings
        nanoseconds = {
            "tokenize": timings.tokenize_ns,
            "queue": timings.queue_ns,
            "encode": timings.encode_ns,
            "search": timings.search_ns,
            "server": timings.total_ns,
        }
        return {stage: value / 1e9 for stage, value in nanoseconds.items()}

    def facts(self, queries: Mapping[str, str], depth: int) -> Facts:
        """Time single searches end to end: over the wire, encoding and search included."""
        whole = latency(lambda text: self.client.search(text, top_k=depth), list(queries.values()))
        return Facts(params=self.params, query_ms_p50=whole.p50_ms, query_ms_p95=whole.p95_ms)

    def _checked_batch_limit(self, depth: int) -> int:
        index = self.client.index()
        version = f"index {index.index_version}"
        _require_count(f"server {self.name!r}", index.document_count, version, self.collection)
        limits = self.client.server_info().limits
        if depth > limits.max_top_k:
            raise DataError(
                f"server {self.name!r} returns at most {limits.max_top_k} documents, depth is {depth}; "
                "raise the server's max_top_k or lower the depth"
            )
        return limits.max_batch_queries


@dataclass(frozen=True)
class RunSystem:
    """Rankings made elsewhere."""

    name: str
    rankings: Run
    role: str = "run"

    @classmethod
    def read(cls, name: str, path: Path, collection: Collection, qrels: Qrels) -> RunSystem:
        """Read a run, TREC's or MS MARCO's, and check that it speaks of this collection and split.

        Raises:
            DataError: the file is empty or malformed, answers a query that the split does not judge, or ranks a
                document that the collection does not have; names file and line.
        """
        run = read_run(path)
        if not run:
            raise DataError(f"{path}: no rankings in it; make the run again, one line for each document found")
        for query_id in run:
            if query_id not in qrels:
                raise DataError(
                    f"{path}:{_line_of(path, 0, query_id)}: query {query_id!r} is not judged in this split; "
                    "give a run of the same split"
                )
        unknown = _unknown_documents(run, collection)
        if unknown:
            doc_id, column = min(unknown), 1 if is_msmarco_run(path) else 2
            raise DataError(
                f"{path}:{_line_of(path, column, doc_id)}: document {doc_id!r} is not in {collection.name} "
                f"({len(unknown)} unknown in all); give a run over the same corpus"
            )
        return cls(name, run)

    def run(self, queries: Mapping[str, str], depth: int) -> Run:
        """Return the stored rankings of these queries."""
        return {query_id: self.rankings[query_id].top(depth) for query_id in queries if query_id in self.rankings}

    def facts(self, queries: Mapping[str, str], depth: int) -> Facts:
        """Return nothing: what made the run is not here."""
        return Facts()


def reranked(first: Ranking, scores: Scores) -> Ranking:
    """Reorder the top of a ranking by new scores.

    Args:
        first: The first stage's ranking.
        scores: float32 ``[n]``, the new scores of its first ``n`` documents. The others follow below
            them in the first stage's order.
    """
    values = np.asarray(scores, dtype=np.float32)
    lowest = values.min(initial=np.float32(0.0))
    # Two float32 spacings, so that the tail stays apart however large the scores are.
    step = max(1.0, 2.0 * float(np.spacing(np.abs(lowest))))
    below = float(lowest) - step * np.arange(1, 1 + len(first) - len(values))
    return rank(first.doc_ids, np.concatenate([values, below]))


def _query_latency(system: System, queries: Mapping[str, str], depth: int) -> Latency:
    """Time whole single queries of a system."""
    with silence():
        return latency(lambda item: system.run(dict([item]), depth), list(queries.items()))


def _require_count(who: str, count: int, version: str, collection: Collection) -> None:
    documents = sum(1 for _ in collection.documents())
    if count != documents:
        raise DataError(
            f"{who} searches {count} documents ({version}), collection {collection.name} has {documents}; "
            "give an index of that collection"
        )


def require_known(who: str, run: Run, collection: Collection) -> None:
    """Refuse a run of another corpus.

    Raises:
        DataError: a ranked document that the collection does not have.
    """
    unknown = _unknown_documents(run, collection)
    if unknown:
        raise DataError(
            f"{who} returned document {min(unknown)!r}, which {collection.name} does not have; "
            "give an index of that collection"
        )


def _unknown_documents(run: Run, collection: Collection) -> set[str]:
    """Return the ranked documents the collection does not have, streaming the corpus once."""
    ranked = {doc_id for ranking in run.values() for doc_id in ranking.doc_ids}
    for document in collection.documents():
        ranked.discard(document.doc_id)
    return ranked


def _line_of(path: Path, column: int, value: str) -> int:
    with path.open(encoding="utf-8") as file:
        return next(number for number, line in enumerate(file, start=1) if line.split()[column : column + 1] == [value])


def _blocks(query_ids: Iterable[str], size: int = _BLOCK) -> Iterator[list[str]]:
    ids = list(query_ids)
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
