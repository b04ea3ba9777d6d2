"""The typed client: what it returns, and the one line it says when something is wrong."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_fakes import CARD, DIMENSION, FakeEncoder, FakeSearcher, FakeSource, Running, Start

from retrieval_kd.errors import ServeError
from serve import client as client_module
from serve.client import AsyncRetrievalClient, Options, RetrievalClient, SearchResult
from serve.config import ServeConfig
from serve.engine import Engine
from serve.limits import Limits
from serve.messages import search_request
from serve.server import serve


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_search_by_text_and_by_vector_agree(client: RetrievalClient, encoder: FakeEncoder) -> None:
    """A client that rounds its vectors on the way would rank differently from the server's own encoding."""
    by_text = client.search(text="red wine", top_k=5)
    by_vector = client.search(vector=encoder.texts_vectors(["red wine"])[0], top_k=5)
    assert by_text.hits == by_vector.hits
    assert [hit.rank for hit in by_text.hits] == [1, 2, 3, 4, 5]
    assert by_text.index_version == "0000000001-cafe"
    assert by_text.query_encoder == CARD.fingerprint
    assert by_text.timings.total_ns > 0


def test_scores_are_the_float32_of_the_offline_ranking(
    client: RetrievalClient, encoder: FakeEncoder, searcher: FakeSearcher
) -> None:
    """A score that changes on the wire breaks ties differently offline and online."""
    (expected,) = searcher.search(encoder.texts_vectors(["a"]), 9)
    hits = client.search("a", top_k=9).hits
    assert np.array_equal(np.array([hit.score for hit in hits], dtype=np.float32), expected.scores)
    assert tuple(hit.doc_id for hit in hits) == expected.doc_ids


def test_batches_of_texts_and_of_vectors_equal_single_searches(client: RetrievalClient, encoder: FakeEncoder) -> None:
    """Results in another order than the queries would be credited to the wrong query."""
    texts = ["a", "b b", "c"]
    singles = [client.search(text, top_k=4).hits for text in texts]
    assert [result.hits for result in client.batch_search(texts, 4)] == singles
    by_vectors = client.batch_search(vectors=encoder.texts_vectors(texts), top_k=4)
    assert [result.hits for result in by_vectors] == singles


def test_embed_returns_the_encoders_vectors_to_the_bit(client: RetrievalClient, encoder: FakeEncoder) -> None:
    """Vectors that are only nearly right cannot be compared with those of an index."""
    vectors = client.embed(["a", "b"])
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, encoder.texts_vectors(["a", "b"]))


def test_server_and_index_information(client: RetrievalClient) -> None:
    """Evaluation records both next to its figures."""
    assert client.server_info().limits == Limits()
    assert client.server_info().query_encoder.fingerprint == CARD.fingerprint
    index = client.index()
    assert (index.kind, index.document_count, index.dimension) == ("exact", 40, DIMENSION)
    assert index.document_encoder.space_fingerprint == CARD.space_fingerprint


def test_one_client_serves_many_threads(client: RetrievalClient, encoder: FakeEncoder, searcher: FakeSearcher) -> None:
    """Benchmarks share one client between threads."""
    texts = [f"text {i}" for i in range(40)]
    with ThreadPoolExecutor(16) as callers:
        results = list(callers.map(client.search, texts))
    for result, ranking in zip(results, searcher.search(encoder.texts_vectors(texts), 10), strict=True):
        assert tuple(hit.doc_id for hit in result.hits) == ranking.doc_ids


def test_a_query_of_a_stream_that_fails_is_told_in_its_place(client: RetrievalClient, server: Running) -> None:
    """Fault: a blank line. Without it a file of a million queries would end there, wherever that is."""
    texts = ["a", " ", "b", "x" * 40_000, "c"]

    async def asynchronous() -> list[SearchResult | ServeError]:
        async with AsyncRetrievalClient(server.target) as own:
            return [outcome async for outcome in own.search_stream(texts)]

    for found in (list(client.search_stream(texts)), asyncio.run(asynchronous())):
        assert [str(one) for one in found if isinstance(one, ServeError)] == [
            f"search_stream at {server.target}: query 1: text: is blank; give at least one word",
            f"search_stream at {server.target}: query 3: text: has 40000 bytes; the limit is 32768",
        ]
        hits = [one.hits for one in found if isinstance(one, SearchResult)]
        assert hits == [client.search(text).hits for text in "abc"]
        assert [type(one) for one in found[1:4]] == [ServeError, SearchResult, ServeError]


def broken_texts() -> Iterator[str]:
    yield "a"
    raise OSError("the disk went away")


