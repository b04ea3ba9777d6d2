"""How many threads one faiss call may use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import faiss


@contextlib.contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """Let faiss use ``count`` OpenMP threads within the block, and the calling thread what it had after it.

    OpenMP keeps the number for each calling thread, and torch may share faiss's OpenMP: left behind, it
    would change how torch sums, and so the loss curve of a training run that searched before.
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
