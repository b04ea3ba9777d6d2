"""Swaps of a real store: damage to any of its files is told, and mapped files are read until nobody reads them."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from serve_fakes import FakeEncoder, Start, real_store
from test_hot_swap import TOKEN, until
from test_server import details

from index.store import IndexStore
from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.recipes.schema import IndexSpec
from serve.client import Document, RetrievalClient

# It has every file that a version can have.
SPEC = IndexSpec("hnsw", storage="sq8")


def test_damage_to_any_file_is_told_and_the_old_version_serves_on(start: Start, tmp_path: Path) -> None:
    """Fault: a flipped bit, a cut file, a lost one. Without it damage would be served, or not be told from a bug."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    store = tmp_path / "store"
    source = real_store(store, 30, 40, spec=SPEC)
    running = start(searcher=source, tokens=tmp_path / "tokens", poll_seconds=60)
    with RetrievalClient(running.target, token=TOKEN) as client, grpc.insecure_channel(running.target) as channel:
        first, second = (one.index_version for one in client.indexes())
        for number in range(2):
            client.upsert([Document(f"new-{number}", text=f"new {number}")])
        assert client.rollback() == first
        admin, metadata = rpc.IndexAdminServiceStub(channel), [("authorization", f"Bearer {TOKEN}")]
        folder, log = store / "versions" / second, store / "updates" / f"{second}.log"
        names = {path.name for path in folder.iterdir()}
        assert names == {
            "ann.faiss",
            "docs.arrow",
            "ids.arrow",
            "manifest.json",
            "positions.npy",
            "probes.npz",
            "scales.npy",
            "vectors.npy",
        }
        folder.chmod(0o755)
        # A log that was cut is one whose writer died, of which the whole records count.
        damage = [(folder / name, how) for name in sorted(names) for how in ("flipped", "cut", "lost")]
        for path, how in [*damage, (log, "flipped")]:
            path.chmod(0o644)
            whole = path.read_bytes()
            middle = 20 if path == log else len(whole) // 2
            if how == "lost":
                path.unlink()
            elif how == "cut":
                path.write_bytes(whole[:middle])
            else:
                path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
            with pytest.raises(grpc.RpcError) as refused:
                admin.PublishIndex(pb.PublishIndexRequest(index_version=second), metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.DATA_LOSS, (path.name, how)
            assert path.name in refused.value.details(), how
            assert details(refused.value, error_details_pb2.ErrorInfo).reason == "DAMAGED_INDEX"
            assert IndexStore(store).current().name == client.search("text 7").index_version == first
            path.write_bytes(whole)
        assert client.publish(second) == first
        assert client.index().document_count == 42


def test_a_real_store_is_swapped_under_load_and_writes_without_a_failed_call(
    start: Start, tmp_path: Path, encoder: FakeEncoder
) -> None:
    """Fault: files that are unmapped while they are read. Without it a swap could crash the server, or mix versions."""
    (tmp_path / "tokens").write_text(f"admin {TOKEN}\n")
    source = real_store(tmp_path / "store", 30, 40, 50, spec=SPEC)
    running = start(encoder, source, tokens=tmp_path / "tokens", poll_seconds=0.02)
    texts = [f"text {i}" for i in range(5)]
    stop = threading.Event()
    seen: Counter[str] = Counter()
    failures: list[BaseException] = []

    def old(ranking: Iterable[str]) -> list[str]:
        """Leave out what was written since the build."""
        return [doc_id for doc_id in ranking if doc_id.startswith("doc-")]

    with RetrievalClient(running.target, token=TOKEN, timeout=30) as client:
        versions = [one.index_version for one in client.indexes()]
        expected = {}
        for version in versions:
            searcher = source.open(version)
            for text, ranking in zip(texts, searcher.search(encoder.texts_vectors(texts), 1000), strict=True):
                expected[text, version] = list(ranking.doc_ids)
            searcher.close()

        def until_stopped(work: Callable[[int], None]) -> None:
            number = 0
            try:
                while not stop.is_set():
                    work(number)
                    number += 1
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        def search(number: int) -> None:
            asked = texts if number % 2 else [texts[number % len(texts)]]
            results = client.batch_search(asked, 1000) if number % 2 else [client.search(asked[0], top_k=1000)]
            (version,) = {result.index_version for result in results}
            for text, result in zip(asked, results, strict=True):
                assert old(hit.doc_id for hit in result.hits) == expected[text, version]
            seen[version] += 1

        def write(number: int) -> None:
            client.upsert([Document(f"new-{number % 20}", text=f"new {number}", fields={"number": number})])
            client.delete([f"new-{(number + 10) % 20}"])

        with ThreadPoolExecutor(4) as callers:
            for work in (search, search, search, write):
                callers.submit(until_stopped, work)
            swaps = [lambda: client.publish(versions[2]), client.rollback, lambda: client.publish(versions[0])]
            for swap in 10 * swaps:
                before = seen.total()
                swap()
                until(lambda before=before: seen.total() > before or failures)
            stop.set()
    assert failures == []
    assert set(seen) == set(versions)
