from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import FakeCollection, FakeEncoder, card, some_collection

from retrieval_kd.artifacts import Artifact, Spec, build
from retrieval_kd.collections.base import Document
from retrieval_kd.encoders import corpus as corpus_module
from retrieval_kd.encoders.corpus import (
    EncodedCorpus,
    Workers,
    encode_corpus,
    encode_texts,
    read_ids,
    write_ids,
    write_vectors,
)
from retrieval_kd.errors import ArtifactError, DataError, EncoderMismatch

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SHARD_SIZE", 3)
    monkeypatch.setattr(corpus_module, "_BLOCK_ROWS", 4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_rows_are_in_id_order_and_belong_to_their_ids(tmp_path: Path) -> None:
    """A merge that mixes up rows gives every document another's vector, and nothing else would notice."""
    collection = some_collection()
    encode_corpus(FakeEncoder(), collection, tmp_path / "out")
    corpus = EncodedCorpus.load(tmp_path / "out")
    assert corpus.ids == sorted(f"d{i}" for i in range(11))
    assert isinstance(corpus.vectors, np.memmap)
    for document in collection.documents():
        expected = FakeEncoder().encode([document.content], "document")[0]
        np.testing.assert_array_equal(corpus.vectors[corpus.row_of[document.doc_id]], expected)
    assert corpus.card == card()
    assert corpus.texts_fingerprint == collection.corpus_fingerprint


def test_finished_folder_holds_no_shards_and_is_not_encoded_again(tmp_path: Path) -> None:
    """Shards left behind would double the disk; a second run would cost hours."""
    encode_corpus(FakeEncoder(), some_collection(), tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"vectors.npy", "ids.txt", "card.json", "manifest.json"}
    again = FakeEncoder()
    artifact = encode_corpus(again, some_collection(), tmp_path / "out")
    assert again.seen == []
    assert artifact.summary == {"texts": 11, "dimension": 6}


def test_another_encoder_or_corpus_encodes_anew(tmp_path: Path) -> None:
    """Vectors of an older encoder or corpus under the new one's name are silent garbage."""
    encode_corpus(FakeEncoder(), some_collection(), tmp_path / "out")
    other = FakeEncoder(card(weights="other"))
    encode_corpus(other, some_collection(), tmp_path / "out")
    assert len(other.seen) == 11
    assert EncodedCorpus.load(tmp_path / "out").card.weights_hash == "other"
    more = FakeEncoder(card(weights="other"))
    encode_corpus(more, some_collection(12), tmp_path / "out")
    assert len(more.seen) == 12


def test_finished_shards_are_not_encoded_again(tmp_path: Path) -> None:
    """Resuming means that only what is missing is paid for."""

    def fail_at_third(vectors: np.ndarray) -> None:
        if len(broken.seen) > 6:
            raise RuntimeError("out of memory")

    broken = FakeEncoder(spoil=fail_at_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_corpus(broken, some_collection(), tmp_path / "out")
    resumed = FakeEncoder()
    encode_corpus(resumed, some_collection(), tmp_path / "out")
    assert resumed.seen == [f"text {i}" for i in (4, 3, 2, 1, 0)]


def test_resumed_shards_of_another_order_are_refused(tmp_path: Path) -> None:
    """A collection that streams in another order on the second run would pair ids with wrong vectors."""
    collection = some_collection()

    def fail_at_third(vectors: np.ndarray) -> None:
        if len(broken.seen) > 6:
            raise RuntimeError("killed")

    broken = FakeEncoder(spoil=fail_at_third)
    with pytest.raises(RuntimeError):
        encode_corpus(broken, collection, tmp_path / "out")
    shuffled = some_collection()
    shuffled._documents = list(reversed(shuffled._documents))
    shuffled.corpus_fingerprint = collection.corpus_fingerprint
    with pytest.raises(DataError, match=r"ids-00000.txt: holds other ids"):
        encode_corpus(FakeEncoder(), shuffled, tmp_path / "out")


def test_kill_at_every_file_operation_then_resume_is_byte_equal(tmp_path: Path) -> None:
    """A run stopped anywhere and resumed must give the files of an uninterrupted one, manifest included."""
    script = """
        import os, sys
        from pathlib import Path
        from corpus_helpers import FakeEncoder, some_collection
        from sabotage import killed_at
        from retrieval_kd.encoders import corpus
        from retrieval_kd.errors import ArtifactError

        corpus.SHARD_SIZE, corpus._BLOCK_ROWS = 3, 4
        # The page cache outlives a killed process, so only the time of fsync is lost here.
        os.fsync = lambda _: None
        root = Path(sys.argv[1])
        read = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir() if p.name[0] != "."}
        encode = lambda folder: corpus.encode_corpus(FakeEncoder(), some_collection(5), folder)
        encode(root / "whole")
        whole = read(root / "whole")
        kills = 0
        while killed_at(kills + 1, lambda: encode(root / f"killed-{kills}")):
            folder = root / f"killed-{kills}"
            kills += 1
            if not (folder / "manifest.json").exists():
                try:
                    corpus.EncodedCorpus.load(folder)
                    raise SystemExit("opened an unfinished folder")
                except ArtifactError:
                    pass
            encode(folder)
            assert read(folder) == whole, (kills, set(read(folder)) ^ set(whole))
        assert kills > 20, kills
    """
    path = f"{TESTS}{os.pathsep}{TESTS / 'encoders'}"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stderr


def test_empty_corpus_is_an_error(tmp_path: Path) -> None:
    """An index over nothing answers every query with nothing, in silence."""
    with pytest.raises(DataError, match="the collection is empty"):
        encode_corpus(FakeEncoder(), FakeCollection([]), tmp_path / "out")
    with pytest.raises(ArtifactError, match="nothing finished is here"):
        EncodedCorpus.load(tmp_path / "out")


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (np.inf, "not finite"), (5.0, "not of unit")])
def test_bad_vector_names_the_document(tmp_path: Path, value: float, message: str) -> None:
    """One NaN ranks a document first or last everywhere; the message must say which text to look at."""

    def spoil(vectors: np.ndarray) -> None:
        vectors[1, 0] = value

    with pytest.raises(DataError, match=f"text 'd9': its vector is {message}"):
        encode_corpus(FakeEncoder(spoil=spoil), some_collection(), tmp_path / "out")


