from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_helpers import KINDS, clustered, corpus

from index.build import build_index
from index.manifest import IndexManifest
from index.probes import Probes
from index.search import Searcher
from index.store import IndexStore, hold
from index.updates import UPDATES, UpdateLog, writing
from index.verify import verify
from retrieval_kd.errors import ArtifactError
from retrieval_kd.recipes.schema import IndexSpec

CORPORA = [corpus(clustered(seed, 30 + seed, 8)) for seed in range(5)]


def store_of(folder: Path, count: int) -> tuple[IndexStore, list[Path]]:
    return IndexStore(folder), [build_index(CORPORA[i], IndexSpec(), folder) for i in range(count)]


def test_rollback_goes_one_version_back_and_publish_to_any(tmp_path: Path) -> None:
    """The night a bad index goes live is no time to build the old one again."""
    store, (first, second, third) = store_of(tmp_path, 3)
    assert store.rollback() == second == store.current()
    assert store.rollback() == first == store.current()
    with pytest.raises(ArtifactError, match=f"{first.name} is the oldest version kept"):
        store.rollback()
    assert store.publish_existing(third.name) == third == store.current()
    with Searcher.open(tmp_path) as searcher:
        assert searcher.version == third.name


def test_what_is_no_version_is_left_alone(tmp_path: Path) -> None:
    """A copy or a note beside the versions would stop every build, be counted by gc and be offered to rollback."""
    store, (first, second) = store_of(tmp_path, 2)
    copy = tmp_path / "versions" / f"{first.name}.bak"
    shutil.copytree(first, copy)
    for name in ("backup", "copy-of", "0000000009-nothex00"):
        (tmp_path / "versions" / name).mkdir()
    (tmp_path / "versions" / "0-notes.txt").write_text("mine\n")
    third = build_index(CORPORA[2], IndexSpec(), tmp_path)
    assert third.name.startswith("0000000003-")
    assert verify(tmp_path) == [first.name, second.name, third.name]
    assert store.rollback() == second
    with pytest.raises(ArtifactError, match="no version 'backup'"):
        store.publish_existing("backup")
    assert store.collect(1) == [first.name]
    assert {path.name for path in (tmp_path / "versions").iterdir()} > {copy.name, "backup", "0-notes.txt"}


@pytest.mark.parametrize("name", ["0000000009-00000000", "", "..", "../..", ".tmp-x"])
def test_unknown_version_is_refused(tmp_path: Path, name: str) -> None:
    """A name that is followed without being looked up leads out of the store."""
    store, (only,) = store_of(tmp_path, 1)
    (tmp_path / "versions" / ".tmp-x").mkdir()
    with pytest.raises(ArtifactError, match=f"no version '{name}'; it has {only.name}"):
        store.publish_existing(name)


def test_damaged_version_is_not_published(tmp_path: Path) -> None:
    """Going back to a version whose disk has rotted makes a bad night worse."""
    store, (first, second) = store_of(tmp_path, 2)
    (first / "vectors.npy").chmod(0o644)
    content = bytearray((first / "vectors.npy").read_bytes())
    content[-1] ^= 1
    (first / "vectors.npy").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"vectors\.npy: bytes differ"):
        store.rollback()
    assert store.current() == second


def test_collect_keeps_the_newest_and_the_current_one(tmp_path: Path) -> None:
    """Without it the disk fills; with a careless one the version that is served goes."""
    store, versions = store_of(tmp_path, 5)
    store.publish_existing(versions[0].name)
    assert store.collect() == [versions[1].name]
    assert store.versions() == [versions[0], *versions[2:]]
    assert store.collect(keep=1) == [versions[2].name, versions[3].name]
    assert store.versions() == [versions[0], versions[4]]
    assert store.current() == versions[0]
    with pytest.raises(ArtifactError, match="give 1 or more"):
        store.collect(keep=0)


def test_an_open_version_is_not_collected_until_it_is_closed(tmp_path: Path) -> None:
    """A reader that is still opening files would find half of them gone."""
    store, (first, second) = store_of(tmp_path, 2)
    searcher = Searcher.open(first)
    again = Searcher.open(first)
    assert store.collect(keep=1) == []
    searcher.close()
    searcher.close()
    assert store.collect(keep=1) == []
    again.close()
    assert store.collect(keep=1) == [first.name]
    assert store.versions() == [second]


