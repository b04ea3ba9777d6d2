"""An encoder and an index small enough to reason about, with the interfaces of the real ones."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from index.build import build_index
from index.filters import Filter
from index.kinds import Effort
from retrieval_kd.collections.base import Document
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, Side, require_same_space
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.recipes.schema import IndexSpec
from retrieval_kd.runs import Ranking, rank
from serve.config import ServeConfig
from serve.engine import Engine
from serve.indexes import StoreSource, VersionSummary
from serve.metrics import Metrics
from serve.server import run_server, serve

DIMENSION = 16
CARD = EncoderCard(
    name="fake",
    architecture="bert",
    layers=1,
    parameters=1,
    pooling="mean",
    normalize=True,
    dimensions=(DIMENSION,),
    max_length=64,
    query_prefix="",
    document_prefix="",
    similarity="dot",
    tokenizer_hash="t",
    weights_hash="w",
)
STRANGER = replace(CARD, name="stranger", weights_hash="another")


class FakeEncoder:
    """Vectors that depend on the text alone; ``gate`` holds the encoder thread, ``runs`` records its batches."""

    def __init__(self, card: EncoderCard = CARD) -> None:
        self.card = card
        self.gate = threading.Event()
        self.gate.set()
        self.busy = threading.Event()
        self.runs = []
        self.threads = set()
        self.error = None

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        """Give each word a number."""
        self.card.prefix(side)
        self.threads.add(threading.current_thread().name)
        return [[int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) for word in text.split()] for text in texts]

    def run(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Encode rows, once the gate is open."""
        self.threads.add(threading.current_thread().name)
        self.runs.append([tuple(row) for row in rows])
        self.busy.set()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return np.stack([self.vector(row) for row in rows])

    @staticmethod
    def vector(row: Sequence[int]) -> Vectors:
        """Return the unit vector that the row alone decides."""
        values = np.random.default_rng([*row]).standard_normal(DIMENSION).astype(np.float32)
        return values / np.linalg.norm(values)

    def texts_vectors(self, texts: list[str]) -> Vectors:
        """Encode as an offline caller would."""
        return np.stack([self.vector(row) for row in self.tokenize(texts, "query")])


class FakeSearcher:
    """Exact search over random documents, one query at a time; ``closed`` counts what let go of it."""

    kind = "exact"
    dimension = DIMENSION
    effort = Effort(ef_search=64, probes=8, oversample=10)
    field_types: ClassVar = {"title": "text", "text": "text", "number": "int"}
    updates = 0

    def __init__(
        self, count: int = 40, card: EncoderCard = CARD, id_format: str = "doc-{}", version: str = "0000000001-cafe"
    ) -> None:
        self.card = card
        self.version = version
        self.ids = [id_format.format(i) for i in range(count)]
        self.vectors = np.random.default_rng([7, *version.encode()]).standard_normal((count, DIMENSION))
        self.vectors = self.vectors.astype(np.float32)
        self.stored = [{"title": f"title {i}", "text": f"text {i}", "number": i} for i in range(count)]
        self.threads = set()
        self.efforts = []
        self.closed = 0
        self.lent = 0
        self.broken = None
        self.gate = threading.Event()
        self.gate.set()

    @property
    def count(self) -> int:
        """Return the number of documents."""
        return len(self.ids)

    def snapshot(self) -> Self:
        """Return itself: it keeps no earlier states."""
        return self

    def search(
        self,
        vectors: Vectors,
        k: int,
        *,
        exact: bool = False,
        filter: Filter | None = None,  # noqa: A002
        effort: Effort | None = None,
    ) -> list[Ranking]:
        """Rank all documents, or those whose number is the one the filter names."""
        assert self.gate.wait(20)
        assert not self.closed, "searched after it was closed"
        self.threads.add(threading.current_thread().name)
        self.efforts.append((exact, effort))
        kept = range(self.count)
        if filter is not None:
            if filter.field not in self.field_types:
                raise DataError(f"no field {filter.field!r} is stored")
            kept = [i for i in kept if self.stored[i][filter.field] == filter.value]
        ids = [self.ids[i] for i in kept]
        return [rank(ids, self.vectors[list(kept)] @ vector, k) for vector in vectors]

    def fields(self, doc_ids: Sequence[str], names: Sequence[str]) -> list[dict[str, object]]:
        """Return stored fields."""
        for name in names:
            if name not in self.field_types:
                raise DataError(f"no field {name!r} is stored")
        rows = [self.stored[self.ids.index(doc_id)] for doc_id in doc_ids]
        return [{name: row[name] for name in names if name in row} for row in rows]

    def upsert(
        self, ids: Sequence[str], vectors: Vectors, fields: Sequence[Mapping[str, object]] | None = None
    ) -> None:
        """Replace or add."""
        if any(doc_id == "unwritable" for doc_id in ids):
            raise DataError("field 'number' holds int")
        self.delete(ids)
        self.ids += ids
        self.vectors = np.vstack([self.vectors, vectors])
        self.stored += [dict(row) for row in fields or [{}] * len(ids)]

    def delete(self, ids: Sequence[str]) -> None:
        """Remove."""
        kept = [i for i, doc_id in enumerate(self.ids) if doc_id not in set(ids)]
        self.ids, self.stored = [self.ids[i] for i in kept], [self.stored[i] for i in kept]
        self.vectors = self.vectors[kept]

    def check_query_encoder(self, card: EncoderCard) -> None:
        """Refuse another space."""
        require_same_space(card, self.card)

    def self_test(self) -> None:
        """Fail as told."""
        if self.broken is not None:
            raise self.broken

    def close(self) -> None:
        """Count, once whoever else opened the same version has let go as well."""
        self.lent -= 1
        if self.lent <= 0:
            self.closed += 1


