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

from index import gpu as gpu_kinds
from index.build import build_index
from index.kinds import ANN, Effort, resolved
from index.search import Searcher
from retrieval_kd.errors import DataError
from retrieval_kd.recipes.schema import IndexSpec

MOST = 16
WALK = 32
BASE = corpus(clustered(1, 700, 8))
ASKED = clustered(7, 6, 8)
SPECS = {
    "gpu-exact": IndexSpec("gpu-exact"),
    "gpu-ivf-pq": IndexSpec("gpu-ivf-pq", lists=20, probes=20, oversample=50),
    "gpu-cagra": IndexSpec("gpu-cagra", neighbours=8),
}
NOT_FOUND = 2**32 - 1


class Options:
    useFloat16 = False  # noqa: N815  faiss's own name
    use_cuvs = True


class Config:
    graph_degree = 0
    intermediate_graph_degree = 0


class Cagra:
    """The builder of a graph; what it gives back to the processor is faiss's own exchange format."""

    def __init__(self, _resources: object, dimension: int, metric: int, config: Config) -> None:
        assert metric == faiss.METRIC_INNER_PRODUCT
        assert config.intermediate_graph_degree > config.graph_degree > 0
        self._config = config
        self._graph = faiss.IndexHNSWCagra(dimension, config.graph_degree // 2, metric)

    def train(self, vectors: np.ndarray) -> None:
        assert len(vectors) > self._config.intermediate_graph_degree
        self._graph.add(vectors)

    def copyTo(self, base: Any) -> None:  # noqa: N802  faiss's own name
        assert base.base_level_only
        base.d, base.ntotal, base.metric_type = self._graph.d, self._graph.ntotal, self._graph.metric_type
        base.hnsw = self._graph.hnsw
        base.storage, base.own_fields = self._graph.storage, False


class Walk:
    def __init__(self, itopk_size: int, algo: str) -> None:
        assert itopk_size % 32 == 0
        assert algo == "one block for each query"
        self.itopk_size = itopk_size


class OnGpu:
    """An index that says so when it is asked what a GPU cannot do."""

    def __init__(self, _resources: object, _device: int, index: Any, options: Options) -> None:
        self._index = index
        self._asked = threading.Lock()
        assert not options.use_cuvs
        if isinstance(index, faiss.IndexHNSWCagra):
            # cuVS copies the vectors from where they lie, and ends the process unless they are plain floats.
            assert isinstance(faiss.downcast_index(index.storage), faiss.IndexFlat)
        # faiss would keep flat vectors as half floats, and refuse long codes without.
        assert options.useFloat16 == isinstance(index, faiss.IndexIVFPQ)

    def search(self, queries: np.ndarray, width: int, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(params, Walk):
            assert width <= params.itopk_size <= WALK
            params = faiss.SearchParametersHNSW(efSearch=params.itopk_size)
        else:
            assert width <= MOST
            assert params is None or params.nprobe <= MOST
        assert self._asked.acquire(blocking=False), "two searches of one index at once"
        try:
            time.sleep(0.001)
            scores, rows = self._index.search(queries, width, params=params)
            if isinstance(self._index, faiss.IndexHNSWCagra):
                rows[rows < 0] = NOT_FOUND
            return scores, rows
        finally:
            self._asked.release()


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kinds, "_MOST", MOST)
    monkeypatch.setattr(gpu_kinds, "_MOST_NODES", WALK)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    for name, stand_in in (
        ("StandardGpuResources", object),
        ("GpuClonerOptions", Options),
        ("index_cpu_to_gpu", OnGpu),
        ("search_algo_SINGLE_CTA", "one block for each query"),
        ("GpuIndexCagraConfig", Config),
        ("GpuIndexCagra", Cagra),
        ("SearchParametersCagra", Walk),
    ):
        monkeypatch.setattr(faiss, name, stand_in, raising=False)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("k", [1, 3, MOST, MOST + 1, WALK, WALK + 1, 300])
def test_what_is_beyond_a_gpu_is_answered_all_the_same(kind: str, k: int, tmp_path: Path) -> None:
    """More candidates or lists than faiss selects there are refused by an error from C++ in the middle of a request."""
    build_index(BASE, SPECS[kind], tmp_path)
    with Searcher.open(tmp_path) as searcher:
        rankings = searcher.search(ASKED, k, effort=Effort(1, 1000, 1000))
        for query, ranking in zip(ASKED, rankings, strict=True):
            assert len(ranking) == k
            if kind == "gpu-exact" or k > gpu_kinds.most(kind):
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
    assert gpu_kinds.code(dimension) == code


@pytest.mark.parametrize("dimension", [1024, 1536, 300])
def test_a_code_too_long_for_a_gpu_is_refused_before_the_build(dimension: int, tmp_path: Path) -> None:
    """The lookup tables of a code must fit a block's memory, and an hour of building ends in a file nobody can open."""
    with pytest.raises(DataError, match=f"gpu-ivf-pq: {dimension} numbers do not fall into 96 equal parts or fewer"):
        build_index(corpus(clustered(1, 700, dimension)), SPECS["gpu-ivf-pq"], tmp_path)


def test_a_graph_finds_what_an_exhaustive_search_finds(tmp_path: Path) -> None:
    """Without the vectors put back in its place a graph read from its file walks over nothing."""
    build_index(BASE, SPECS["gpu-cagra"], tmp_path)
    with Searcher.open(tmp_path) as searcher:
        found = [ranking.doc_ids for ranking in searcher.search(ASKED, 10, effort=Effort(WALK, 1, 1))]
    assert found == [tuple(brute_force(BASE, query, 10)) for query in ASKED]
    (ann,) = tmp_path.rglob(ANN)
    assert faiss.read_index(str(ann), faiss.IO_FLAG_SKIP_STORAGE).storage is None, "vectors are stored twice"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (IndexSpec("gpu-exact", storage="sq8"), "gpu-exact holds float32 or float16, not sq8"),
        (IndexSpec("gpu-cagra", storage="float16"), "gpu-cagra holds float32, not float16"),
        (IndexSpec("gpu-cagra", neighbours=113), "gpu-cagra takes at most 112 neighbours, not 113"),
    ],
)
def test_what_a_gpu_has_no_form_for_is_refused_before_the_build(spec: IndexSpec, reason: str, tmp_path: Path) -> None:
    """There faiss throws from C++, or ends the process, once the vectors are written and the version is opened."""
    with pytest.raises(DataError, match=reason):
        build_index(BASE, spec, tmp_path)


