"""The kinds in the memory of a GPU, by faiss's own calls: what they can hold, how they get there, what they are asked.

* ``gpu-exact``: the stored vectors.
* ``gpu-ivf-pq``: lists of 8-bit product-quantizer codes, trained and filled by the processor.
* ``gpu-cagra``: a graph over the stored vectors (CAGRA, Ootomo et al., arXiv 2308.15136), built on the GPU by faiss
  with cuVS; kept in faiss's exchange format for it, without the vectors, which the version has already. Its builds
  differ from run to run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from index.ann import faiss
from index.vectors import StoredVectors
from retrieval_kd.errors import DataError
from retrieval_kd.recipes.schema import IndexSpec

GPU = ("gpu-exact", "gpu-ivf-pq", "gpu-cagra")
# What faiss selects at most on a GPU, of lists and vectors or of a walk's nodes.
_MOST = 2048
_MOST_NODES = 512
_NODES_STEP = 32
# The links of a node and a step of nodes must fit a buffer of 256.
_MOST_NEIGHBOURS = 112
# The bytes a code may have there: one lookup table of 256 half floats for each byte must fit the 48 KiB of memory that
# a block shares.
_CODES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)


def require_gpu(kind: str) -> None:
    """Refuse a kind that this machine, or the faiss that is installed, cannot hold.

    Raises:
        DataError: says what is missing.
    """
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise DataError(f"index kind {kind} needs faiss-gpu and a GPU, and there is none here; use another kind")
    if kind == "gpu-cagra" and not hasattr(faiss, "GpuIndexCagra"):
        raise DataError("index kind gpu-cagra needs faiss with cuVS; install faiss-gpu-cuvs in the place of faiss-gpu")


def require_fits(spec: IndexSpec, count: int, dimension: int) -> None:
    """Refuse what a kind cannot be built of, before anything is.

    Raises:
        DataError: codes, a storage or a number of documents that the kind has no form for.
    """
    require_gpu(spec.kind)
    if spec.kind == "gpu-ivf-pq":
        code(dimension)
    fit = {"gpu-exact": ("float32", "float16"), "gpu-cagra": ("float32",)}.get(spec.kind, (spec.storage,))
    if spec.storage not in fit:
        raise DataError(f"index kind {spec.kind} holds {' or '.join(fit)}, not {spec.storage}; set index.storage")
    if spec.kind == "gpu-cagra" and spec.neighbours > _MOST_NEIGHBOURS:
        raise DataError(f"index kind gpu-cagra takes at most {_MOST_NEIGHBOURS} neighbours, not {spec.neighbours}")
    if spec.kind == "gpu-cagra" and count <= 4 * spec.neighbours:
        raise DataError(
            f"index kind gpu-cagra: a graph of {spec.neighbours} neighbours needs more than {4 * spec.neighbours} "
            f"documents, there are {count}; use gpu-exact"
        )


def code(dimension: int) -> int:
    """Return the least bytes a code needs for one byte for every 8 numbers or fewer.

    Raises:
        DataError: there is no such code.
    """
    for parts in _CODES:
        if dimension % parts == 0 and dimension <= 8 * parts:
            return parts
    raise DataError(
        f"index kind gpu-ivf-pq: {dimension} numbers do not fall into {_CODES[-1]} equal parts or fewer, of at "
        "most 8 numbers, that a GPU has memory for; set index.dimension, or use ivf-pq"
    )


def most(kind: str) -> int:
    """Return how many documents, or lists, can be had for a query."""
    return _MOST_NODES if kind == "gpu-cagra" else _MOST


def on_gpu(index: Any, kind: str) -> Any:
    """Return a copy of an index of the processor in the memory of the first GPU."""
    options = faiss.GpuClonerOptions()
    # For lists of codes this makes only the lookup tables half floats; flat vectors would lose half of their bits.
    options.useFloat16 = kind == "gpu-ivf-pq"
    # faiss has cuVS refuse half floats and other lengths of codes than ours; a CAGRA graph goes there in any case.
    options.use_cuvs = False
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)


def cagra(vectors: StoredVectors, neighbours: int) -> Any:
    """Build a graph on the GPU and return it as the base of an HNSW graph, with as many links a node."""
    config = faiss.GpuIndexCagraConfig()
    config.graph_degree = 2 * neighbours
    config.intermediate_graph_degree = 4 * neighbours
    index = faiss.GpuIndexCagra(faiss.StandardGpuResources(), vectors.dimension, faiss.METRIC_INNER_PRODUCT, config)
    index.train(np.asarray(vectors.array))
    base = faiss.IndexHNSWCagra()
    # Upper levels would cost the processor time, and are nothing to a GPU.
    base.base_level_only = True
    index.copyTo(base)
    return base


def cagra_parameters(nodes: int) -> Any:
    """Return the parameters of a walk that keeps so many nodes in view, or as many as it can."""
    return faiss.SearchParametersCagra(
        # cuVS rounds up by itself, but beyond its most it fails.
        itopk_size=min(_MOST_NODES, _NODES_STEP * math.ceil(nodes / _NODES_STEP)),
        # A block for each query; of several, where one begins depends on the other queries of the call.
        algo=faiss.search_algo_SINGLE_CTA,
    )
