"""The vectors an index version stores: what every kind scans, walks or rescores.

One mapped file, ``vectors.npy``, in one of three storages: ``float32``; ``float16``, half the bytes; ``sq8``, a
quarter, each dimension cut into 256 even steps between its least and greatest value (``scales.npy``). A score is
the dot product with the vector as it is stored, so rankings are exact with respect to the storage.

faiss reads the same mapped bytes: its flat and scalar-quantizer indexes are given a view of them, so scanning
them or walking a graph over them needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from index.ann import faiss
from index.files import sound
from retrieval_kd.artifacts import atomic_write
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.corpus import VECTORS
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.pages import forget_pages
from retrieval_kd.runs import Scores

Rows = npt.NDArray[np.int64]
Storage = Literal["float32", "float16", "sq8"]
SCALES = "scales.npy"
BLOCK_ROWS = 4096
_DOT_ROWS = 512  # their products stay in a core's cache

_DTYPES = {"float32": "<f4", "float16": "<f2", "sq8": "|u1"}
_STEPS = 255
_UNIT_ROUNDOFF = 2.0**-24
_SMALLEST_NORMAL = 2.0**-126
# Decoding a step takes three roundings in faiss and here, not always the same ones.
_DECODING = 8


@dataclass(frozen=True)
class StoredVectors:
    """Vectors of documents, by row; on disk until they are read.

    Attributes:
        array: ``[n, d]`` float32, float16 or uint8, C-ordered, usually mapped.
        storage: What the numbers are.
        scales: float32 ``[2, d]``, least value and width of each dimension, for ``sq8``; else None.
    """

    array: npt.NDArray[Any]
    storage: Storage
    scales: Vectors | None = None

    @classmethod
    def open(cls, folder: Path, storage: Storage) -> StoredVectors:
        """Map the vectors of a version.

        Raises:
            ArtifactError: a file is missing, torn, or of another storage; names it.
        """
        array = _mapped(folder / VECTORS, _DTYPES[storage])
        scales = _mapped(folder / SCALES, _DTYPES["float32"]) if storage == "sq8" else None
        if scales is not None and scales.shape != (2, array.shape[1]):
            raise ArtifactError(f"{folder / SCALES}: shape {scales.shape}, not [2, {array.shape[1]}]; build it again")
        return cls(array, storage, scales)

    @property
    def count(self) -> int:
        """Return the number of vectors."""
        return int(self.array.shape[0])

    @property
    def dimension(self) -> int:
        """Return their width."""
        return int(self.array.shape[1])

    def rows(self, rows: Rows | slice) -> Vectors:
        """Return float32 ``[len(rows), d]``, each entry as it is stored."""
        picked = self.array[rows]
        if self.scales is None:
            return np.asarray(picked, dtype=np.float32)
        least, width = self.scales
        steps = picked.astype(np.float32)
        steps += np.float32(0.5)
        steps *= width / np.float32(_STEPS)
        steps += least
        return steps

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[Vectors]:
        """Yield all rows, ``size`` at a time; the pages of a large mapped file are let go after each block."""
        for start in range(0, self.count, size):
            yield self.rows(slice(start, start + size))
            forget_pages(self.array)

    def dots(self, queries: Vectors, of_query: Rows, rows: Rows) -> Scores:
        """Return float32 ``[len(rows)]``: each row's product with its query, summed in float64 by numpy, row by row.

        Args:
            queries: float32 ``[n, d]``.
            of_query: int64 ``[len(rows)]``, which query each row is multiplied with.
            rows: int64 ``[len(rows)]``.
        """
        scores = np.empty(len(rows), dtype=np.float32)
        for start in range(0, len(rows), _DOT_ROWS):
            part = slice(start, start + _DOT_ROWS)
            products = self.rows(rows[part]).astype(np.float64)
            products *= queries[of_query[part]]
            scores[part] = products.sum(axis=1)
        return scores

    def longest(self) -> float:
        """Return the length of the longest vector."""
        return max(float(np.linalg.norm(block.astype(np.float64), axis=1).max()) for block in self.blocks())

    @cached_property
    def scan(self) -> Any:
        """Return a faiss index over these vectors that copies none of them."""
        if self.storage == "float32":
            index = faiss.IndexFlatIP(self.dimension)
        else:
            kind = faiss.ScalarQuantizer.QT_fp16 if self.storage == "float16" else faiss.ScalarQuantizer.QT_8bit
            index = faiss.IndexScalarQuantizer(self.dimension, kind, faiss.METRIC_INNER_PRODUCT)
            if self.scales is not None:
                faiss.copy_array_to_vector(np.asarray(self.scales).ravel(), index.sq.trained)
            index.is_trained = True
        data = np.asarray(self.array).view(np.uint8).reshape(-1)
        # The owner is that of the empty index, which owns nothing; these bytes belong to self.array.
        index.codes = faiss.MaybeOwnedVectorUInt8.create_view(faiss.swig_ptr(data), data.size, index.codes.owner)
        index.ntotal = self.count
        return index

    def error_bound(self, queries: Vectors, longest: float) -> npt.NDArray[np.float64]:
        """Return, for each query, how far a float32 score can lie from that of :meth:`dots`.

        A sum of d products in float32, in any order, is within ``d * u / (1 - d * u) * |q| * |x|`` of the real one
        (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); two more ``u`` cover the rounding of
        the exact score, and products that underflow are lost whole.

        Args:
            queries: float32 ``[n, d]``.
            longest: Length of the longest stored vector.
        """
        terms = (self.dimension + 2 + (0 if self.scales is None else _DECODING)) * _UNIT_ROUNDOFF
        norms = np.sqrt(np.vecdot(queries, queries, dtype=np.float64))
        # 1.01 also covers the rounding of the norms.
        factor = 1.01 * terms / (1 - terms) * max(longest, self._longest_parts)
        bound: npt.NDArray[np.float64] = factor * norms + self.dimension * _SMALLEST_NORMAL
        return bound

    @cached_property
    def _longest_parts(self) -> float:
        """Return the length of what is decoded before its parts cancel; 0 where nothing is decoded."""
        return 0.0 if self.scales is None else float(np.linalg.norm(np.abs(self.scales).sum(axis=0, dtype=np.float64)))


def width_of(storage: Storage) -> int:
    """Return how many bytes a number takes."""
    return np.dtype(_DTYPES[storage]).itemsize


def write_stored(
    folder: Path, blocks: Callable[[], Iterator[Vectors]], shape: tuple[int, int], storage: Storage
) -> StoredVectors:
    """Write vectors in a storage and open them; memory holds one block.

    Args:
        folder: The version's folder.
        blocks: Streams float32 ``[rows, d]``; called twice for ``sq8``, which must know the range first.
        shape: ``(n, d)`` of all blocks together.
        storage: How they are stored.

    Raises:
        DataError: a number too large for float16.
    """
    scales = None
    if storage == "sq8":
        least, greatest = np.full(shape[1], np.inf, np.float32), np.full(shape[1], -np.inf, np.float32)
        for block in blocks():
            least, greatest = np.minimum(least, block.min(axis=0)), np.maximum(greatest, block.max(axis=0))
        scales = np.stack([least, greatest - least]).astype("<f4")
        with atomic_write(folder / SCALES, "wb") as file:
            np.save(file, scales)
    with atomic_write(folder / VECTORS, "wb") as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(_DTYPES[storage])),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks():
            file.write(np.ascontiguousarray(_encoded(block, storage, scales)).data)
    return StoredVectors.open(folder, storage)


def _encoded(block: Vectors, storage: Storage, scales: Vectors | None) -> npt.NDArray[Any]:
    if scales is not None:
        least, width = scales
        steps = (block - least) / np.where(width > 0, width, 1) * _STEPS
        codes: npt.NDArray[np.uint8] = np.clip(steps, 0, _STEPS).astype(np.uint8)
        return codes
    if storage == "float32":
        return np.asarray(block, dtype="<f4")
    with np.errstate(over="ignore"):
        halves = block.astype("<f2")
    if not np.isfinite(halves).all():
        raise DataError(f"a vector has the entry {np.abs(block).max()}, too large for float16; use storage float32")
    return halves


def _mapped(path: Path, dtype: str) -> npt.NDArray[Any]:
    with sound(path, "cannot map it", ValueError):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 2 or array.dtype != np.dtype(dtype):
        raise ArtifactError(f"{path}: {array.dtype} {array.shape}, not a matrix of {dtype}; build the index again")
    return np.asarray(array)
