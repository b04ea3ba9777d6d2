from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from index_helpers import card, clustered, corpus, query_card

from index.build import build_index
from index.search import Searcher
from index.store import CURRENT, IndexStore
from index.verify import inspect, verify
from retrieval_kd.errors import ArtifactError, DataError, EncoderMismatch
from retrieval_kd.recipes.schema import IndexSpec

EXACT, HNSW = IndexSpec("exact"), IndexSpec("hnsw", neighbours=4, ef_construction=10, ef_search=10)
TESTS = Path(__file__).resolve().parents[1]
OLD, NEW = corpus(clustered(1, 30, 8)), corpus(clustered(2, 40, 8))
QUERY = clustered(3, 1, 8)


def run_script(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS / 'index'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stderr


def test_layout_and_manifest(tmp_path: Path) -> None:
    """The layout is a contract with operators and with every later version of the program."""
    version = build_index(OLD, HNSW, tmp_path / "store", query_card(OLD.card))
    assert version == IndexStore(tmp_path / "store").current()
    assert version.parent == tmp_path / "store" / "versions"
    assert {path.name for path in version.iterdir()} == {
        "manifest.json",
        "ann.faiss",
        "vectors.npy",
        "ids.arrow",
        "probes.npz",
    }
    assert {path.stat().st_mode & 0o777 for path in version.iterdir()} == {0o444}
    name, sha256 = (tmp_path / "store" / CURRENT).read_text().split()
    assert name == version.name == f"0000000001-{sha256[:8]}"
    raw = json.loads((version / "manifest.json").read_text())
    assert raw["format_version"] == 2
    assert raw["content"]["query_space"] == OLD.card.space_fingerprint
    assert raw["content"]["index"] == asdict(HNSW)
    assert {"faiss-cpu", "numpy", "retrieval-kd"} <= set(raw["producers"])


def test_building_the_same_twice_does_nothing(tmp_path: Path) -> None:
    """A nightly job with unchanged inputs must neither fill the disk nor restart the servers."""
    first = build_index(OLD, EXACT, tmp_path)
    pointer = (tmp_path / CURRENT).stat()
    assert build_index(OLD, EXACT, tmp_path) == first
    assert (tmp_path / CURRENT).stat().st_mtime_ns == pointer.st_mtime_ns
    assert IndexStore(tmp_path).versions() == [first]


def test_going_back_to_an_older_build_reuses_it(tmp_path: Path) -> None:
    """Asking for what version 1 holds makes version 1 current again."""
    first = build_index(OLD, EXACT, tmp_path)
    second = build_index(NEW, EXACT, tmp_path)
    assert inspect(tmp_path)["parent"] == first.name
    assert build_index(OLD, EXACT, tmp_path) == first == IndexStore(tmp_path).current()
    assert IndexStore(tmp_path).versions() == [first, second]


def test_pointer_is_replaced_and_never_rewritten(tmp_path: Path) -> None:
    """A reader between truncation and write would see no index; one that has the old pointer open must keep it."""
    first = build_index(OLD, EXACT, tmp_path)
    with (tmp_path / CURRENT).open() as pointer:
        build_index(NEW, EXACT, tmp_path)
        assert pointer.read().startswith(first.name)


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    """A graph that differs from build to build cannot be compared, cached or trusted."""
    big = corpus(clustered(1, 3000, 8))
    left, right = (build_index(big, HNSW, tmp_path / name) for name in ("a", "b"))
    for name in ("ann.faiss", "vectors.npy", "ids.arrow"):
        assert (left / name).read_bytes() == (right / name).read_bytes()


def test_mapped_version_works_on_after_the_next_publish(tmp_path: Path) -> None:
    """A server that has an old version mapped must not die of a new one."""
    build_index(OLD, HNSW, tmp_path)
    searcher = Searcher.open(tmp_path)
    before = searcher.search(QUERY, 5)[0]
    build_index(NEW, HNSW, tmp_path)
    assert Searcher.open(tmp_path).count == 40
    assert searcher.search(QUERY, 5)[0].doc_ids == before.doc_ids
    assert searcher.count == 30


@pytest.mark.parametrize("name", ["manifest.json", "ann.faiss", "vectors.npy", "ids.arrow", "probes.npz"])
@pytest.mark.parametrize("damage", ["flip first", "flip middle", "flip last", "truncate", "grow", "remove"])
@pytest.mark.parametrize("through", ["store", "version"])
def test_damage_of_any_file_is_found_and_named(tmp_path: Path, name: str, damage: str, through: str) -> None:
    """Most flipped bits of a graph load in silence and cost recall; a shrunk file kills by SIGBUS."""
    version = build_index(OLD, HNSW, tmp_path)
    path = version / name
    content = bytearray(path.read_bytes())
    path.chmod(0o644)
    if damage == "remove":
        path.unlink()
    else:
        place = {"flip first": 0, "flip middle": len(content) // 2, "flip last": -1}.get(damage)
        if place is not None:
            content[place] ^= 1
        path.write_bytes({"truncate": content[:-1], "grow": content + b"\0"}.get(damage, content))
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        Searcher.open(tmp_path if through == "store" else version)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        verify(tmp_path)


def test_damaged_version_is_built_again_beside_it(tmp_path: Path) -> None:
    """Finding the damaged version by its fingerprint and doing nothing would make damage permanent."""
    version = build_index(OLD, EXACT, tmp_path)
    (version / "ids.arrow").chmod(0o644)
    (version / "ids.arrow").write_bytes(b"x" + (version / "ids.arrow").read_bytes()[1:])
    again = build_index(OLD, EXACT, tmp_path)
    assert again.name.startswith("0000000002-")
    assert Searcher.open(tmp_path).count == 30


@pytest.mark.parametrize("name", ["vectors.npy", "manifest.json"])
def test_damaged_old_version_is_reported_and_can_be_removed(tmp_path: Path, name: str) -> None:
    """The version one would go back to must be known good; a build, which leaves it alone, would not mend it."""
    first = build_index(OLD, EXACT, tmp_path)
    second = build_index(NEW, EXACT, tmp_path)
    assert len(verify(tmp_path)) == 2
    (first / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{first.name}.*{name}.*; 1 of 2 versions .* whole; .* --keep 1 removes"):
        verify(tmp_path)
    assert IndexStore(tmp_path).collect(1) == [first.name]
    assert verify(tmp_path) == [second.name]


def test_verify_says_how_to_get_rid_of_each_damage(tmp_path: Path) -> None:
    """Without it the only advice would be to build, where going back or removing is all that helps."""
    first, second = build_index(OLD, EXACT, tmp_path), build_index(NEW, EXACT, tmp_path)
    (second / "vectors.npy").unlink()
    publish = f"1 of 2 versions .* current .* build the index again, or go back: rkd index publish .* {first.name}"
    with pytest.raises(ArtifactError, match=publish):
        verify(tmp_path)
    IndexStore(tmp_path).publish_existing(first.name)
    with pytest.raises(ArtifactError, match=f"the current one is whole; remove the folder {second}"):
        verify(tmp_path)
    (first / "vectors.npy").unlink()
    both = f"{first.name}/vectors.npy: missing.* and .*{second.name}/vectors.npy: missing.*; 2 of 2 .* again$"
    with pytest.raises(ArtifactError, match=both):
        verify(tmp_path)


@pytest.mark.parametrize("pointer", ["", "0000000001-00000000", "../../etc x\n", "\xff"])
def test_torn_pointer_is_refused_and_mended_by_publishing(tmp_path: Path, pointer: str) -> None:
    """A pointer that is followed without being understood leads anywhere."""
    version = build_index(OLD, EXACT, tmp_path)
    (tmp_path / CURRENT).write_text(pointer, encoding="latin-1")
    with pytest.raises(ArtifactError, match="CURRENT: not a version and a sha256"):
        Searcher.open(tmp_path)
    assert build_index(OLD, EXACT, tmp_path) == version
    assert Searcher.open(tmp_path).version == version.name


def test_pointer_to_another_manifest_is_refused(tmp_path: Path) -> None:
    """The pointer binds the manifest in full, the folder's name only its first eight digits."""
    version = build_index(OLD, EXACT, tmp_path)
    (tmp_path / CURRENT).write_text(f"{version.name} {'0' * 64}\n")
    with pytest.raises(ArtifactError, match="bytes differ from the sha256 in CURRENT"):
        Searcher.open(tmp_path)


def test_nothing_published_says_so(tmp_path: Path) -> None:
    """The first thing a user does wrong is to serve a folder that holds no index."""
    with pytest.raises(ArtifactError, match="no index is published here"):
        Searcher.open(tmp_path / "nowhere")


def test_wrong_encoder_and_unusable_vectors_are_refused(tmp_path: Path) -> None:
    """Found while building, not by the first user."""
    with pytest.raises(EncoderMismatch, match="cannot search documents"):
        build_index(OLD, EXACT, tmp_path, query_card=card(8, weights="other"))
    spoiled = OLD.vectors.copy()
    spoiled[17, 3] = np.nan
    with pytest.raises(DataError, match="document 'd00017': its vector is not finite"):
        build_index(corpus(spoiled), EXACT, tmp_path)
    with pytest.raises(DataError, match="no documents to index"):
        build_index(corpus(np.empty((0, 8))), EXACT, tmp_path)
    with pytest.raises(DataError, match="compares by cosine but does not normalise"):
        build_index(replace(OLD, card=replace(OLD.card, similarity="cosine")), EXACT, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_publishers_do_not_meet(tmp_path: Path) -> None:
    """Two publishers would give two versions one number and race for the pointer."""
    build_index(OLD, EXACT, tmp_path)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="another process is building it"):
            build_index(NEW, EXACT, tmp_path)
    assert Searcher.open(tmp_path).count == 30


def test_kill_at_every_file_operation_leaves_old_or_new(tmp_path: Path) -> None:
    """A publisher killed anywhere must leave one whole version current, and must not stop the next one."""
    run_script(
        """
        import os, shutil, sys
        from pathlib import Path
        from sabotage import killed_at
        from test_index_store import HNSW, NEW, OLD, QUERY
        from index.build import build_index
        from index.search import Searcher
        from index.verify import verify

        # The page cache outlives a killed process, so only the time of fsync is lost here.
        os.fsync = lambda _: None
        root = Path(sys.argv[1])
        build_index(OLD, HNSW, root / "old")
        with Searcher.open(root / "old") as searcher:
            searcher.upsert(["update"], QUERY)
        shutil.copytree(root / "old", root / "new")
        build_index(NEW, HNSW, root / "new")
        answer = lambda store: Searcher.open(store).search(QUERY, 5)[0].doc_ids
        old, new = answer(root / "old"), answer(root / "new")
        assert old != new
        assert old[0] == new[0] == "update"
        seen, kills = [], 0
        while True:
            store = root / f"killed-{kills}"
            shutil.copytree(root / "old", store)
            if not killed_at(kills + 1, lambda: build_index(NEW, HNSW, store)):
                # The swap is the last change, so a run killed after it is a run that was not killed.
                assert answer(store) == new
                break
            kills += 1
            verify(store)
            seen.append(answer(store))
            build_index(NEW, HNSW, store)
            assert answer(store) == new
            assert len(verify(store)) == 2, kills
            assert not list((store / "versions").glob(".*")), kills
        assert seen == [old] * kills, seen
        assert kills > 15, kills
        """,
        str(tmp_path),
    )


@pytest.mark.parametrize("verb", ["publish", "rollback", "tune", "gc"])
def test_kill_at_every_file_operation_of_what_else_changes_a_store(tmp_path: Path, verb: str) -> None:
    """An administrator's command killed anywhere must leave a store that answers, and that the command then mends."""
    run_script(
        """
        import os, shutil, sys
        from pathlib import Path
        from sabotage import killed_at
        from index_helpers import clustered, corpus
        from test_index_store import HNSW, NEW, OLD, QUERY
        from index.build import build_index, retune
        from index.search import Searcher
        from index.store import IndexStore
        from index.verify import verify

        os.fsync = lambda _: None
        root, verb = Path(sys.argv[1]), sys.argv[2]
        corpora = (OLD, corpus(clustered(4, 35, 8)), NEW)
        names = [build_index(held, HNSW, root / "before").name for held in corpora]
        work = {
            "publish": lambda store: IndexStore(store).publish_existing(names[0]),
            "rollback": lambda store: IndexStore(store).rollback(),
            "tune": lambda store: retune(store, OLD, 0.6),
            "gc": lambda store: IndexStore(store).collect(1),
        }[verb]

        def state(store):
            with Searcher.open(store) as searcher:
                # A version that is made twice has the time in its name.
                return searcher.version.split("-")[0], searcher.search(QUERY, 5)[0].doc_ids

        def kept(store):
            return sorted(path.name.split("-")[0] for path in (store / "versions").iterdir())

        shutil.copytree(root / "before", root / "after")
        work(root / "after")
        before, after, left = state(root / "before"), state(root / "after"), kept(root / "after")
        assert (before == after) == (verb == "gc"), (before, after)
        kills = 0
        while True:
            store = root / f"killed-{kills}"
            shutil.copytree(root / "before", store)
            if not killed_at(kills + 1, lambda: work(store)):
                break
            kills += 1
            assert state(store) in (before, after), kills
            verify(store)
            if state(store) == before:
                work(store)
            assert state(store) == after, kills
            assert kept(store) == left, (kills, kept(store))
        assert kills >= 2, kills
        """,
        str(tmp_path),
        verb,
    )


def test_full_disk_leaves_what_was_published(tmp_path: Path) -> None:
    """Whatever byte the disk ends at: a clear error, no half version, no pointer to one."""
    run_script(
        """
        import resource, sys
        from pathlib import Path
        from test_index_store import HNSW, NEW, OLD
        from index.build import build_index
        from index.verify import verify
        from retrieval_kd.errors import ArtifactError

        store = Path(sys.argv[1])
        first = build_index(OLD, HNSW, store)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for limit in (0, 50, 200, 1000, 1300, 2000, 3000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                build_index(NEW, HNSW, store)
                raise SystemExit(f"written with {limit} bytes a file")
            except ArtifactError as error:
                assert "cannot write the index" in str(error), error
                assert "unchanged" in str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert verify(store) == [first.name]
            assert [path.name for path in (store / "versions").iterdir()] == [first.name]
        build_index(NEW, HNSW, store)
        """,
        str(tmp_path),
    )


def test_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    """A path through a file, or a read-only folder, is one line and no trace."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write the index"):
        build_index(OLD, EXACT, tmp_path / "file" / "store")


def test_read_only_store_is_searched_and_not_written() -> None:
    """Servers run as users who may not write; wrong permissions are the most common deployment mistake."""
    run_script(
        """
        import os, tempfile
        from pathlib import Path
        from test_index_store import HNSW, NEW, OLD, QUERY
        from index.build import build_index
        from index.search import Searcher
        from index.store import IndexStore
        from retrieval_kd.errors import ArtifactError

        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            first = build_index(OLD, HNSW, store)
            build_index(NEW, HNSW, store)
            if os.geteuid() == 0:
                os.chmod(folder, 0o755)
                os.seteuid(65534)
            else:
                for path in [store, *store.rglob("*")]:
                    path.chmod(0o555 if path.is_dir() else 0o444)
            try:
                searcher = Searcher.open(store)
                assert len(searcher.search(QUERY, 5)[0]) == 5
                attempts = {
                    "cannot write the index": [
                        lambda: build_index(OLD, HNSW, store / "other"),
                        lambda: IndexStore(store).rollback(),
                        lambda: IndexStore(store).publish_existing(first.name),
                    ],
                    "cannot write updates": [lambda: searcher.upsert(["x"], QUERY), lambda: searcher.delete(["x"])],
                    "cannot remove a version": [lambda: IndexStore(store).collect(keep=1)],
                }
                for message, works in attempts.items():
                    for work in works:
                        try:
                            work()
                            raise SystemExit(f"done, not: {message}")
                        except ArtifactError as error:
                            assert message in str(error), error
            finally:
                if os.getuid() == 0:
                    os.seteuid(0)
                for path in [store, *store.rglob("*")]:
                    path.chmod(0o755 if path.is_dir() else 0o644)
        """
    )


def test_inspect_is_json_and_names_the_encoder(tmp_path: Path) -> None:
    """The command line prints it as it is."""
    build_index(OLD, EXACT, tmp_path)
    seen = json.loads(json.dumps(inspect(tmp_path)))
    assert seen["count"] == 30
    assert seen["document_encoder"]["fingerprint"] == OLD.card.fingerprint
    assert seen["bytes_per_doc"] == Searcher.open(tmp_path).bytes_per_doc
    assert seen["corpus_fingerprint"] == OLD.texts_fingerprint
