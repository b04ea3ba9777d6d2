"""The kinds that need a GPU, over a stand-in that takes what faiss takes there and searches by processor."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from index_helpers import brute_force, clustered, corpus

from index import kinds
from index.build import build_index
from index.kinds import Effort, resolved
from index.search import Searcher
from retrieval_kd.errors import DataError
from retrieval_kd.recipes.schema import IndexSpec

MOST = 16
BASE = corpus(clustered(1, 700, 8))
ASKED = clustered(7, 6, 8)
SPECS = {"gpu-exact": IndexSpec("gpu-exact"), "gpu-ivf-pq": IndexSpec("gpu-ivf-pq", lists=20, probes=20, oversample=50)}


class Options:
    useFloat16 = False  # noqa: N815  faiss's own name


class OnGpu:
    """An index that says so when it is asked what a GPU cannot do."""

    def __init__(self, _resources: object, _device: int, index: Any, options: Options) -> None:
        self._index = index
        self._asked = threading.Lock()
        # faiss would keep flat vectors as half floats, and refuse long codes without.
        assert options.useFloat16 == isinstance(index, faiss.IndexIVFPQ)

    def search(self, queries: np.ndarray, width: int, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
        assert width <= MOST
        assert params is None or params.nprobe <= MOST
        assert self._asked.acquire(blocking=False), "two searches of one index at once"
        try:
            time.sleep(0.001)
            scores, rows = self._index.search(queries, width, params=params)
            return scores, rows
        finally:
            self._asked.release()


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_GPU_MOST", MOST)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    for name, stand_in in (
        ("StandardGpuResources", object),
        ("GpuClonerOptions", Options),
        ("index_cpu_to_gpu", OnGpu),
    ):
        monkeypatch.setattr(faiss, name, stand_in, raising=False)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("k", [1, 3, MOST, MOST + 1, 300])
def test_what_is_beyond_a_gpu_is_answered_all_the_same(kind: str, k: int, tmp_path: Path) -> None:
    """More candidates or lists than faiss selects there are refused by an error from C++ in the middle of a request."""
    build_index(BASE, SPECS[kind], tmp_path)
    with Searcher.open(tmp_path) as searcher:
        rankings = searcher.search(ASKED, k, effort=Effort(1, 1000, 1000))
        for query, ranking in zip(ASKED, rankings, strict=True):
            assert len(ranking) == k
            if kind == "gpu-exact" or k > MOST:
                assert list(ranking.doc_ids) == brute_force(BASE, query, k)
        searcher.self_test()


@pytest.mark.parametrize("kind", SPECS)
def test_one_search_at_a_time(kind: str, tmp_path: Path) -> None:
    """An index on a GPU shares its buffers among all callers: two at once mix their answers or end the process."""
    build_index(BASE, SPECS[kind], tmp_path)
    queries = clustered(8, 20, 8)
    with Searcher.open(tmp_path) as searcher, ThreadPoolExecutor(4) as pool:
        alone = [searcher.search(query[None], 3)[0].doc_ids for query in queries]
        together = pool.map(lambda query: searcher.search(query[None], 3)[0].doc_ids, queries)
        assert list(together) == alone


@pytest.mark.parametrize(("dimension", "code"), [(8, 1), (72, 12), (384, 48), (512, 64), (768, 96)])
def test_codes_are_of_a_length_that_a_gpu_scans(dimension: int, code: int) -> None:
    """There is a kernel for each of a few lengths, and faiss says so only when a finished index is opened."""
    resolved(SPECS["gpu-ivf-pq"], 1000, dimension)
    assert kinds._gpu_code(dimension) == code


@pytest.mark.parametrize("dimension", [1024, 1536, 300])
def test_a_code_too_long_for_a_gpu_is_refused_before_the_build(dimension: int, tmp_path: Path) -> None:
    """The lookup tables of a code must fit a block's memory, and an hour of building ends in a file nobody can open."""
    with pytest.raises(DataError, match=f"gpu-ivf-pq: {dimension} numbers do not fall into 96 equal parts or fewer"):
        build_index(corpus(clustered(1, 700, dimension)), SPECS["gpu-ivf-pq"], tmp_path)
