"""Two or more systems query by query: tests, power, and the queries on which they differ most, with their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import formats
from eval.measures import Evaluation
from eval.per_query import read_per_query
from eval.significance import Comparison, compare
from retrieval_kd.collections.base import Collection, split_queries
from retrieval_kd.errors import DataError, did_you_mean
from retrieval_kd.runs import Ranking, Run, read_trec

_PER_QUERY = "per_query"
_RUNS = "runs"
_NOTHING = Ranking((), np.empty(0, dtype=np.float32))


@dataclass(frozen=True)
class Candidate:
    """One system as its report left it.

    Attributes:
        name: The file's name without its ending.
        path: The per-query file.
        evaluation: The values.
        lines: Each query's line in the file.
    """

    name: str
    path: Path
    evaluation: Evaluation
    lines: Mapping[str, int]

    @classmethod
    def read(cls, path: Path) -> Candidate:
        """Read a per-query file.

        Raises:
            DataError: see :func:`eval.per_query.read_per_query`.
        """
        evaluation, lines = read_per_query(path)
        return cls(path.stem, path, evaluation, lines)

    def run(self) -> Run | None:
        """Return the rankings that lie beside the values in a report's folder, None when they do not."""
        path = self.path.resolve().parent.parent / _RUNS / f"{self.path.stem}.trec"
        return read_trec(path) if self.path.resolve().parent.name == _PER_QUERY and path.is_file() else None


def per_query_files(paths: Sequence[Path]) -> list[Path]:
    """Return the per-query files of files and report folders, in the order given."""
    found: list[Path] = []
    for path in paths:
        inside = sorted((path / _PER_QUERY).glob("*.tsv"))
        if path.is_dir() and not inside:
            raise DataError(f"{path}: no {_PER_QUERY}/*.tsv; give a report's folder or per-query files")
        found += inside or [path]
    return found


def compare_files(
    paths: Sequence[Path], measures: Sequence[str] = (), baseline: str = "", seed: int = 0
) -> tuple[list[Candidate], list[Comparison]]:
    """Compare per-query files with a baseline, measure by measure.

    Args:
        paths: Per-query files, or folders of reports.
        measures: Which measures; all that the files share when empty.
        baseline: Name of the baseline's file without ending; the first when empty.
        seed: Seed of bootstrap and randomisation.

    Raises:
        DataError: fewer than two systems, two of one name, a measure that a file lacks, or files of
            different queries; names file, line and query.
    """
    candidates = [Candidate.read(path) for path in per_query_files(paths)]
    names = [candidate.name for candidate in candidates]
    if len(candidates) < 2:
        raise DataError(f"{len(candidates)} system to compare; give at least two per-query files or a report's folder")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two files are called {name}.tsv; rename one, the name is what the table prints")
    first = candidates[0]
    chosen = baseline or first.name
    if chosen not in names:
        raise DataError(f"baseline {chosen!r} is not among the systems{did_you_mean(chosen, names)}")
    for other in candidates[1:]:
        _require_same_queries(first, other)
    shared = [m for m in first.evaluation.values if all(m in other.evaluation.values for other in candidates)]
    for measure in measures:
        if measure not in shared:
            lacking = next(c for c in candidates if measure not in c.evaluation.values)
            hint = did_you_mean(measure, lacking.evaluation.values)
            raise DataError(f"{lacking.path}: no measure {measure!r}{hint}")
    if not shared:
        raise DataError(f"{first.path} and the others share no measure; evaluate them alike")
    evaluations = {candidate.name: candidate.evaluation for candidate in candidates}
    rows = [row for measure in measures or shared for row in compare(evaluations, chosen, measure, seed)]
    return candidates, rows


def _require_same_queries(one: Candidate, other: Candidate) -> None:
    for have, lack in ((one, other), (other, one)):
        missing = next((query_id for query_id in have.lines if query_id not in lack.lines), None)
        if missing is not None:
            raise DataError(
                f"{have.path}:{have.lines[missing]}: query {missing!r} is not in {lack.path} "
                f"({len(have.lines)} and {len(lack.lines)} queries); evaluate both on the same split"
            )


@dataclass(frozen=True)
class Shown:
    """One ranked document of a listing: rank from 1, id, grade (None: not judged), the start of its text."""

    rank: int
    doc_id: str
    grade: int | None
    text: str


@dataclass(frozen=True)
class Case:
    """One query on which two systems differ.

    Attributes:
        query_id: The query.
        query: Its text.
        baseline: The baseline's value.
        system: The other system's value.
        relevant: The judged relevant documents, the best grade first, with their rank in each system.
        tops: System name to its first documents.
    """

    query_id: str
    query: str
    baseline: float
    system: float
    relevant: tuple[tuple[Shown, Mapping[str, int | None]], ...]
    tops: Mapping[str, tuple[Shown, ...]]


