"""The index kinds: what each builds, and how it proposes documents for a query.

A kind only proposes; the searcher scores what it proposes. ``exact`` scans the stored vectors and needs no file
of its own; every other kind writes ``ann.faiss``.

* ``fastscan``: product-quantizer codes of 4 bits for every 4 numbers, all scanned in registers (Andre, Kermarrec
  and Le Scouarnec, arXiv 1704.07355).
* ``ivf``, ``ivf-pq``, ``ivf-rabitq``: lists around centroids; in a list the vectors themselves, the codes of
  ``fastscan``, or one bit a number (RaBitQ, Gao and Long, arXiv 2405.12497).
* ``hnsw``, ``hnsw-sq8``: a graph (Malkov and Yashunin, arXiv 1603.09320) walked over the stored vectors or over
  8-bit codes of its own; built by one thread, because a graph built by several differs from run to run (faiss#2548).
* ``gpu-exact``, ``gpu-ivf-pq``, ``gpu-cagra``: the stored vectors, lists of codes or a graph in the memory of a GPU,
  where faiss has one (:mod:`index.gpu`); one search at a time, and at most 2048 candidates and lists, 512 of a graph's,
  beyond which all documents are compared.
"""

from __future__ import annotations

import contextlib
import math
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from index import gpu
from index.ann import Selection, faiss
from index.files import sound
from index.filters import Mask
from index.threads import faiss_threads
from index.vectors import BLOCK_ROWS, Rows, StoredVectors
from retrieval_kd.artifacts import atomic_write
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.pages import forget_pages
from retrieval_kd.progress import progress
from retrieval_kd.recipes.schema import IndexSpec
from retrieval_kd.runs import Scores

ANN = "ann.faiss"

_IVF = ("ivf", "ivf-pq", "ivf-rabitq", "gpu-ivf-pq")
_HNSW = ("hnsw", "hnsw-sq8")
GRAPHS = (*_HNSW, "gpu-cagra")
"""The kinds whose effort is ``ef_search``."""
# Graphs that walk over the stored vectors and have none of their own.
_OVER_STORED = ("hnsw", "gpu-cagra")
_SCANS = ("exact", "gpu-exact")
_TRAINED_ON = 65536
_CENTROIDS = 16
_POINTS_PER_LIST = 39
# faiss sums the distances of twenty queries or more by BLAS, in an order that depends on how many they are; those of
# scanned codes it adds up by itself.
_QUERIES_AT_ONCE = 16
_SPARE = 1.2
# Kinds that can look only at the chosen.
_SELECTIVE = ("ivf", "ivf-pq", "ivf-rabitq", *_HNSW)
_TIES = 32
# faiss shuffles the nodes it adds in one call, and a graph whose nodes come in the order of their ids is a worse one.
_ADDED_AT_ONCE = 65536


@dataclass(frozen=True)
class Effort:
    """How hard an index looks; each kind reads what concerns it.

    Attributes:
        ef_search: Nodes a graph keeps in view.
        probes: Lists that are opened.
        oversample: Candidates scored for each document wanted (for ten, if fewer are wanted).
    """

    ef_search: int
    probes: int
    oversample: int

    def __post_init__(self) -> None:
        """Refuse an effort that finds nothing."""
        for name in ("ef_search", "probes", "oversample"):
            if getattr(self, name) < 1:
                raise DataError(f"search effort: {name} {getattr(self, name)} must be at least 1")

    @classmethod
    def of(cls, spec: IndexSpec) -> Effort:
        """Return the effort a resolved spec asks for."""
        return cls(spec.ef_search, max(1, spec.probes), spec.oversample)

    def width(self, spec: IndexSpec, k: int) -> int:
        """Return how many candidates a kind proposes for ``k`` documents."""
        if spec.kind not in GRAPHS:
            return self.oversample * max(k, 10)
        # A walk over the vectors themselves sees their scores: more than ties at the end is carried for nothing.
        return max(k, min(self.ef_search, k + _TIES) if spec.kind in _OVER_STORED else self.ef_search)