def _hold_and_wait(version: Path, held: Event, done: Event) -> None:
    with Searcher.open(version):
        held.set()
        done.wait(60)


def test_a_version_open_in_another_process_is_not_collected(tmp_path: Path) -> None:
    """The collector runs in a job of its own, never in the server."""
    store, (first, _) = store_of(tmp_path, 2)
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    reader = context.Process(target=_hold_and_wait, args=(first, held, done))
    reader.start()
    try:
        assert held.wait(60)
        assert store.collect(keep=1) == []
        reader.kill()
        reader.join()
        assert store.collect(keep=1) == [first.name]
    finally:
        reader.kill()
        reader.join()


def test_a_version_that_is_being_removed_cannot_be_opened(tmp_path: Path) -> None:
    """Between finding a version and locking it, the collector may have taken it."""
    _, (first, _) = store_of(tmp_path, 2)
    first.rename(first.with_name(".tmp-gone"))
    with pytest.raises(ArtifactError, match=r"no manifest\.json, so this is no index version"):
        hold(first)


def test_removal_stopped_half_way_leaves_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a version under its own name would be found damaged for ever after."""

    def stopped(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    store, (_, second) = store_of(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr("index.store.shutil.rmtree", stopped)
        with pytest.raises(ArtifactError, match="cannot remove a version"):
            store.collect(keep=1)
    assert store.versions() == [second]
    assert store.collect(keep=1) == []
    assert not list((tmp_path / "versions").glob(".*"))


def test_a_build_stops_neither_rollback_nor_publish_nor_collect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build takes an hour; a bad index that cannot be taken back until it ends is served for that hour."""
    store, (first, second, third) = store_of(tmp_path, 3)
    seal = IndexStore._seal

    def sealing(self: IndexStore, *arguments: Any) -> str:
        assert store.rollback() == second
        assert store.publish_existing(third.name) == third
        assert store.collect(keep=2) == [first.name]
        with pytest.raises(ArtifactError, match="another process is building it"):
            build_index(CORPORA[4], IndexSpec(), tmp_path)
        return seal(self, *arguments)

    monkeypatch.setattr(IndexStore, "_seal", sealing)
    fourth = build_index(CORPORA[3], IndexSpec(), tmp_path)
    assert store.versions() == [second, third, fourth]
    assert store.current() == fourth


def test_collect_keeps_what_became_current_while_it_waited(tmp_path: Path) -> None:
    """A pointer read before its turn names a version that is current no more, and the one that is goes."""
    store, (first, second, third) = store_of(tmp_path, 3)
    with ThreadPoolExecutor(1) as pool:
        with writing(tmp_path):
            collecting = pool.submit(store.collect, 1)
            wait([collecting], 0.3)
            assert not collecting.done()
            store._point_at(first)
        assert collecting.result(30) == [second.name]
    assert store.versions() == [first, third]
    assert store.current() == first


def test_the_pointer_moves_only_between_updates(tmp_path: Path) -> None:
    """An update that was let pass before the pointer moved would go to the version that was just left."""
    store, _ = store_of(tmp_path, 2)
    moves: list[Callable[[], Path]] = [
        store.rollback,
        lambda: store.publish_existing(store.versions()[-1].name),
        lambda: build_index(CORPORA[2], IndexSpec(), tmp_path),
    ]
    with ThreadPoolExecutor(1) as pool:
        for move in moves:
            before = store.current()
            with writing(tmp_path):
                moving = pool.submit(move)
                wait([moving], 0.3)
                assert store.current() == before
            assert moving.result(30) == store.current() != before


@pytest.mark.parametrize("name", KINDS)
def test_self_test_finds_what_the_builder_found(name: str, tmp_path: Path) -> None:
    """A version no library here reads as its builder did must not go live."""
    build_index(corpus(clustered(1, 700, 16)), KINDS[name], tmp_path)
    with Searcher.open(tmp_path) as searcher:
        searcher.self_test()


