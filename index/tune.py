"""Choosing a kind and its search effort by measuring them, with real queries.

Recall is the share of the exact ten best documents that a kind finds, averaged over queries that the query encoder
made. Document vectors would say little: in asymmetric mode queries lie elsewhere, and a document finds at least
itself.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from index import gpu
from index.ids import IDS, write_ids
from index.kinds import GRAPHS, Effort, resolved, write_ann
from index.manifest import IndexContent
from index.probes import evenly_spaced
from index.search import Opened
from index.threads import faiss_threads
from index.vectors import width_of, write_stored
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.errors import DataError
from retrieval_kd.progress import progress, silence
from retrieval_kd.recipes.schema import IndexKind, IndexSpec
from retrieval_kd.runs import Ranking

DEPTH = 10
_QUERIES = 1000
_TIMED = 100
_MOST_NODES = 4096
_MOST_OVERSAMPLE = 200
# Comparing with twenty thousand documents takes a millisecond or two, so below that nothing is worth measuring.
EXACT_BELOW = 20_000
# Below so many documents, which kinds are worth building.
_CANDIDATES: tuple[tuple[float, tuple[IndexKind, ...]], ...] = (
    (500_000, ("exact", "fastscan", "hnsw", "ivf-pq")),
    (5_000_000, ("exact", "fastscan", "hnsw", "ivf-pq", "ivf-rabitq")),
    (math.inf, ("exact", "ivf-pq", "ivf-rabitq")),
)
_SAMPLE = 50_000
_MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """One point of a kind's curve.

    Attributes:
        effort: How hard it looked.
        recall: Share of the exact best ten it found.
        milliseconds: Median time of one query by itself, scoring included.
    """

    effort: Effort
    recall: float
    milliseconds: float


@dataclass(frozen=True)
class Considered:
    """A kind that ``auto`` looked at: built on a sample, or ``exact``, which needs no building.

    Attributes:
        kind: The kind.
        recall: Its recall on the sample.
        milliseconds: What a query over the whole corpus is expected to take; 0 where that was not measured.
        bytes: What the whole version's files are expected to take, but for manifest and probes.
        verdict: ``chosen``, or why not; empty while it may be.
    """

    kind: IndexKind
    recall: float
    milliseconds: float
    bytes: int
    verdict: str


@dataclass(frozen=True)
class Tuning:
    """What was seen while tuning, as it stands in the manifest.

    Attributes:
        target: The recall that was asked for.
        queries: How many queries it is averaged over.
        recall: The recall at the chosen effort.
        curve: Every point that was measured, least effort first.
    """

    target: float
    queries: int
    recall: float
    curve: tuple[Measured, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "depth": DEPTH, "curve": [asdict(point) for point in self.curve], "considered": []}


def tune(opened: Opened, queries: Vectors, target: float) -> tuple[Effort, Tuning]:
    """Find the least effort that reaches a recall, by bisection.

    Args:
        opened: The index.
        queries: float32 ``[n, d]``, as wide as the index stores them; at most a thousand are used.
        target: The recall wanted, in (0, 1].

    Raises:
        DataError: the kind does not reach the target at its hardest.
    """
    spec = opened.content.index
    bench = _Bench(opened, queries[evenly_spaced(len(queries), _QUERIES)])
    effort = Effort.of(spec)
    if spec.kind in GRAPHS:
        most = gpu.most(spec.kind) if spec.kind in gpu.GPU else _MOST_NODES
        knobs = {"ef_search": min(most, opened.content.count)}
    elif spec.lists:
        knobs = {"probes": spec.lists, "oversample": _MOST_OVERSAMPLE}
    else:
        knobs = {} if spec.kind in ("exact", "gpu-exact") else {"oversample": _MOST_OVERSAMPLE}
    effort = replace(effort, **knobs)
    if bench.point(effort).recall < target:
        raise DataError(
            f"index kind {spec.kind} finds {bench.point(effort).recall:.3f} of the exact ten at its hardest, less than "
            f"the {target} asked for; use another kind or storage, or ask for less"
        )
    for knob, most in knobs.items():
        effort = replace(effort, **{knob: _least(bench, effort, knob, most, target)})
    curve = sorted(bench.points, key=lambda point: (point.recall, point.milliseconds))
    return effort, Tuning(target, len(bench.queries), bench.point(effort).recall, tuple(curve))


def exact(spec: IndexSpec, content: IndexContent, beside: int) -> list[Considered]:
    """Return ``exact`` as what ``auto`` may take; it has no file of its own and so takes the least.

    Args:
        spec: What was asked for; its kind is ``auto``.
        content: What the version will hold.
        beside: Bytes of the files that every kind has beside vectors and codes.

    Raises:
        DataError: it takes more than the memory limit.
    """
    size = beside + content.count * content.dimension * width_of(spec.storage)
    if verdict := _too_large(spec, size):
        raise DataError(
            f"index kind auto: exact, the smallest kind, {verdict}; allow more memory, or ask for storage float16 or "
            "sq8, a smaller dimension or fewer fields"
        )
    return [Considered("exact", 1.0, 0.0, size, "")]


def choose(spec: IndexSpec, content: IndexContent, vectors: Vectors, queries: Vectors, beside: int) -> list[Considered]:
    """Return what ``auto`` may take for so many documents, each kind measured on a sample of them.

    Args:
        spec: What was asked for; its kind is ``auto``.
        content: What the version will hold.
        vectors: float32 ``[n, d]``, evenly spaced documents, or all of them, as wide as the index stores them.
        queries: float32 ``[m, d]``, by the query encoder, as wide.
        beside: Bytes of the files that every kind has beside vectors and codes.

    Returns:
        The kinds; those that reach the target within the memory limit have no verdict.
    """
    kinds = next(kinds for below, kinds in _CANDIDATES if content.count < below)
    considered = []
    with progress("try index kinds", len(kinds), "kinds") as advance, silence():
        for kind in kinds:
            considered.append(_tried(replace(spec, kind=kind), content, vectors, queries, beside))
            advance(1)
    return considered


def decide(considered: Sequence[Considered], works: Callable[[IndexKind], IndexContent]) -> IndexContent:
    """Return what the fastest kind makes of it that also does over all documents what it did over a sample.

    Args:
        considered: What may be taken.
        works: Builds a kind; raises DataError where it does not reach the target after all.

    Raises:
        DataError: no kind will do; says why for each.
    """
    verdicts = {one.kind: one.verdict for one in considered}
    for one in sorted(considered, key=lambda one: one.milliseconds):
        if verdicts[one.kind]:
            continue
        try:
            made = works(one.kind)
        except DataError as error:
            verdicts[one.kind] = str(error)
            continue
        verdicts = {kind: verdict or "slower" for kind, verdict in verdicts.items()} | {one.kind: "chosen"}
        seen = [asdict(replace(one, verdict=verdicts[one.kind])) for one in considered]
        return replace(made, tuning={**made.tuning, "considered": seen})
    said = "; ".join(f"{kind}: {verdict}" for kind, verdict in verdicts.items())
    raise DataError(f"index kind auto: no kind will do ({said}); ask for less recall or allow more memory")


def sampled(count: int) -> npt.NDArray[np.int64]:
    """Return the rows that :func:`choose` is to see."""
    return evenly_spaced(count, _SAMPLE)


def _tried(spec: IndexSpec, content: IndexContent, vectors: Vectors, queries: Vectors, beside: int) -> Considered:
    """Build a kind over a sample, tune it, and say what it would cost over the whole corpus."""
    count, dimension = vectors.shape
    with tempfile.TemporaryDirectory(prefix="rkd-index-") as scratch:
        folder = Path(scratch)
        write_ids(folder / IDS, [f"{row:010d}" for row in range(count)])
        stored = write_stored(folder, lambda: iter([vectors]), (count, dimension), spec.storage)
        index = resolved(spec, count, dimension)
        write_ann(folder, stored, index)
        sample = replace(content, index=index, count=count, largest_norm=stored.longest(), fields={})
        own = sum(path.stat().st_size for path in folder.iterdir() if path.name != IDS)
        size = beside + own * content.count // count
        try:
            effort, tuning = tune(Opened(folder, sample), queries, spec.target_recall)
        except DataError as error:
            return Considered(spec.kind, 0.0, 0.0, size, str(error))
        spent = next(point.milliseconds for point in tuning.curve if point.effort == effort)
    expected = spent * _growth(spec.kind, content.count, count)
    return Considered(spec.kind, tuning.recall, expected, size, _too_large(spec, size))


def _too_large(spec: IndexSpec, size: int) -> str:
    if not spec.memory_mib or size <= spec.memory_mib * _MIB:
        return ""
    return f"takes {math.ceil(size / _MIB)} MiB, more than {spec.memory_mib}"


def _growth(kind: str, count: int, sample: int) -> float:
    """Return how much longer a query takes over ``count`` documents than over ``sample``."""
    if kind.startswith("hnsw"):
        return math.log(count) / math.log(sample)
    return count / sample if kind in ("exact", "fastscan") else math.sqrt(count / sample)


class _Bench:
    """Measures an index at one effort after another, each once."""

    def __init__(self, opened: Opened, queries: Vectors) -> None:
        self.queries = queries
        self._opened = opened
        self._measured: dict[Effort, Measured] = {}
        self._expected = [set(ranking.doc_ids) for ranking in self._search(queries, True, Effort(1, 1, 1))]

    @property
    def points(self) -> list[Measured]:
        return list(self._measured.values())

    def point(self, effort: Effort) -> Measured:
        if effort not in self._measured:
            rankings = self._search(self.queries, False, effort)
            found = sum(len(best.intersection(r.doc_ids)) for best, r in zip(self._expected, rankings, strict=True))
            recall = found / sum(map(len, self._expected))
            self._measured[effort] = Measured(effort, recall, self._milliseconds(effort))
        return self._measured[effort]

    def _milliseconds(self, effort: Effort) -> float:
        spent = []
        for query in self.queries[:_TIMED]:
            started = time.perf_counter()
            self._search(query[None], False, effort)
            spent.append(time.perf_counter() - started)
        return 1000 * statistics.median(spent)

    def _search(self, queries: Vectors, exact: bool, effort: Effort) -> list[Ranking]:
        with faiss_threads(1):
            best = self._opened.search(queries, DEPTH, exact, None, effort)
        return [scored.ranked(DEPTH) for scored in best]


def _least(bench: _Bench, effort: Effort, knob: str, most: int, target: float) -> int:
    """Return the least value of a knob that reaches the target, given that the most does."""
    enough, too_little = most, 0
    while enough - too_little > 1:
        # Kinds need a small part of the most, so the steps are those of the logarithm.
        middle = min(enough - 1, max(too_little + 1, round(math.sqrt(max(1, too_little) * enough))))
        if bench.point(replace(effort, **{knob: middle})).recall >= target:
            enough = middle
        else:
            too_little = middle
    return enough