@pytest.mark.parametrize(
    ("texts", "error", "match"),
    [
        (broken_texts, OSError, "the disk went away"),
        (lambda: iter(["a", "half \ud800", "b"]), ServeError, "search: 'half .*' is not valid Unicode"),
    ],
)
def test_what_the_texts_of_a_stream_raise_comes_after_the_answers(
    server: Running, texts: Callable[[], Iterator[str]], error: type[Exception], match: str
) -> None:
    """Without it a file with one broken line would end in gRPC's own words, and lose what was already answered."""
    answered = []

    def sync() -> None:
        with RetrievalClient(server.target) as client:
            answered.extend(client.search_stream(texts()))

    async def asynchronous() -> None:
        async with AsyncRetrievalClient(server.target) as client:
            async for outcome in client.search_stream(texts()):
                answered.append(outcome)  # noqa: PERF401  a comprehension that fails keeps nothing

    async def as_they_come() -> AsyncIterator[str]:
        for text in texts():
            await asyncio.sleep(0)
            yield text

    async def wholly_asynchronous() -> None:
        async with AsyncRetrievalClient(server.target) as client:
            async for outcome in client.search_stream(as_they_come()):
                answered.append(outcome)  # noqa: PERF401  a comprehension that fails keeps nothing

    for run in (sync, lambda: asyncio.run(asynchronous()), lambda: asyncio.run(wholly_asynchronous())):
        answered.clear()
        with pytest.raises(error, match=match):
            run()
        assert [type(one) for one in answered] == [SearchResult]


def test_texts_that_are_waited_for_hold_up_no_other_call(client: RetrievalClient, server: Running) -> None:
    """Without it a stream of what users type now would stop the whole event loop until the next of them types."""

    async def main() -> None:
        typed: asyncio.Queue[str] = asyncio.Queue()

        async def texts() -> AsyncIterator[str]:
            while text := await typed.get():
                yield text

        async with AsyncRetrievalClient(server.target) as own:
            stream = own.search_stream(texts(), 4)
            for text in ("a", "b b"):
                outcome = asyncio.ensure_future(anext(stream))
                assert (await own.search(text, top_k=4)).hits == client.search(text, top_k=4).hits
                assert not outcome.done()
                typed.put_nowait(text)
                assert (await outcome).hits == client.search(text, top_k=4).hits
            typed.put_nowait("")
            assert [outcome async for outcome in stream] == []

    asyncio.run(main())


def test_a_text_of_a_stream_that_cannot_be_encoded_is_named(client: RetrievalClient, server: Running) -> None:
    """Without it an array would have fewer rows than there are texts, or the one bad text of many not be found."""
    texts = ["a"] * 40 + [" "] + ["b"] * 30
    match = r"embed_stream at .*: of the 32 texts from number 32: texts\[8\]: is blank"
    with pytest.raises(ServeError, match=match):
        client.embed_stream(texts)

    async def asynchronous() -> None:
        async with AsyncRetrievalClient(server.target) as own:
            await own.embed_stream(texts)

    with pytest.raises(ServeError, match=match):
        asyncio.run(asynchronous())