def test_self_test_is_of_the_queries_that_were_given(tmp_path: Path) -> None:
    """Documents find themselves even where queries, which lie elsewhere, find nothing."""
    queries = corpus(clustered(9, 200, 8))
    version = build_index(CORPORA[0], IndexSpec(), tmp_path, queries=queries)
    probes = Probes.load(version)
    assert probes.queries.shape == (64, 8)
    assert {row.tobytes() for row in probes.queries} <= {row.tobytes() for row in queries.vectors}
    assert IndexManifest.load(version).content.queries_fingerprint == queries.fingerprint
    assert build_index(CORPORA[0], IndexSpec(), tmp_path) != version


@pytest.mark.parametrize("damage", ["other scores", "other documents"])
def test_self_test_fails_when_answers_differ(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test that passes whatever comes back is none."""
    build_index(CORPORA[0], IndexSpec(), tmp_path)
    whole = Probes.load

    def changed(folder: Path) -> Probes:
        probes = whole(folder)
        return (
            replace(probes, scores=probes.scores * np.float32(1.01))
            if damage == "other scores"
            else replace(probes, rows=(probes.rows + 7) % 30)
        )

    monkeypatch.setattr(Probes, "load", changed)
    with Searcher.open(tmp_path) as searcher, pytest.raises(ArtifactError, match="self-test failed"):
        searcher.self_test()


def test_a_version_that_fails_its_self_test_here_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test says "build it here", and the same build gave back the very version that had failed."""
    first = build_index(CORPORA[0], IndexSpec(), tmp_path)
    whole = Probes.load

    def as_another_library_reads_them(folder: Path) -> Probes:
        probes = whole(folder)
        return replace(probes, scores=probes.scores + np.float32(0.01)) if folder == first else probes

    monkeypatch.setattr(Probes, "load", as_another_library_reads_them)
    with Searcher.open(tmp_path) as searcher, pytest.raises(ArtifactError, match="so build it here"):
        searcher.self_test()
    second = build_index(CORPORA[0], IndexSpec(), tmp_path)
    assert second.name.startswith("0000000002-")
    assert IndexStore(tmp_path).current() == second
    with Searcher.open(tmp_path) as searcher:
        searcher.self_test()
    assert build_index(CORPORA[0], IndexSpec(), tmp_path) == second


def test_sizes_alone_are_checked_on_request(tmp_path: Path) -> None:
    """Reading every byte of a large index at every start of a worker would take minutes; a shrunk file kills."""
    _, (version,) = store_of(tmp_path, 1)
    path = version / "vectors.npy"
    path.chmod(0o644)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x7f")
    Searcher.open(version, check="sizes").close()
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"vectors\.npy"):
        Searcher.open(version, check="sizes")


@pytest.mark.parametrize("kind", ["exact", "fastscan", "hnsw"])
def test_a_version_is_not_damaged_where_descriptors_run_out(tmp_path: Path, kind: str) -> None:
    """A server that took a sound version for a damaged one would not try it again when descriptors are free."""
    version = build_index(CORPORA[0], IndexSpec(kind), tmp_path)
    with Searcher.open(version) as searcher:
        searcher.self_test()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    hogs: list[int] = []
    outcomes = set()
    try:
        with contextlib.suppress(OSError):
            while True:
                hogs.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(12):
            try:
                with Searcher.open(version) as searcher:
                    searcher.self_test()
                outcomes.add("opened")
            except OSError as error:
                outcomes.add(errno.errorcode[error.errno or 0])
            os.close(hogs.pop())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in hogs:
            os.close(descriptor)
    assert outcomes == {"EMFILE", "opened"}


def test_updates_wait_for_no_removal_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large version takes long to remove, and every update and publication would stand still meanwhile."""
    documents = corpus(clustered(1, 30, 8))
    first = build_index(documents, IndexSpec(), tmp_path)
    with Searcher.open(tmp_path) as searcher:
        searcher.upsert(["new"], clustered(2, 1, 8))
    build_index(documents, KINDS["hnsw"], tmp_path)
    remove, removed = shutil.rmtree, []

    def removing(folder: Path) -> None:
        with (tmp_path / UPDATES / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever is stopped here leaves no log that nobody would ever remove.
        assert not UpdateLog.of(tmp_path, first.name).path.exists()
        remove(folder)
        removed.append(folder)

    monkeypatch.setattr("index.store.shutil.rmtree", removing)
    assert IndexStore(tmp_path).collect(keep=1) == [first.name]
    assert len(removed) == 1
    assert not removed[0].exists()