def differing_queries(
    baseline: Candidate,
    system: Candidate,
    measure: str,
    collection: Collection,
    split: str,
    count: int,
    depth: int = 3,
    letters: int = 160,
) -> tuple[list[Case], list[Case]]:
    """Return the queries with the largest wins and the largest losses of a system, with texts.

    Args:
        baseline: What the system is compared with.
        system: The system.
        measure: The measure that decides.
        collection: Where texts and judgements are.
        split: The split of the values.
        count: How many wins and how many losses.
        depth: First documents shown of each system, and relevant documents shown.
        letters: Length at which texts are cut.

    Raises:
        DataError: a query of the files that the split does not judge, or a document the collection lacks.
    """
    queries, qrels = split_queries(collection, split), collection.qrels(split)
    for query_id, line in baseline.lines.items():
        if query_id not in queries:
            raise DataError(
                f"{baseline.path}:{line}: query {query_id!r} is not judged in split {split!r} of {collection.name}; "
                "name the collection and split of the report"
            )
    ours, theirs = _by_query(system.evaluation, measure), _by_query(baseline.evaluation, measure)
    order = sorted(ours, key=lambda query_id: (theirs[query_id] - ours[query_id], query_id))
    wins = [query_id for query_id in order[:count] if ours[query_id] > theirs[query_id]]
    losses = [query_id for query_id in order[::-1][:count] if ours[query_id] < theirs[query_id]]
    runs = {candidate.name: candidate.run() or {} for candidate in (baseline, system)}

    def case(query_id: str) -> Case:
        grades = qrels[query_id]
        best = sorted((d for d, grade in grades.items() if grade > 0), key=lambda d: (-grades[d], d))[:depth]
        rankings = {name: run.get(query_id, _NOTHING) for name, run in runs.items()}
        tops = {name: ranking.doc_ids[:depth] for name, ranking in rankings.items()}
        texts = collection.contents({*best, *(doc_id for ids in tops.values() for doc_id in ids)})

        def shown(place: int, doc_id: str) -> Shown:
            return Shown(place, doc_id, grades.get(doc_id), _cut(texts[doc_id], letters))

        return Case(
            query_id,
            queries[query_id],
            theirs[query_id],
            ours[query_id],
            tuple(
                (shown(place, doc_id), {name: _place(ranking, doc_id) for name, ranking in rankings.items()})
                for place, doc_id in enumerate(best, start=1)
            ),
            {name: tuple(shown(place, d) for place, d in enumerate(ids, start=1)) for name, ids in tops.items()},
        )

    return [case(query_id) for query_id in wins], [case(query_id) for query_id in losses]


def format_comparisons(rows: Sequence[Comparison]) -> str:
    """Return the tests as plain text, one table for each measure."""
    from eval.tables import plain_table

    parts = []
    for measure in dict.fromkeys(row.measure for row in rows):
        mine = [row for row in rows if row.measure == measure]
        headings = [
            f"{measure} against {mine[0].baseline}", "difference", "95 % interval", "p (t)", "p (randomisation)",
            "p (Holm)", "effect", "win/tie/loss", "detectable",
        ]  # fmt: skip
        cells = [
            [
                row.system,
                formats.difference(row.difference),
                f"{formats.difference(row.interval[0])} to {formats.difference(row.interval[1])}",
                formats.p_value(row.p_t),
                formats.p_value(row.p_randomisation),
                formats.p_value(row.p_holm),
                formats.difference(row.effect_size),
                f"{row.wins}/{row.ties}/{row.losses}",
                formats.quality(row.detectable),
            ]
            for row in mine
        ]
        parts.append(plain_table(headings, cells))
    queries = rows[0].queries
    parts.append(
        f"{queries:,} paired queries; two-sided paired t-test and randomisation test (10,000 sign flips), Holm over "
        "the systems of a table; effect is the mean difference over its standard deviation; detectable is the smallest "
        "true difference that so many queries show in 80 of 100 cases at 5 %."
    )
    return "\n\n".join(parts)


def format_cases(title: str, cases: Sequence[Case]) -> str:
    """Return a listing of queries for a person to read."""
    lines = [f"{title}: {len(cases)}"]
    for case in cases:
        lines.append(f"\n{case.query_id}  {case.query}   {case.baseline:.3f} -> {case.system:.3f}")
        for document, places in case.relevant:
            where = ", ".join(f"{name} {place or 'not found'}" for name, place in places.items())
            lines.append(f"  relevant ({document.grade}) {document.doc_id}: {document.text}   [{where}]")
        for name, top in case.tops.items():
            lines += [f"  {name} {hit.rank}. {_mark(hit.grade)} {hit.doc_id}: {hit.text}" for hit in top]
    return "\n".join(lines)


def cases_json(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return a listing for a machine."""
    return [asdict(case) for case in cases]


def _by_query(evaluation: Evaluation, measure: str) -> dict[str, float]:
    return dict(zip(evaluation.query_ids, evaluation.values[measure].tolist(), strict=True))


def _place(ranking: Ranking, doc_id: str) -> int | None:
    return ranking.doc_ids.index(doc_id) + 1 if doc_id in ranking.doc_ids else None


def _mark(grade: int | None) -> str:
    return "not judged" if grade is None else f"grade {grade}"


def _cut(text: str, letters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "…"
