"""A real server in this process, on a port the system chooses."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_fakes import FakeEncoder, FakeReranker, FakeSearcher, FakeSource, Running, Start

from serve.client import RetrievalClient
from serve.config import ServeConfig
from serve.engine import Engine
from serve.indexes import StoreSource
from serve.limits import Limits
from serve.metrics import Metrics


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One event loop in one thread for every server: grpc.aio does not like several."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="loop", daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def start(loop: asyncio.AbstractEventLoop) -> Iterator[Start]:
    """Start servers; whatever is still running at the end of the test is stopped."""
    with contextlib.ExitStack() as stack:

        def start(
            encoder: FakeEncoder | None = None,
            searcher: FakeSearcher | FakeSource | StoreSource | None = None,
            limits: Limits | None = None,
            reranker: FakeReranker | None = None,
            **options: object,
        ) -> Running:
            encoder, searcher, limits = encoder or FakeEncoder(), searcher or FakeSearcher(), limits or Limits()
            source = searcher if isinstance(searcher, FakeSource | StoreSource) else FakeSource(searcher)
            metrics = Metrics()
            config = ServeConfig(Path("store"), Path("encoder"), port=0, limits=limits, **options)
            running = Running(loop, lambda: Engine(encoder, source, limits, 2, metrics, reranker), config, metrics)
            assert running.ready.wait(20)
            if running.done.done():
                running.done.result()
            stack.callback(running.stop)
            if isinstance(encoder, FakeEncoder):
                stack.callback(encoder.gate.set)
            return running

        yield start


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def searcher() -> FakeSearcher:
    return FakeSearcher()


@pytest.fixture
def server(start: Start, encoder: FakeEncoder, searcher: FakeSearcher) -> Running:
    return start(encoder, searcher)


@pytest.fixture
def client(server: Running) -> Iterator[RetrievalClient]:
    with RetrievalClient(server.target) as client:
        yield client
