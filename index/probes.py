"""Stored queries with their answers: does this machine's library find in a version what its builder found?

The sha256 of the manifest says that the bytes are right; the probes say that they are still understood, after a
new release of a library or on another processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from index.files import sound
from retrieval_kd.artifacts import atomic_write
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.runs import Scores

PROBES = "probes.npz"
PROBE_COUNT = 64
PROBE_DEPTH = 10


@dataclass(frozen=True)
class Probes:
    """Queries and the documents they are to find.

    Attributes:
        queries: float32 ``[n, d]``, as wide as the query encoder makes them.
        rows: int64 ``[n, depth]``, best first.
        scores: float32 ``[n, depth]``.
    """

    queries: Vectors
    rows: npt.NDArray[np.int64]
    scores: Scores

    def save(self, folder: Path) -> None:
        """Write ``probes.npz`` into a version's folder."""
        with atomic_write(folder / PROBES, "wb") as file:
            np.savez(file, queries=self.queries, rows=self.rows, scores=self.scores)

    @classmethod
    def load(cls, folder: Path) -> Probes:
        """Read ``probes.npz`` from a version's folder.

        Raises:
            ArtifactError: the file is missing or not what was written.
        """
        path = folder / PROBES
        with sound(path, "not a file of probes", ValueError, KeyError), np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["queries"], arrays["rows"], arrays["scores"])


def evenly_spaced(count: int, wanted: int) -> npt.NDArray[np.int64]:
    """Return up to ``wanted`` positions spread over ``count``."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))