def negated(levels: int) -> dict[str, Any]:
    """Return a filter that many levels above its comparison."""
    wanted: dict[str, Any] = {"eq": {"number": 1}}
    for _ in range(levels):
        wanted = {"not": wanted}
    return wanted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.search(" "), "search at .*: text: is blank; give at least one word"),
        (lambda c: c.search("a", top_k=0), "top_k: is 0; give 1 to 1000"),
        (lambda c: c.search("a", top_k=-1), "top_k: is -1; give 1 or more"),
        (lambda c: c.search(vector=[1.0, 2.0]), "vector.f32_le: has 8 bytes; 16 32-bit floats take 64"),
        (lambda c: c.search(), "give either a text or a vector"),
        (lambda c: c.search("a", [1.0]), "give either a text or a vector"),
        (lambda c: c.search(vector=[[1.0]]), r"search: a vector of shape \(1, 1\); give one of shape \(d,\)"),
        (lambda c: c.batch_search([]), "queries: has 0 entries; give 1 to 256"),
        (lambda c: c.batch_search(), "give either texts or vectors"),
        (lambda c: c.batch_search(vectors=[1.0, 2.0]), r"vectors of shape \(2,\); give \(n, d\)"),
        (lambda c: c.batch_search(vectors=[[1.0], [1.0, 2.0]]), "batch_search: the vector is not an array of numbers"),
        (lambda c: c.search(vector=["a"]), "search: the vector is not an array of numbers"),
        (lambda c: c.batch_search("abc"), "batch_search: give a list of texts, not one text"),
        (lambda c: c.embed("abc"), "embed: give a list of texts, not one text"),
        (lambda c: c.embed_stream([]), "embed_stream: texts has 0 entries; give at least 1"),
        (lambda c: c.embed_stream("abc"), "embed_stream: give a list of texts, not one text"),
        (lambda c: list(c.search_stream(["a"], top_k=-1)), "top_k: is -1; give 1 or more"),
        (lambda c: list(c.search_stream("abc")), "search_stream: give a list of texts, not one text"),
        (lambda c: c.search("a", top_k=2**32), r"top_k: is 4294967296; give less than 2\^32"),
        (lambda c: c.search("a", options=Options(ef_search=-1)), "ef_search: is -1; give 1 or more"),
        (lambda c: c.search("a", options=Options(rerank_depth=-1)), "rerank_depth: is -1; give 1 or more"),
        (lambda c: c.embed([""]), r"texts\[0\]: is blank"),
        (lambda c: c.embed(["a" * 20_000] * 900), "larger than max"),
        (lambda c: c.search("a\ud800"), r"search: 'a\\ud800' is not valid Unicode"),
        (lambda c: c.search_sets([["\udcff"]]), r"search_sets: '\\udcff' is not valid Unicode"),
        (lambda c: c.batch_search(["a", "\udcff"]), r"batch_search: '\\udcff' is not valid Unicode"),
        (lambda c: c.search("a", options=Options(fields=["\udcff"])), r"search: '\\udcff' is not valid Unicode"),
        (lambda c: c.embed_stream(["a", "\udcff"]), r"embed_stream: '\\udcff' is not valid Unicode"),
        (lambda c: c.rerank("a", {"d": "\udcff"}), r"rerank: '\\udcff' is not valid Unicode"),
        (lambda c: c.delete(["\udcff"]), r"delete: '\\udcff' is not valid Unicode"),
        (lambda c: c.search("a", options=Options({"eq": {"a": "\ud800"}})), r"filter: '\\ud800' is not valid Unicode"),
        (lambda c: c.search("a", options=Options({"eq": {"\ud800": 1}})), r"filter: '\\ud800' is not valid Unicode"),
        (lambda c: c.search("a", options=Options({"eq": {"a": 10**5000}})), "filter: an integer is beyond all numbers"),
        (lambda c: c.search("a", options=Options({"eq": {"a": {"b": 10**5000}}})), "filter: .* is neither text"),
        (lambda c: c.search("a", options=Options({"and": 3})), "filter: {'and': 3} is none of eq, in"),
        (lambda c: c.search("a", options=Options(negated(32))), "filter: more than 32 levels deep; flatten it"),
        (lambda c: c.search("a", options=Options(negated(3000))), "filter: more than 32 levels deep; flatten it"),
        (lambda c: c.search("a", options=Options({"eq": negated(3000)})), "filter: .* is neither text"),
    ],
)
def test_a_wrong_call_is_one_line_that_says_what_to_do(
    client: RetrievalClient, call: Callable[[RetrievalClient], object], message: str
) -> None:
    """A traceback from inside gRPC tells the caller neither the field nor the limit."""
    with pytest.raises(ServeError, match=message) as wrong:
        call(client)
    assert "\n" not in str(wrong.value)
    assert len(client.search("still fine").hits) == 10


@pytest.mark.parametrize("key", ["and", "not"])
def test_a_filter_as_deep_as_servers_take_is_sent(key: str) -> None:
    """Without it the bound against endless nesting could refuse what a server answers, or pass what cannot be read."""
    wanted: dict[str, Any] = {"eq": {"number": 1}}
    for _ in range(Limits().max_filter_depth - 1):
        wanted = {key: [wanted] if key == "and" else wanted}
    sent = search_request("a", None, 10, Options(wanted))
    assert type(sent).FromString(sent.SerializeToString()) == sent


def test_nothing_listening_is_said_plainly() -> None:
    """Most first calls fail because the server is not up."""
    target = f"127.0.0.1:{free_port()}"
    with RetrievalClient(target, timeout=1) as client:
        with pytest.raises(ServeError, match=f"search at {target}: nothing answers there .* start the server"):
            client.search("a")
        with pytest.raises(ServeError, match=f"{target}: no health answer .* waited 0.3 s"):
            client.wait_until_ready(0.3)


@pytest.mark.parametrize("target", ["", "127.0.0.1:1\n", "\udcff:1"])
def test_what_is_no_address_is_said_before_anything_is_sent(target: str) -> None:
    """Without it an empty variable in place of an address is reported as a failure inside gRPC, or by a traceback."""
    with pytest.raises(ServeError, match=r"is no server's address; give HOST:PORT"):
        RetrievalClient(target)


def test_a_slow_server_is_an_expired_deadline(client: RetrievalClient, encoder: FakeEncoder, server: Running) -> None:
    """A hang without a message is the worst report a user can make."""
    encoder.gate.clear()
    with (
        RetrievalClient(server.target, timeout=0.3) as hasty,
        pytest.raises(ServeError, match=r"no answer within 0.3 s|time ran out"),
    ):
        hasty.search("a")