def test_unit_length_is_asked_only_of_cards_that_promise_it(tmp_path: Path) -> None:
    """A dot-product model with free lengths is legitimate."""

    def lengthen(vectors: np.ndarray) -> None:
        vectors *= 3

    encode_corpus(FakeEncoder(card(normalize=False), spoil=lengthen), some_collection(), tmp_path / "out")
    assert np.linalg.norm(EncodedCorpus.load(tmp_path / "out").vectors[0]) == pytest.approx(3)


def test_repeated_id_is_named(tmp_path: Path) -> None:
    """Two rows of one id make every ranking that meets both an error, at query time."""
    documents = [("a", "x"), ("b", "y"), ("c", "z"), ("a", "w")]
    with pytest.raises(DataError, match="id 'a' occurs twice"):
        encode_corpus(FakeEncoder(), FakeCollection(documents), tmp_path / "out")


@pytest.mark.parametrize("doc_id", ["", "a\nb", "\ud800"])
def test_ids_that_a_line_cannot_hold_are_refused(tmp_path: Path, doc_id: str) -> None:
    """Such an id would shift every row after it by one."""
    with pytest.raises(DataError, match="give the text another id"):
        encode_corpus(FakeEncoder(), FakeCollection([(doc_id, "x")]), tmp_path / "out")


def test_strange_but_legal_ids_survive(tmp_path: Path) -> None:
    """Universal newlines or splitlines would cut these ids in two."""
    ids = ["a\rb", "c\u2028d", " e ", "\x85", "é"]
    write_ids(tmp_path / "ids.txt", ids)
    assert read_ids(tmp_path / "ids.txt") == ids


def test_torn_ids_are_refused(tmp_path: Path) -> None:
    """A cut last line is a shorter id, which would be searched for and not found."""
    (tmp_path / "ids.txt").write_text("a\nbc")
    with pytest.raises(ArtifactError, match="the last line is torn"):
        read_ids(tmp_path / "ids.txt")


def test_rows_and_ids_of_different_number_are_refused(tmp_path: Path) -> None:
    """The manifest protects from tearing and rot, not from files that never fitted."""

    def work(folder: Path) -> dict[str, int]:
        write_vectors(folder / "vectors.npy", [np.zeros((11, 6), np.float32)], (11, 6))
        write_ids(folder / "ids.txt", ["x"])
        card().save(folder)
        return {}

    build(tmp_path / "out", Spec("encode", {}, {"texts": "t"}), work)
    with pytest.raises(ArtifactError, match=r"shape \(11, 6\), but 1 ids"):
        EncodedCorpus.load(tmp_path / "out")


@pytest.mark.parametrize(("name", "byte"), [("ids.txt", 1), ("vectors.npy", -1)])
def test_a_flipped_byte_is_named(tmp_path: Path, name: str, byte: int) -> None:
    """Without it an index would answer with ids that no document has, and an evaluation measure a broken corpus."""
    encode_corpus(FakeEncoder(), some_collection(), tmp_path / "out")
    content = bytearray((tmp_path / "out" / name).read_bytes())
    content[byte] ^= 1
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: bytes differ from the manifest's sha256; delete .*out and"):
        EncodedCorpus.load(tmp_path / "out")


