"""Another index version takes the served one's place: no request fails, none mixes two, a bad one changes nothing."""

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from serve_fakes import (
    CARD,
    DIMENSION,
    STRANGER,
    FakeEncoder,
    FakeReranker,
    FakeSearcher,
    FakeSource,
    Running,
    Start,
    real_store,
)

from index.search import Searcher
from index.store import IndexStore
from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from retrieval_kd.errors import ArtifactError, ServeError
from retrieval_kd.runs import Ranking
from serve import indexes, service
from serve.client import AsyncRetrievalClient, Document, Options, RetrievalClient
from serve.indexes import IndexHandle, IndexHost, StoreSource
from serve.metrics import Metrics

FIRST, SECOND, THIRD = "0000000001-cafe", "0000000002-beef", "0000000003-f00d"
TOKEN = "0123456789abcdef-admin"


def versions() -> list[FakeSearcher]:
    return [FakeSearcher(version=version, id_format=f"{version}/{{}}") for version in (FIRST, SECOND, THIRD)]


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(*versions())


@pytest.fixture
def admin(start: Start, source: FakeSource, tmp_path: Path) -> RetrievalClient:
    """A client with the admin role, at a server that looks at its store every 20 ms."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    running = start(searcher=source, tokens=tmp_path / "tokens", poll_seconds=0.02)
    with RetrievalClient(running.target, token=TOKEN) as client:
        client.running = running
        yield client


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_a_pointer_moved_by_another_process_is_followed(admin: RetrievalClient, source: FakeSource) -> None:
    """Without it a new index would be served only after a restart, with an outage every night."""
    assert admin.search("a").index_version == FIRST
    source.pointer = SECOND
    until(lambda: admin.search("a").index_version == SECOND)
    assert source.searchers[FIRST].closed == 1
    assert all(hit.doc_id.startswith(SECOND) for hit in admin.search("a").hits)


def test_publish_and_rollback_move_pointer_and_server_together(admin: RetrievalClient, source: FakeSource) -> None:
    """Without it a restart would bring back the version that an administrator has just replaced."""
    assert admin.publish(THIRD) == FIRST
    assert (source.pointer, admin.index().index_version) == (THIRD, THIRD)
    assert admin.rollback() == SECOND
    assert (source.pointer, admin.index().index_version) == (SECOND, SECOND)
    assert admin.rollback() == FIRST
    with pytest.raises(ServeError, match=f"no version is older than {FIRST}"):
        admin.rollback()
    assert [one.index_version for one in admin.indexes() if one.serving] == [FIRST]
    assert [one.index_version for one in admin.indexes()] == [FIRST, SECOND, THIRD]


def failing(searcher: FakeSearcher, how: str) -> None:
    if how == "damaged":
        searcher.broken = ArtifactError("vectors.npy: bytes differ from the manifest's sha256")
    elif how == "self-test":
        searcher.broken = ArtifactError("self-test failed, 3 of 640 expected documents found")
    elif how == "crash":
        searcher.broken = RuntimeError("faiss went away")
    else:
        searcher.card = STRANGER


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("damaged", "vectors.npy: bytes differ"),
        ("self-test", "self-test failed"),
        ("crash", "faiss went away"),
        ("encoder", "cannot search documents encoded by"),
    ],
)
def test_whatever_is_wrong_with_a_version_the_old_one_stays_and_the_caller_learns_why(
    admin: RetrievalClient, source: FakeSource, how: str, says: str
) -> None:
    """Without it one bad build would take the service down, or fill its answers with nonsense."""
    failing(source.searchers[SECOND], how)
    with pytest.raises(ServeError, match=says):
        admin.publish(SECOND)
    assert source.pointer == FIRST
    assert source.searchers[SECOND].closed == 1, "an opened version that is not used must be let go"
    assert admin.search("a").index_version == FIRST
    metrics = admin.running.metrics.registry
    assert metrics.get_sample_value("rkd_index_loads_total", {"outcome": "failed"}) == 1


def test_a_bad_version_found_by_polling_is_tried_once_and_again_when_asked(
    admin: RetrievalClient, source: FakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it a damaged build of ten gigabytes would be read and hashed every other second, for ever."""
    failing(source.searchers[SECOND], "damaged")
    source.pointer = SECOND
    until(lambda: SECOND in source.opened)
    time.sleep(0.2)
    assert source.opened.count(SECOND) == 1
    assert "vectors.npy" in caplog.text
    source.searchers[SECOND].broken = None
    admin.running.reload()
    until(lambda: admin.index().index_version == SECOND)
    assert source.opened.count(SECOND) == 2