class Wire:
    """Passes bytes between a client and a server until it is cut, and then swallows them as a broken network does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._cut = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Pass nothing on any more, and tell nobody."""
        self._cut.set()

    def close(self) -> None:
        """Let go of the sockets."""
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._cut.is_set():
                    sink.sendall(data)


@pytest.fixture
def wire(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """A wire to the server, for clients that ping ten times as often as they would."""
    hasty = [(name, value // 10 if name.endswith("_ms") else value) for name, value in client_module._KEEPALIVE_OPTIONS]
    monkeypatch.setattr(client_module, "_KEEPALIVE_OPTIONS", hasty)
    wire = Wire(server.port)
    yield wire
    wire.close()


def two_texts(wait: threading.Event) -> Iterator[str]:
    yield "a"
    assert wait.wait(30)
    yield "b"


def test_a_stream_over_a_dead_connection_fails(wire: Wire) -> None:
    """Fault: a network that swallows everything. Without it a stream, which has no deadline, waits for ever."""
    with RetrievalClient(wire.target) as client:
        wait = threading.Event()
        results = client.search_stream(two_texts(wait))
        assert len(next(results).hits) == 10
        wire.cut()
        began = time.monotonic()
        with pytest.raises(ServeError, match=r"search_stream at .*: nothing answers there"):
            next(results)
        assert time.monotonic() - began < 20
        wait.set()


def test_an_async_stream_over_a_dead_connection_fails(wire: Wire) -> None:
    """Fault: as above. Without it a task of an asyncio service would be lost for good with every such outage."""

    async def main() -> None:
        async with AsyncRetrievalClient(wire.target) as client:
            assert len(await client.embed_stream(["a"] * 33)) == 33
            wire.cut()
            with pytest.raises(ServeError, match=r"embed_stream at .*: nothing answers there"):
                await asyncio.wait_for(client.embed_stream(["a"]), 20)

    asyncio.run(main())


def test_overload_says_when_to_retry(start: Start, encoder: FakeEncoder) -> None:
    """Clients that retry at once keep the server overloaded."""
    running = start(encoder, limits=Limits(max_concurrent_requests=1))
    with RetrievalClient(running.target, retries=0) as client, ThreadPoolExecutor(1) as other:
        encoder.gate.clear()
        encoder.busy.clear()
        stuck = other.submit(client.search, "a")
        assert encoder.busy.wait(10)
        with pytest.raises(ServeError, match=r"1 requests are being answered; try again later \(retry after 100 ms\)"):
            client.search("b")
        encoder.gate.set()
        stuck.result(10)


def test_waiting_ends_when_the_index_is_loaded_and_not_before(loop: asyncio.AbstractEventLoop) -> None:
    """A script that starts the server and then asks must not race its loading."""
    port, may_load, stop, limits = free_port(), threading.Event(), asyncio.Event(), Limits()

    def load() -> Engine:
        assert may_load.wait(20)
        return Engine(FakeEncoder(), FakeSource(FakeSearcher()), limits, 1)

    config = ServeConfig(Path("store"), Path("encoder"), port=port)
    done = asyncio.run_coroutine_threadsafe(serve(load, stop, config), loop)
    try:
        with RetrievalClient(f"127.0.0.1:{port}") as client:
            with pytest.raises(ServeError, match=r"loading or stopping; ask again later; waited 0.5 s"):
                client.wait_until_ready(0.5)
            may_load.set()
            client.wait_until_ready(20)
            assert client.index().document_count == 40
    finally:
        may_load.set()
        loop.call_soon_threadsafe(stop.set)
        done.result(20)


def test_importing_the_client_loads_no_model_and_no_index_library() -> None:
    """A client in a web application must not cost a hundred megabytes."""
    heavy = ("onnxruntime", "faiss", "tokenizers", "torch", "transformers")
    code = f"import sys, serve.client; sys.exit(str([name for name in {heavy} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_a_closed_client_says_so(server: Running) -> None:
    """Every failure is a ServeError; gRPC's own would pass by whoever handles those."""
    client = RetrievalClient(server.target)
    client.close()
    with pytest.raises(ServeError, match=r"search: .*closed.* Make a new client"):
        client.search("a")
    with pytest.raises(ServeError, match=r"search_stream: .*closed"):
        list(client.search_stream(["a"]))

    async def asynchronous() -> None:
        closed = AsyncRetrievalClient(server.target)
        await closed.close()
        with pytest.raises(ServeError, match=r"search: .*closed.* Make a new client"):
            await closed.search("a")
        with pytest.raises(ServeError, match=r"search_stream: .*closed"):
            _ = [answer async for answer in closed.search_stream(["a"])]

    asyncio.run(asynchronous())
