"""How much of a mapped file a pass over it holds in memory, as the kernel counts it."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import index.build
import index.kinds
from index.build import build_index
from retrieval_kd import pages
from retrieval_kd.artifacts import Spec, build, fingerprint
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.encoders.corpus import EncodedCorpus, write_ids, write_vectors
from retrieval_kd.pages import forget_pages
from retrieval_kd.recipes.schema import IndexSpec

SMAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(not SMAPS.is_file(), reason="the kernel does not say which pages are resident")
ROWS, DIMENSION = 20_000, 64


def resident(path: str, below: Path = Path("/")) -> int:
    """Return the bytes in memory of mapped files whose path ends so, below a folder."""
    here, found = False, 0
    for line in SMAPS.read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(path) and str(below) in line
        elif here and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.fixture
def mapped(tmp_path: Path) -> Any:
    vectors = np.random.default_rng(0).normal(size=(ROWS, DIMENSION)).astype(np.float32)
    np.save(tmp_path / "documents.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return np.load(tmp_path / "documents.npy", mmap_mode="r")


def test_a_file_that_was_read_leaves_memory_and_reads_the_same(mapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a million documents count as used memory once for the file and once more for its copy."""
    monkeypatch.setattr(pages, "_RESIDENT_BYTES", 0)
    before, view = float(mapped.sum()), np.asarray(mapped)[10:]
    assert resident("documents.npy") > mapped.nbytes * 0.9
    forget_pages(view)
    assert resident("documents.npy") == 0
    assert float(mapped.sum()) == before


def test_a_small_file_and_plain_memory_stay_as_they_are(mapped: Any) -> None:
    """A small file is read again and again, and its pages would be fetched each time."""
    before = float(mapped.sum())
    forget_pages(mapped)
    assert resident("documents.npy") > mapped.nbytes * 0.9
    held = np.array(mapped)
    forget_pages(held)
    assert float(held.sum()) == before


def test_numbers_changed_in_memory_alone_are_kept(mapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that a caller normalised in place, over a file, would be what the file says again."""
    monkeypatch.setattr(pages, "_RESIDENT_BYTES", 0)
    changed = np.load(mapped.filename, mmap_mode="c")
    changed *= 2
    expected = np.array(changed)
    forget_pages(changed)
    np.testing.assert_array_equal(changed, expected)


def test_an_opened_corpus_was_hashed_without_staying_in_memory(tmp_path: Path, mapped: Any) -> None:
    """Without it opening a corpus larger than memory would read all of it into memory to compare its hash."""

    def work(folder: Path) -> dict[str, int]:
        write_vectors(folder / "vectors.npy", [mapped], mapped.shape)
        write_ids(folder / "ids.txt", (f"{row:06d}" for row in range(ROWS)))
        EncoderCard("e", "bert", 1, 1, "mean", False, (DIMENSION,), 32, "", "", "dot", "t", "w").save(folder)
        return {}

    build(tmp_path / "encoded", Spec("encode", {}, {"texts": "t"}), work)
    tracemalloc.start()
    corpus = EncodedCorpus.load(tmp_path / "encoded")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.vectors.shape == mapped.shape
    assert resident("encoded/vectors.npy") < mapped.nbytes * 0.1
    assert peak < mapped.nbytes


@pytest.mark.parametrize("kind", ["exact", "fastscan", "ivf-pq", "hnsw-sq8"])
def test_a_build_holds_neither_the_corpus_nor_its_copy(
    tmp_path: Path, mapped: Any, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """Without it a build takes twice the memory of the vectors, whatever its kind keeps."""
    monkeypatch.setattr(pages, "_RESIDENT_BYTES", 0)
    seen = []
    card = EncoderCard("e", "bert", 1, 1, "mean", False, (DIMENSION,), 32, "", "", "dot", "t", "w")
    corpus = EncodedCorpus([f"{row:06d}" for row in range(ROWS)], mapped, card, fingerprint("v"), fingerprint("t"))

    def watched(function: Any) -> Any:
        def look(*given: Any, **named: Any) -> Any:
            seen.append(resident("documents.npy", tmp_path) + resident("vectors.npy", tmp_path))
            done = function(*given, **named)
            seen.append(resident("documents.npy", tmp_path) + resident("vectors.npy", tmp_path))
            return done

        return look

    # After the check of the numbers, after the sample that is trained on, after all were added, before the probes.
    monkeypatch.setattr(index.build, "write_ids", watched(index.build.write_ids))
    monkeypatch.setattr(index.kinds, "faiss_threads", watched(index.kinds.faiss_threads))
    monkeypatch.setattr(index.build, "write_ann", watched(index.build.write_ann))
    monkeypatch.setattr(index.build, "evenly_spaced", watched(index.build.evenly_spaced))
    spec = replace(IndexSpec(kind), neighbours=4, ef_construction=8)
    build_index(corpus, spec, tmp_path / "store")
    assert set(seen) == {0}