def test_a_faiss_without_cuvs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In faiss-gpu there is no CAGRA: without a word an AttributeError sends its user to look for a bug of ours."""
    monkeypatch.delattr(faiss, "GpuIndexCagra")
    with pytest.raises(DataError, match="gpu-cagra needs faiss with cuVS; install faiss-gpu-cuvs"):
        build_index(BASE, SPECS["gpu-cagra"], tmp_path)


def test_a_graph_of_too_few_documents_is_refused(tmp_path: Path) -> None:
    """The graph that CAGRA prunes has four links for each neighbour, and a node cannot be linked with itself."""
    with pytest.raises(DataError, match="8 neighbours needs more than 32 documents, there are 32; use gpu-exact"):
        build_index(corpus(clustered(1, 32, 8)), SPECS["gpu-cagra"], tmp_path)


def test_what_a_walk_does_not_find_is_no_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the place of what it has not found a walk names the last number there is, a row beyond the vectors."""

    class Lost(OnGpu):
        def search(self, queries: np.ndarray, width: int, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
            scores, rows = super().search(queries, width, params)
            rows[:, 2:] = NOT_FOUND
            return scores, rows

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", Lost)
    build_index(BASE, SPECS["gpu-cagra"], tmp_path)
    with Searcher.open(tmp_path) as searcher:
        found = [list(ranking.doc_ids) for ranking in searcher.search(ASKED, 10)]
    assert found == [brute_force(BASE, query, 10) for query in ASKED]