class FakeSource:
    """A store in memory: ``current`` may be set to any of its versions, as another process would publish it."""

    def __init__(self, *searchers: FakeSearcher) -> None:
        self.searchers = {searcher.version: searcher for searcher in searchers}
        self.pointer = searchers[0].version
        self.opened = []
        self.read_only = False

    def current(self) -> str:
        """Return the pointer."""
        return self.pointer

    def names(self) -> list[str]:
        """Return all names."""
        return sorted(self.searchers)

    def versions(self) -> list[VersionSummary]:
        """Return all."""
        return [
            VersionSummary(name, "2026-01-01T00:00:00+00:00", one.kind, one.count, one.dimension)
            for name, one in sorted(self.searchers.items())
        ]

    def open(self, version: str) -> FakeSearcher:
        """Open it anew, as a store would."""
        self.opened.append(version)
        searcher = self.searchers[version]
        if isinstance(searcher, FakeSearcher):
            searcher.lent += 1
            searcher.closed = 0
        return searcher

    def select(self, version: str) -> None:
        """Move the pointer."""
        if self.read_only:
            raise ArtifactError("store: cannot write the index (Read-only file system)")
        self.pointer = version


class FakeReranker:
    """Scores a text by how many letters it shares with the query."""

    fingerprint = "reranked"

    def score(self, query: str, texts: Sequence[str]) -> Vectors:
        """Return one number for each text."""
        return np.array([len(set(query) & set(text)) - len(text) / 1000 for text in texts], dtype=np.float32)


class Running:
    """A server that answers, and how to stop it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, load: Callable[[], Engine], config: ServeConfig, metrics: Metrics
    ) -> None:
        self._loop = loop
        self.limits = config.limits
        self.metrics = metrics
        self.port = 0
        self.ready = threading.Event()
        self.stop_event, self.reload_event = asyncio.Event(), asyncio.Event()
        self.done = asyncio.run_coroutine_threadsafe(
            serve(load, self.stop_event, config, metrics, self.reload_event, self._is_ready), loop
        )
        self.done.add_done_callback(lambda _: self.ready.set())

    def _is_ready(self, port: int) -> None:
        self.port = port
        self.ready.set()

    @property
    def target(self) -> str:
        """Return where it listens."""
        return f"127.0.0.1:{self.port}"

    def wait_for(self, metric: str, value: float, **labels: str) -> None:
        """Wait until a metric has a value; how long that takes is the machine's affair."""
        give_up = time.monotonic() + 30
        while (found := self.metrics.registry.get_sample_value(metric, labels)) != value:
            assert time.monotonic() < give_up, f"{metric} is {found}"
            time.sleep(0.005)

    def reload(self) -> None:
        """Do what SIGHUP does."""
        self._loop.call_soon_threadsafe(self.reload_event.set)

    def begin_stop(self) -> None:
        """Ask it to stop and return at once."""
        self._loop.call_soon_threadsafe(self.stop_event.set)

    def stop(self) -> None:
        """Stop it and wait until it has."""
        self.begin_stop()
        self.done.result(20)


Start = Callable[..., Running]
EXACT = IndexSpec("exact")


class Documents:
    """A collection of documents with fields and no queries."""

    name = "documents"

    def __init__(self, count: int) -> None:
        self.fingerprint = self.corpus_fingerprint = f"{count}" * 8
        self.texts = {f"doc-{i}": f"text {i}" for i in range(count)}

    def documents(self) -> Iterator[Document]:
        """Stream them."""
        for i, (doc_id, text) in enumerate(self.texts.items()):
            yield Document(doc_id, f"title {i}", text, {"number": i})


def real_store(folder: Path, *counts: int, spec: IndexSpec = EXACT) -> StoreSource:
    """Build one index version for each count of documents, the last one current, with stored fields."""
    for count in counts:
        documents = Documents(count)
        ids = sorted(documents.texts)
        vectors = FakeEncoder().texts_vectors([documents.texts[doc_id] for doc_id in ids])
        corpus = EncodedCorpus(ids, vectors, CARD, documents.fingerprint, documents.corpus_fingerprint)
        build_index(corpus, spec, folder, CARD, collection=documents, fields=("title", "text", "number"))
    return StoreSource(folder)


if __name__ == "__main__":  # a server process for the tests of signals: serve_fakes.py READY_FILE SECONDS_PER_BATCH
    import sys

    encoder = FakeEncoder()
    encode = encoder.run

    def slowly(rows: Sequence[Sequence[int]]) -> Vectors:
        time.sleep(float(sys.argv[2]) if rows != encoder.tokenize(["warm up"], "query") else 0)
        return encode(rows)

    encoder.run = slowly
    Engine.open = classmethod(
        lambda cls, store, folder, limits, threads, metrics, reranker: cls(
            encoder, FakeSource(FakeSearcher()), limits, 2, metrics
        )
    )
    ready = Path(sys.argv[1])

    def tell(port: int) -> None:
        ready.with_suffix(".tmp").write_text(str(port))
        ready.with_suffix(".tmp").rename(ready)

    run_server(ServeConfig(Path("store"), Path("encoder"), port=0), tell)