def resolved(spec: IndexSpec, count: int, dimension: int) -> IndexSpec:
    """Return the spec with every number that depends on the corpus filled in.

    Raises:
        DataError: too few documents for the kind, or it needs a GPU that is not there or cannot hold it.
    """
    if spec.kind in gpu.GPU:
        gpu.require_fits(spec, count, dimension)
    if spec.kind not in (*_SCANS, *GRAPHS) and count < _CENTROIDS:
        raise DataError(f"index kind {spec.kind} needs {_CENTROIDS} documents, there are {count}; use exact")
    if spec.kind not in _IVF:
        return spec
    lists = spec.lists or max(1, min(round(4 * math.sqrt(count)), count // _POINTS_PER_LIST))
    if lists > count:
        raise DataError(f"index.lists: {lists} lists for {count} documents; give fewer")
    return replace(spec, lists=lists, probes=min(lists, spec.probes or max(1, round(lists / 16))))


def write_ann(folder: Path, vectors: StoredVectors, spec: IndexSpec) -> None:
    """Build what the kind needs beside the stored vectors and write it to ``ann.faiss``."""
    if spec.kind in _SCANS:
        return
    index = gpu.cagra(vectors, spec.neighbours) if spec.kind == "gpu-cagra" else _filled(vectors, spec)
    flags = faiss.IO_FLAG_SKIP_STORAGE if spec.kind in _OVER_STORED else 0
    # faiss's own file writer loses an error of the last flush; a callback raises it.
    with atomic_write(folder / ANN, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write), flags)


def _filled(vectors: StoredVectors, spec: IndexSpec) -> Any:
    index = _empty(spec, vectors.dimension)
    if not index.is_trained:
        index.train(_sample(vectors, max(_TRAINED_ON, _POINTS_PER_LIST * spec.lists)))
    threads = 1 if spec.kind in _HNSW else faiss.omp_get_max_threads()
    with faiss_threads(threads), progress(f"build {spec.kind}", vectors.count, "documents") as advance:
        for block in vectors.blocks(_ADDED_AT_ONCE):
            index.add(block)
            advance(len(block))
    return index


class Proposals(NamedTuple):
    """What a kind found.

    Attributes:
        scores: float32 ``[n, width]``, by the kind's own measure.
        rows: int64 ``[n, width]``; below 0 for nothing found, or a document that may not be ranked.
        enough: bool ``[n]``, whether as many as are wanted were left, or all that can be had were looked at.
    """

    scores: Scores
    rows: Rows
    enough: Mask


class Proposer:
    """What proposes documents for queries; any number of threads may use it at once."""

    def __init__(self, index: Any, vectors: StoredVectors, spec: IndexSpec) -> None:
        """Hold an opened index; use :meth:`open`."""
        self._index = index
        self._vectors = vectors
        self._spec = spec
        # An index on a GPU has one set of buffers for all that ask it; those of the processor are only read.
        self._turn = threading.Lock() if spec.kind in gpu.GPU else contextlib.nullcontext()

    @classmethod
    def open(cls, folder: Path, vectors: StoredVectors, spec: IndexSpec) -> Proposer | None:
        """Map ``ann.faiss``; ``exact`` has none.

        Raises:
            ArtifactError: faiss cannot read the file, or it is of another size than the vectors.
            DataError: the kind needs a GPU that is not there.
        """
        if spec.kind == "exact":
            return None
        if spec.kind in gpu.GPU:
            gpu.require_gpu(spec.kind)
        if spec.kind == "gpu-exact":
            index = vectors.scan
        elif spec.kind in _OVER_STORED:
            index = _mapped(folder / ANN, faiss.IO_FLAG_SKIP_STORAGE)
            index.storage, index.own_fields = vectors.scan, False
        else:
            index = _mapped(folder / ANN, 0)
        if (index.ntotal, index.d) != (vectors.count, vectors.dimension):
            raise ArtifactError(f"{folder / ANN}: of another size than the vectors; build the index again")
        return cls(gpu.on_gpu(index, spec.kind) if spec.kind in gpu.GPU else index, vectors, spec)

    @property
    def most(self) -> int:
        """Return how many documents can be proposed for a query."""
        return gpu.most(self._spec.kind) if self._spec.kind in gpu.GPU else self._vectors.count

    @property
    def scores_are_dots(self) -> bool:
        """Return whether the scores are float32 dot products with the stored vectors, not those of codes."""
        return self._spec.kind in ("hnsw", "gpu-exact") or (
            self._spec.kind == "ivf" and self._vectors.storage == "float32"
        )

    def propose(self, queries: Vectors, k: int, effort: Effort, chosen: Selection | None, harder: int = 1) -> Proposals:
        """Return the documents most likely to be among the best ``k``.

        Args:
            queries: float32 ``[n, d]``.
            k: Documents wanted, at most as many as are chosen and at most :attr:`most`.
            effort: How hard to look; enlarged by the share of documents that are not chosen.
            chosen: The documents that may be proposed, at least one; all when None.
            harder: How many times harder still, where an earlier call found too few of the chosen.
        """
        count = self._vectors.count
        ceiling = min(count, self.most)
        share = 1.0 if chosen is None else chosen.count / count
        # A walk that sees only the chosen does not tell when it ended among the others; what was dropped is counted.
        selecting = chosen is not None and chosen.by_filter and not chosen.most and self._spec.kind in _SELECTIVE
        selected, kept = (chosen, None) if selecting else (None, chosen)
        wanted = width = min(effort.width(self._spec, k), ceiling)
        if kept is not None:
            spare = math.ceil(_SPARE * wanted * harder / share) - wanted
            width = min(wanted + min(spare, count - kept.count), ceiling)
        parameters = self._parameters(
            effort, wanted, width, harder / share, None if selected is None else selected.selector
        )
        at_once = len(queries) if self._spec.kind == "fastscan" else _QUERIES_AT_ONCE
        with self._turn:
            found = [
                self._index.search(queries[start : start + at_once], width, params=parameters)
                for start in range(0, len(queries), at_once)
            ]
        scores, rows = found[0] if len(found) == 1 else map(np.concatenate, zip(*found, strict=True))
        if self._spec.kind == "gpu-cagra":
            # A walk that found fewer names the last number there is.
            rows[rows >= count] = -1
        enough = np.ones(len(queries), dtype=bool)
        if kept is not None:
            dropped = ~kept.mask[rows] & (rows >= 0)
            rows[dropped] = -1
            enough = (np.count_nonzero(dropped, axis=1) <= width - wanted) | (width == ceiling)
        return Proposals(scores, rows, enough)

    def _parameters(self, effort: Effort, wanted: int, width: int, times: float, selector: Any) -> Any:
        if self._spec.kind in GRAPHS:
            nodes = min(self._vectors.count, max(width, math.ceil(max(wanted, effort.ef_search) * times)))
            if self._spec.kind == "gpu-cagra":
                return gpu.cagra_parameters(nodes)
            return faiss.SearchParametersHNSW(efSearch=nodes, sel=selector)
        if self._spec.kind in _IVF:
            probes = min(self._spec.lists, self.most, round(effort.probes * times))
            return faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        return None


def _empty(spec: IndexSpec, dimension: int) -> Any:
    if spec.kind == "hnsw":
        graph = faiss.IndexHNSWFlat(dimension, spec.neighbours, faiss.METRIC_INNER_PRODUCT)
    elif spec.kind == "hnsw-sq8":
        quantizer = faiss.ScalarQuantizer.QT_8bit
        graph = faiss.IndexHNSWSQ(dimension, quantizer, spec.neighbours, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.index_factory(dimension, _description(spec, dimension), faiss.METRIC_INNER_PRODUCT)
        # faiss warns on standard error about few training points, which a small corpus cannot help.
        for clustering in (getattr(index, "cp", None), getattr(getattr(index, "pq", None), "cp", None)):
            if clustering is not None:
                clustering.min_points_per_centroid = 1
        return index
    graph.hnsw.efConstruction = spec.ef_construction
    return graph


def _description(spec: IndexSpec, dimension: int) -> str:
    """Return what faiss's factory calls an index."""
    if spec.kind == "gpu-ivf-pq":
        # np: without training for polysemous codes, which takes long and which a GPU cannot use.
        return f"IVF{spec.lists},PQ{gpu.code(dimension)}np"
    codes = f"PQ{_sub_vectors(dimension)}x4fs"
    return {
        "fastscan": codes,
        "ivf": f"IVF{spec.lists},Flat",
        "ivf-pq": f"IVF{spec.lists},{codes}",
        "ivf-rabitq": f"IVF{spec.lists},RaBitQ",
    }[spec.kind]


def _sub_vectors(dimension: int) -> int:
    """Return into how many equal parts of at most 4 numbers a vector can be cut, as few as possible."""
    return next(parts for parts in range(-(-dimension // 4), dimension + 1) if dimension % parts == 0)


def _sample(vectors: StoredVectors, wanted: int) -> Vectors:
    """Return evenly spaced rows; their order is that of the ids."""
    rows = np.linspace(0, vectors.count - 1, min(vectors.count, wanted)).astype(np.int64)
    sample = np.empty((len(rows), vectors.dimension), dtype=np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        sample[part] = vectors.rows(rows[part])
        forget_pages(vectors.array)
    return sample


def _mapped(path: Path, flags: int) -> Any:
    """Open a file of faiss without reading it; faiss calls this flag temporary, so it stands here alone."""
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | flags)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        # faiss gives no number: where descriptors ran out, the file cannot be opened here either.
        with sound(path, reason):
            path.open("rb").close()
        raise ArtifactError(f"{path}: not an index faiss can read ({reason}); build the index again") from None