def test_query_encoder_cannot_encode_documents(tmp_path: Path) -> None:
    """A query tower's vectors in the corpus destroy retrieval without an error anywhere else."""
    with pytest.raises(EncoderMismatch, match="encodes the query side only"):
        encode_corpus(FakeEncoder(card(role="query")), some_collection(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_encode_texts_is_cached_whatever_the_order(tmp_path: Path) -> None:
    """The teacher's query vectors are asked for by several stages and must be paid for once."""
    texts = {"q2": "two", "q1": "one", "q3": "three", "q0": "zero"}
    first = encode_texts(FakeEncoder(), texts, "query", tmp_path / "q")
    again = FakeEncoder()
    second = encode_texts(again, dict(reversed(texts.items())), "query", tmp_path / "q")
    assert again.seen == []
    assert first.ids == second.ids == ["q0", "q1", "q2", "q3"]
    np.testing.assert_array_equal(first.vectors[first.row_of["q1"]], FakeEncoder().encode(["one"], "query")[0])
    changed = FakeEncoder()
    encode_texts(changed, {**texts, "q2": "zwei"}, "query", tmp_path / "q")
    assert len(changed.seen) == 4


def test_same_texts_of_the_other_side_are_encoded_anew(tmp_path: Path) -> None:
    """With prefixes the two sides of one text have different vectors."""
    encode_texts(FakeEncoder(), {"a": "x"}, "query", tmp_path / "q")
    other = FakeEncoder()
    encode_texts(other, {"a": "x"}, "document", tmp_path / "q")
    assert other.seen == ["x"]
    assert Artifact.load(tmp_path / "q", "encode").config["side"] == "document"


def test_several_processes_write_the_same_folder(tmp_path: Path) -> None:
    """Vectors that depend on how many cores encoded them would make every cache and comparison worthless."""
    collection = some_collection(29)
    encode_corpus(FakeEncoder(), collection, tmp_path / "one")
    encode_corpus(FakeEncoder(), collection, tmp_path / "two", workers=Workers(FakeEncoder, 2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_an_error_in_a_process_is_the_error_of_the_run(tmp_path: Path) -> None:
    """A shard that failed elsewhere must not be missed, and must be named as if it had failed here."""
    workers = Workers(partial(FakeEncoder, spoil=_spoil), 2)
    with pytest.raises(DataError, match="its vector is not finite"):
        encode_corpus(FakeEncoder(), some_collection(), tmp_path / "out", workers=workers)
    with pytest.raises(ArtifactError):
        EncodedCorpus.load(tmp_path / "out")


def _spoil(vectors: np.ndarray) -> None:
    vectors[0, 0] = np.nan


def test_killed_parent_leaves_no_process_and_a_folder_to_go_on_from(tmp_path: Path) -> None:
    """Orphans would encode into a folder that the next run is already writing."""
    script = """
        import sys, time
        from functools import partial
        from pathlib import Path
        from corpus_helpers import SlowEncoder, some_collection
        from retrieval_kd.encoders.corpus import Workers, encode_corpus
        from retrieval_kd.encoders import corpus

        if __name__ == "__main__":
            corpus.SHARD_SIZE = 3
            encode_corpus(SlowEncoder(), some_collection(60), Path(sys.argv[1]), workers=Workers(SlowEncoder, 2))
    """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": f"{TESTS / 'encoders'}{os.pathsep}{TESTS.parent}"}
    run = subprocess.Popen([sys.executable, str(path), str(out)], env=environment)
    deadline = time.monotonic() + 60
    while len(list(out.glob("ids-*.txt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.kill()
    run.wait()
    assert children
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    resumed = FakeEncoder()
    encode_corpus(resumed, some_collection(60), out)
    assert 0 < len(resumed.seen) <= 54
    encode_corpus(FakeEncoder(), some_collection(60), tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_float16_keeps_half_the_bytes_and_three_digits(tmp_path: Path) -> None:
    """Half the disk of a large corpus; the two precisions must never be taken for one another."""
    encode_corpus(FakeEncoder(), some_collection(), tmp_path / "whole")
    encode_corpus(FakeEncoder(), some_collection(), tmp_path / "half", precision="float16")
    whole, half = EncodedCorpus.load(tmp_path / "whole"), EncodedCorpus.load(tmp_path / "half")
    assert half.vectors.dtype == np.float16
    assert half.ids == whole.ids
    np.testing.assert_array_equal(half.vectors, whole.vectors.astype(np.float16))
    assert half.fingerprint != whole.fingerprint


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """A corpus larger than memory is the reason why there are windows."""
    import tracemalloc

    class Streamed(FakeCollection):
        def __init__(self, count: int) -> None:
            super().__init__([])
            self.count = count
            self.corpus_fingerprint = str(count)

        def documents(self) -> Iterator[Document]:
            return (Document(f"{i:06d}", "", "x" * 2000 + str(i)) for i in range(self.count))

    peaks = []
    for count in (30, 180):
        encoder = FakeEncoder()
        encoder.seen = _Forgetful()
        tracemalloc.start()
        encode_corpus(encoder, Streamed(count), tmp_path / str(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Texts of 300 kB went by; ids and file names may stay.
    assert peaks[1] - peaks[0] < 150_000


class _Forgetful(list):  # type: ignore[type-arg]
    def __iadd__(self, other: object) -> _Forgetful:  # type: ignore[misc,override]
        return self
