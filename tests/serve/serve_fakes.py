"""An encoder and an index small enough to reason about, with the interfaces of the real ones."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, Side, require_same_space
from retrieval_kd.runs import Ranking, rank
from serve.engine import Engine
from serve.limits import Limits
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
        assert side == "query"
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
    """Exact search over random documents, one query at a time."""

    kind = "flat"
    version = "0000000001-cafe"
    dimension = DIMENSION

    def __init__(self, count: int = 40, card: EncoderCard = CARD, id_format: str = "doc-{}") -> None:
        self.card = card
        self.count = count
        self.ids = [id_format.format(i) for i in range(count)]
        self.vectors = np.random.default_rng(7).standard_normal((count, DIMENSION)).astype(np.float32)
        self.threads = set()

    def search(self, vectors: Vectors, k: int) -> list[Ranking]:
        """Rank all documents."""
        self.threads.add(threading.current_thread().name)
        return [rank(self.ids, self.vectors @ vector, k) for vector in vectors]

    def check_query_encoder(self, card: EncoderCard) -> None:
        """Refuse another space."""
        require_same_space(card, self.card)


class Running:
    """A server that answers, and how to stop it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, load: Callable[[], Engine], limits: Limits) -> None:
        self._loop = loop
        self.limits = limits
        self.port = 0
        self.ready = threading.Event()
        self.stop_event = asyncio.Event()
        self.done = asyncio.run_coroutine_threadsafe(
            serve(load, self.stop_event, port=0, limits=limits, on_ready=self._is_ready), loop
        )
        self.done.add_done_callback(lambda _: self.ready.set())

    def _is_ready(self, port: int) -> None:
        self.port = port
        self.ready.set()

    @property
    def target(self) -> str:
        """Return where it listens."""
        return f"127.0.0.1:{self.port}"

    def begin_stop(self) -> None:
        """Ask it to stop and return at once."""
        self._loop.call_soon_threadsafe(self.stop_event.set)

    def stop(self) -> None:
        """Stop it and wait until it has."""
        self.begin_stop()
        self.done.result(20)


Start = Callable[..., Running]


if __name__ == "__main__":  # a server process for the tests of signals: serve_fakes.py READY_FILE SECONDS_PER_BATCH
    import sys
    import time
    from pathlib import Path

    encoder = FakeEncoder()
    encode = encoder.run

    def slowly(rows: Sequence[Sequence[int]]) -> Vectors:
        time.sleep(float(sys.argv[2]) if rows != encoder.tokenize(["warm up"], "query") else 0)
        return encode(rows)

    encoder.run = slowly
    Engine.open = classmethod(lambda cls, store, folder, limits, threads: cls(encoder, FakeSearcher(), limits, 2))
    ready = Path(sys.argv[1])

    def tell(port: int) -> None:
        ready.with_suffix(".tmp").write_text(str(port))
        ready.with_suffix(".tmp").rename(ready)

    run_server(Path("store"), Path("encoder"), port=0, on_ready=tell)