@pytest.mark.parametrize(
    ("where", "lack"),
    [
        ("current", OSError(errno.EMFILE, "Too many open files")),
        ("open", OSError(errno.EMFILE, "Too many open files")),
        ("open", MemoryError("no memory")),
        ("current", RuntimeError("can't start new thread")),
    ],
)
def test_the_store_is_followed_on_after_an_error_of_the_machine(
    admin: RetrievalClient, source: FakeSource, where: str, lack: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it one moment without a free file descriptor would end all following, in silence, until a restart."""
    sound = getattr(source, where)
    failures = [lack]

    def failing_once(*arguments: object) -> object:
        if failures:
            raise failures.pop()
        return sound(*arguments)

    setattr(source, where, failing_once)
    source.pointer = SECOND
    until(lambda: admin.search("a").index_version == SECOND)
    said = [record.getMessage() for record in caplog.records if str(lack) in record.getMessage()]
    assert any("the index that is served stays" in line for line in said)
    assert not any("\n" in line for line in said)


def test_a_store_that_cannot_be_written_keeps_both_pointer_and_version(
    admin: RetrievalClient, source: FakeSource
) -> None:
    """Without it server and store would disagree until the next restart decides."""
    source.read_only = True
    with pytest.raises(ServeError, match="Read-only file system"):
        admin.publish(SECOND)
    assert admin.index().index_version == FIRST
    assert source.searchers[SECOND].closed == 1


def test_an_unknown_version_is_refused_by_name(admin: RetrievalClient) -> None:
    """Without it a typo would end as an internal error."""
    with pytest.raises(ServeError, match=f"no index version 'nonsense'; there are {FIRST}, {SECOND}, {THIRD}"):
        admin.publish("nonsense")


def test_a_search_that_began_on_the_old_version_ends_on_it_and_then_it_is_closed(
    admin: RetrievalClient, source: FakeSource
) -> None:
    """Without it the old version's files would be unmapped under a running search: a crash, not an error."""
    old = source.searchers[FIRST]
    old.gate.clear()
    with ThreadPoolExecutor(1) as caller:
        slow = caller.submit(admin.search, "a")
        until(lambda: old.threads or not old.gate.is_set())
        time.sleep(0.1)
        admin.publish(SECOND)
        assert old.closed == 0
        assert admin.search("a").index_version == SECOND
        old.gate.set()
        result = slow.result(10)
    assert result.index_version == FIRST
    assert all(hit.doc_id.startswith(FIRST) for hit in result.hits)
    until(lambda: old.closed == 1)


def test_a_caller_who_leaves_does_not_unmap_what_their_search_still_reads(start: Start, source: FakeSource) -> None:
    """Without it a cancelled call would release the version while a thread is in it."""
    running = start(searcher=source, poll_seconds=0.02)
    old = source.searchers[FIRST]
    with RetrievalClient(running.target, timeout=0.3) as hasty, RetrievalClient(running.target) as client:
        old.gate.clear()
        with pytest.raises(ServeError, match=r"no answer within|time ran out"):
            hasty.search("a")
        source.pointer = SECOND
        until(lambda: client.index().index_version == SECOND)
        assert client.search("a").index_version == SECOND
        assert old.closed == 0
        old.gate.set()
        until(lambda: old.closed == 1)


@pytest.mark.parametrize("fails", [False, True])
def test_a_write_cancelled_twice_is_let_go_of_when_it_is_done(source: FakeSource, fails: bool) -> None:
    """A caller who leaves a server that stops cancels twice: another version would come, or unmap it, in mid-write."""
    begun, go_on = threading.Event(), threading.Event()

    def work(_: object) -> None:
        begun.set()
        assert go_on.wait(20)
        if fails:
            raise ArtifactError("disk full")

    async def main() -> None:
        host = IndexHost(source, CARD, Metrics())
        await host.follow()
        write = asyncio.create_task(host.write(work))
        await asyncio.to_thread(begun.wait, 20)
        source.pointer = SECOND
        for _ in range(3):
            write.cancel()
            await asyncio.sleep(0.01)
        follow = asyncio.create_task(host.follow())
        await asyncio.sleep(0.05)
        assert not write.done()
        assert not follow.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await write
        assert await follow == SECOND
        host.close()

    asyncio.run(main())


def test_a_write_keeps_its_version_open_when_the_loop_ends(source: FakeSource) -> None:
    """A process that ends in mid-write would unmap the files that its thread still reads."""
    begun, closed_at_the_end = threading.Event(), []
    searcher = source.searchers[FIRST]

    def work(_: object) -> None:
        begun.set()
        time.sleep(0.3)
        closed_at_the_end.append(searcher.closed)

    async def main() -> None:
        host = IndexHost(source, CARD, Metrics())
        await host.follow()
        kept.append(asyncio.ensure_future(host.write(work)))
        await asyncio.to_thread(begun.wait, 20)
        host.close()

    kept: list[asyncio.Future[object]] = []
    asyncio.run(main())
    assert closed_at_the_end == [0]
    assert searcher.closed == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_publish_whose_caller_leaves_undoes_no_later_one(
    source: FakeSource, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Without it the pointer moves when nobody waits for it any more, after another publish has been acknowledged."""
    begun, go_on, select = threading.Event(), threading.Event(), source.select

    def slowly(version: str) -> None:
        if version == SECOND:
            begun.set()
            assert go_on.wait(20)
            if fails:
                raise ArtifactError("disk full")
        select(version)

    monkeypatch.setattr(source, "select", slowly)

    async def main() -> None:
        host = IndexHost(source, CARD, Metrics())
        await host.follow()
        first = asyncio.create_task(host.publish(SECOND))
        await asyncio.to_thread(begun.wait, 20)
        first.cancel()
        second = asyncio.create_task(host.publish(THIRD))
        await asyncio.sleep(0.05)
        assert not first.done()
        assert not second.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert host.searcher.version == (FIRST if fails else SECOND)
        assert await second == (THIRD, FIRST if fails else SECOND)
        assert source.pointer == THIRD
        assert await host.follow() == THIRD
        host.close()
        assert [one.closed for one in source.searchers.values()] == [1, 1, 1]

    asyncio.run(main())


def test_publishing_under_load_fails_no_call_and_mixes_no_versions(
    admin: RetrievalClient, source: FakeSource, encoder: FakeEncoder
) -> None:
    """Fault: publish and rollback under open-loop load. Without it every deployment could cost some answers."""
    texts = [f"text {i}" for i in range(7)]
    vectors = encoder.texts_vectors(texts)
    for searcher in versions():
        for text, ranking in zip(texts, searcher.search(vectors, 5), strict=True):
            EXPECTED[text, searcher.version] = list(ranking.doc_ids)
    stop = threading.Event()
    seen: list[str] = []
    failures: list[Exception] = []

    def call(number: int) -> None:
        text = texts[number % len(texts)]
        try:
            results = [admin.search(text, top_k=5)] if number % 3 else admin.batch_search([text] * 3, 5)
            for result in results:
                assert [hit.doc_id for hit in result.hits] == EXPECTED[text, result.index_version]
            assert len({result.index_version for result in results}) == 1
            seen.append(results[0].index_version)
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    def load() -> None:
        with ThreadPoolExecutor(16) as callers:
            number, due = 0, time.monotonic()
            while not stop.is_set():
                callers.submit(call, number)
                number, due = number + 1, due + 0.01
                time.sleep(max(0.005, due - time.monotonic()))
            callers.shutdown(cancel_futures=True)

    def answered_by(version: str) -> None:
        before = len(seen)
        until(lambda: version in seen[before:] or failures)

    loader = threading.Thread(target=load)
    loader.start()
    for version in (SECOND, THIRD, FIRST) * 4:
        admin.publish(version)
        answered_by(version)
        if version == THIRD:
            answered_by(admin.rollback())
    stop.set()
    loader.join()
    assert failures == []
    assert set(seen) == {FIRST, SECOND, THIRD}


EXPECTED: dict[tuple[str, str], list[str]] = {}


class WatchedSearcher(FakeSearcher):
    """Remembers which threads counted its documents: a real one reads files for it, and may wait for a lock."""

    counting: ClassVar[set[str]] = set()

    @property
    def count(self) -> int:
        """Count."""
        self.counting.add(threading.current_thread().name)
        return len(self.ids)


def test_the_loop_neither_counts_documents_nor_builds_replies(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it every caller and the health check wait while one reply of a second is built, or a file is read."""
    building = set()
    build = service._ranked_hits

    def watched(ranking: Ranking) -> list[pb.Hit]:
        building.add(threading.current_thread().name)
        return build(ranking)

    monkeypatch.setattr(service, "_ranked_hits", watched)
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    source = FakeSource(*(WatchedSearcher(version=version) for version in (FIRST, SECOND)))
    running = start(searcher=source, tokens=tmp_path / "tokens", reranker=FakeReranker())
    with RetrievalClient(running.target, token=TOKEN) as admin:
        admin.search("a")
        admin.batch_search(["a", "b"])
        admin.search("a", options=Options(rerank_depth=20))
        assert admin.index().document_count == 40
        admin.upsert([Document("new", vector=np.ones(DIMENSION))])
        admin.publish(SECOND)
    assert WatchedSearcher.counting
    assert "loop" not in WatchedSearcher.counting
    assert {name.split("_")[0] for name in building} == {"search"}


def test_a_handle_closes_once_when_its_last_user_lets_go() -> None:
    """Without it a version would be closed under a user, or never."""
    searcher = FakeSearcher()
    handle = IndexHandle(searcher)
    handle.acquire()
    handle.release()
    assert searcher.closed == 0
    handle.release()
    assert searcher.closed == 1


def test_documents_are_added_and_removed_at_once(admin: RetrievalClient, source: FakeSource) -> None:
    """Without it a caller who was told "done" could still not find the document."""
    vector = np.full(DIMENSION, 9.0)
    write = admin.upsert([Document("new", vector=vector, fields={"number": 99}), Document("worded", text="red wine")])
    assert (write.index_version, write.document_count) == (FIRST, 42)
    (hit,) = admin.search(vector=vector, top_k=1, options=Options(fields=["number"])).hits
    assert (hit.doc_id, hit.fields) == ("new", {"number": 99})
    scores = {hit.doc_id: hit.score for hit in admin.search("red wine", top_k=42).hits}
    assert scores["worded"] == pytest.approx(1.0)
    assert source.searchers[FIRST].stored[-1] == {"text": "red wine"}
    assert admin.delete(["new", "nobody"]).document_count == 41
    assert admin.search(vector=vector, top_k=1).hits[0].doc_id != "new"
    with pytest.raises(ServeError, match=r"documents: field 'number' holds int"):
        admin.upsert([Document("unwritable", vector=vector)])
    with pytest.raises(ServeError, match=r"documents\[1\].doc_id: occurs twice"):
        admin.upsert([Document("a", vector=vector), Document("a", vector=vector)])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_cannot_write_is_refused_with_its_place(admin: RetrievalClient, number: float) -> None:
    """Without it the caller is told of an internal error and sends the same document again, for ever."""
    vector = np.ones(DIMENSION)
    sound = Document("sound", vector=vector, fields={"number": 1})
    for fields, place in (({"number": number}, "number"), ({"a": {"b": [1.0, number]}}, r"a\.b\[1\]")):
        with pytest.raises(ServeError, match=rf"documents\[1\]\.fields\.{place}: is NaN or infinity; give a finite"):
            admin.upsert([sound, Document("new", vector=vector, fields=fields)])
    assert admin.index().document_count == 40


@pytest.mark.parametrize("error", [pa.ArrowInvalid("Integer value 9 not in range"), OverflowError("int too large")])
def test_values_that_the_index_cannot_take_are_the_requests_fault(
    admin: RetrievalClient, source: FakeSource, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Without it a filter or a field beyond some library's range is an internal error, which hides its cause."""

    def fail(*arguments: object, **options: object) -> None:
        raise error

    searcher = source.searchers[FIRST]
    monkeypatch.setattr(searcher, "upsert", fail)
    with pytest.raises(ServeError, match=f"documents: {error}"):
        admin.upsert([Document("new", vector=np.ones(DIMENSION))])
    monkeypatch.setattr(searcher, "search", fail)
    with pytest.raises(ServeError, match=rf"options\.filter: {error}"):
        admin.search("a", options=Options(filter={"eq": {"number": 3}}))
    with pytest.raises(ServeError, match="internal error"):
        admin.search("a")


def test_the_async_client_administers_as_the_other_does(admin: RetrievalClient) -> None:
    """Without it an asyncio service would need a thread and a second client to publish what it has built."""

    async def main() -> None:
        async with AsyncRetrievalClient(admin.running.target, token=TOKEN) as own:
            await own.wait_until_ready(5)
            write = await own.upsert([Document("new", vector=np.full(DIMENSION, 9.0))])
            assert (write.index_version, write.document_count) == (FIRST, 41)
            assert (await own.delete(["new"])).document_count == 40
            assert await own.publish(SECOND) == FIRST
            assert [one.index_version for one in await own.indexes() if one.serving] == [SECOND]
            assert await own.rollback() == FIRST
            with pytest.raises(ServeError, match="no index version 'nonsense'"):
                await own.publish("nonsense")

    asyncio.run(main())


def test_the_version_stays_in_place_while_documents_are_written(
    start: Start, source: FakeSource, tmp_path: Path
) -> None:
    """Without it an acknowledged document could land in a version that nobody searches any more."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    running: Running = start(searcher=source, tokens=tmp_path / "tokens", poll_seconds=0.02)
    first, gate, writing = source.searchers[FIRST], threading.Event(), threading.Event()
    upsert = first.upsert

    def slowly(*arguments: object) -> None:
        writing.set()
        assert gate.wait(10)
        upsert(*arguments)

    first.upsert = slowly
    with RetrievalClient(running.target, token=TOKEN) as client, ThreadPoolExecutor(1) as other:
        call = other.submit(client.upsert, [Document("new", vector=np.ones(DIMENSION))])
        assert writing.wait(10)
        source.pointer = SECOND
        time.sleep(0.2)
        assert client.index().index_version == FIRST
        gate.set()
        assert call.result(10).index_version == FIRST
        until(lambda: client.index().index_version == SECOND)


def test_a_real_store_takes_changes_that_other_servers_see_at_once(start: Start, tmp_path: Path) -> None:
    """Without it the workers of one port would answer differently after an upload."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    real_store(tmp_path / "store", 30)
    servers = [start(searcher=StoreSource(tmp_path / "store"), tokens=tmp_path / "tokens") for _ in range(2)]
    with RetrievalClient(servers[0].target, token=TOKEN) as one, RetrievalClient(servers[1].target, token=TOKEN) as two:
        assert two.search("text 7", top_k=1).hits[0].doc_id == "doc-7"
        write = one.upsert([Document("new", text="brand new words", fields={"number": 77})])
        assert write.document_count == 31
        hit = two.search("brand new words", top_k=1, options=Options(fields=["text", "number"])).hits[0]
        assert (hit.doc_id, hit.fields) == ("new", {"text": "brand new words", "number": 77})
        assert two.delete(["new", "doc-7"]).document_count == 29
        assert "doc-7" not in {hit.doc_id for hit in one.search("text 7", top_k=30).hits}
        only = Options(filter={"range": {"number": {"ge": 3, "lt": 6}}}, fields=["number"])
        assert {hit.fields["number"] for hit in one.search("text 4", options=only).hits} == {3, 4, 5}
        with pytest.raises(ServeError, match=r"documents: .*colour"):
            one.upsert([Document("x", text="a", fields={"colour": "red"})])


@pytest.mark.parametrize("how", ["alone", "filtered", "batch", "reranked"])
def test_a_hit_has_the_fields_it_was_found_by(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """An upsert between ranking and fields gave hits that their own filter does not match."""
    running = start(searcher=real_store(tmp_path / "store", 30), reranker=FakeReranker())
    build = service._ranked_hits

    def changed_meanwhile(ranking: Ranking) -> list[pb.Hit]:
        with Searcher.open(tmp_path / "store") as writer:
            vector = FakeEncoder().texts_vectors(["text 3"])
            writer.upsert(["doc-3"], vector, [{"title": "t", "text": "x", "number": 1}])
        return build(ranking)

    monkeypatch.setattr(service, "_ranked_hits", changed_meanwhile)
    options = Options(fields=["number"], filter={"eq": {"number": 3}} if how == "filtered" else None)
    if how == "reranked":
        options = Options(fields=["number"], rerank_depth=30)
    with RetrievalClient(running.target) as client:
        if how == "batch":
            hits = client.batch_search(["text 3", "text 4"], options=options)[0].hits
        else:
            hits = client.search("text 3", top_k=30, options=options).hits
    assert [hit.fields for hit in hits if hit.doc_id == "doc-3"] == [{"number": 3}]


def test_a_change_between_a_publish_and_the_next_look_at_the_pointer_is_sent_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nightly publish from the command line made every upsert of two seconds fail, with nothing a caller could do."""
    monkeypatch.setattr(indexes, "_MOVED_SECONDS", 0.3)
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    running = start(searcher=real_store(tmp_path / "store", 30), tokens=tmp_path / "tokens", poll_seconds=60)
    new = [Document("new", vector=np.full(DIMENSION, DIMENSION**-0.5))]
    with RetrievalClient(running.target, token=TOKEN, retries=0) as hasty:
        first = hasty.index().index_version
        real_store(tmp_path / "store", 40)
        second = IndexStore(tmp_path / "store").current().name
        with pytest.raises(ServeError, match=f"{second} has just become current.*instead of {first}; nothing was writ"):
            hasty.upsert(new)
    with RetrievalClient(running.target, token=TOKEN, timeout=30) as patient, ThreadPoolExecutor(1) as other:
        call = other.submit(patient.upsert, new)
        time.sleep(0.1)
        running.reload()
        write = call.result(30)
        assert (write.index_version, write.document_count) == (second, 41)


def test_while_a_refused_version_is_current_a_caller_learns_how_to_write_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad build stopped all writes, and told a remote caller to open the version that the server had refused."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    running = start(searcher=real_store(tmp_path / "store", 30), tokens=tmp_path / "tokens", poll_seconds=0.05)
    self_test = Searcher.self_test

    def failing_once(self: Searcher) -> None:
        if not self.version.startswith("0000000001-"):
            raise ArtifactError("self-test failed")
        self_test(self)

    monkeypatch.setattr(Searcher, "self_test", failing_once)
    with RetrievalClient(running.target, token=TOKEN) as admin:
        first = admin.index().index_version
        real_store(tmp_path / "store", 40)
        second = IndexStore(tmp_path / "store").current().name
        running.wait_for("rkd_index_loads_total", 1, outcome="failed")
        with pytest.raises(ServeError, match=f"{second} is current, but the server refused it .* publish {first} to"):
            admin.delete(["doc-7"])
        assert admin.publish(first) == first
        assert admin.delete(["doc-7"]).document_count == 29


def test_a_real_store_publishes_and_rolls_back(start: Start, tmp_path: Path) -> None:
    """Without it the administration would work on fakes alone."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    running = start(searcher=real_store(tmp_path / "store", 30, 40), tokens=tmp_path / "tokens", poll_seconds=0.05)
    with RetrievalClient(running.target, token=TOKEN) as admin:
        first, second = (one.index_version for one in admin.indexes())
        assert admin.index().index_version == second
        assert admin.rollback() == first
        assert (admin.index().document_count, admin.search("text 35", top_k=1).index_version) == (30, first)
        vectors = next((tmp_path / "store" / "versions" / second).glob("vectors*"))
        vectors.chmod(0o644)
        whole = vectors.read_bytes()
        vectors.write_bytes(whole[:-4] + b"\x00\x00\x00\x01")
        with pytest.raises(ServeError, match=rf"{vectors.name}: bytes differ"):
            admin.publish(second)
        assert admin.index().index_version == first
        vectors.write_bytes(whole)
        assert admin.publish(second) == first
        assert IndexStore(tmp_path / "store").current().name == second


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_an_unreadable_old_version_keeps_nobody_from_the_others(start: Start, tmp_path: Path, how: str) -> None:
    """Without it a torn manifest that nobody serves would bar every publish and rollback, in an outage of all times."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    running = start(searcher=real_store(tmp_path / "store", 20, 30, 40), tokens=tmp_path / "tokens", poll_seconds=0.05)
    with RetrievalClient(running.target, token=TOKEN) as admin:
        oldest, middle, newest = (one.index_version for one in admin.indexes())
        manifest = tmp_path / "store" / "versions" / oldest / "manifest.json"
        manifest.chmod(0o644)
        if how == "damaged":
            manifest.write_text("{")
        else:
            manifest.unlink()
        assert [(one.index_version, one.kind) for one in admin.indexes()] == [
            (oldest, "unreadable"),
            (middle, "exact"),
            (newest, "exact"),
        ]
        assert admin.rollback() == middle
        assert admin.publish(newest) == middle
        with pytest.raises(ServeError, match=r"manifest\.json"):
            admin.publish(oldest)
        assert admin.index().index_version == newest
