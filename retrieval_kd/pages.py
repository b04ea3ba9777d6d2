"""Memory of mapped files: pages that were read once are let go, so that a pass over a file does not hold all of it."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

_RESIDENT_BYTES = 1 << 26


def forget_pages(array: npt.NDArray[Any]) -> None:
    """Let go of the pages read from a large mapped file; the system keeps them cached as long as it likes.

    Nothing is lost: what is read again comes from that cache, or from the file. An array that is not mapped or that may
    be written to, or a file below 64 MiB, stays as it is.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if not isinstance(owner, mmap.mmap) or len(owner) < _RESIDENT_BYTES or not hasattr(mmap, "MADV_DONTNEED"):
        return
    if memoryview(owner).readonly:
        owner.madvise(mmap.MADV_DONTNEED)
