"""Anserini's own BM25 by pyserini, where Python 3.12 and Java 21 are at hand."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.latency import latency
from eval.results import Facts
from eval.shape import Shape
from eval.systems import require_known
from retrieval_kd.collections.base import Collection
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Ranking, Run, rank

_PYTHON = (3, 12)
_JAVA = 21


class LuceneSystem:
    """BM25 over a Lucene index: a folder, or the name of one of pyserini's prebuilt indexes."""

    role = "bm25"

    def __init__(
        self, index: str, documents: Collection, k1: float = 0.9, b: float = 0.4, passages: bool = False
    ) -> None:
        """Open an index.

        Args:
            index: A folder, or a prebuilt index's name.
            documents: The collection that every result must be of.
            k1: BM25's saturation.
            b: BM25's normalisation by length.
            passages: Whether results may be passages ``document#number``, as of Anserini's segmented indexes.

        Raises:
            DataError: pyserini cannot run here (says what is missing), or there is no such index.
        """
        require_pyserini()
        from pyserini.search.lucene import LuceneSearcher

        folder = Path(index).is_dir()
        self._searcher: Any = LuceneSearcher(index) if folder else LuceneSearcher.from_prebuilt_index(index)
        if self._searcher is None:
            raise DataError(f"pyserini: {index!r} is neither a folder nor a prebuilt index")
        self._searcher.set_bm25(k1, b)
        self.name = f"BM25 (Anserini, {index}, k1 {k1:g}, b {b:g})"
        self._documents = documents
        self._passages = passages

    def run(self, queries: Mapping[str, str], depth: int) -> Run:
        """Search with as many threads as pyserini takes."""
        found = self._searcher.batch_search(list(queries.values()), list(queries), k=depth, threads=1)
        run = {query_id: _ranking(hits) for query_id, hits in found.items()}
        # A single query is a timed one: its whole run was checked before.
        if len(queries) > 1:
            require_known(f"index {self.name!r}", Shape(maxp=self._passages)(run, depth), self._documents)
        return run

    def facts(self, queries: Mapping[str, str], depth: int) -> Facts:
        """Time single queries, Java's share included."""
        whole = latency(lambda text: self._searcher.search(text, k=depth), list(queries.values()))
        return Facts(query_ms_p50=whole.p50_ms, query_ms_p95=whole.p95_ms)


def require_pyserini() -> None:
    """Say what pyserini lacks here.

    Raises:
        DataError: Python is older than 3.12, there is no Java 21, or pyserini is not installed.
    """
    python = ".".join(map(str, sys.version_info[:2]))
    if sys.version_info[:2] < _PYTHON:
        raise DataError(f"pyserini needs Python 3.12 and Java 21, this is Python {python}; use bm25, or another Python")
    java = java_version()
    if java is None or java < _JAVA:
        have = "no Java" if java is None else f"Java {java}"
        raise DataError(f"pyserini needs Java 21, here is {have}; install a JDK 21 and put it on PATH, or use bm25")
    if importlib.util.find_spec("pyserini") is None:
        raise DataError("pyserini is not installed; pip install 'retrieval-kd[pyserini]', or use bm25")


def java_version() -> int | None:
    """Return the major version of the Java on PATH, None when there is none."""
    try:
        said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    except OSError:
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(found.group(1)) if found else None


def _ranking(hits: Any) -> Ranking:
    return rank([hit.docid for hit in hits], [hit.score for hit in hits])
