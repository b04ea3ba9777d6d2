"""The report: ``report.json`` for machines, ``report.html`` for people, runs and per-query values beside them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Any

from eval.curves import read_curves
from eval.page import render_page
from eval.per_query import write_per_query
from eval.pictures import write_pictures
from eval.results import SystemResult
from eval.significance import compare
from retrieval_kd.artifacts import atomic_write, producers, write_json
from retrieval_kd.errors import DataError
from retrieval_kd.runs import write_trec

FORMAT_VERSION = 1
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
_RUNS, _PER_QUERY, _PLOTS = "runs", "per_query", "plots"
_PLOT = re.compile(r"(quality-(latency|memory)|queries-\d+|training-(loss|dev|agreement-\w+))\.(svg|png)")
_MEASURERS = ("ir-measures", "pytrec-eval-terrier", "scipy")
_ONE_QUERY = "One query is judged: nothing is tested, and an interval of no width does not say how sure a figure is."
# What makes two entries of reports' lists the same one; a note is itself.
_SAME: Mapping[str, tuple[str, ...]] = {
    "systems": ("name",),
    "comparisons": ("system", "baseline", "measure"),
    "agreements": ("student", "teacher"),
    "reference": ("system", "measure", "source"),
    "notes": (),
}
# What every report has, whichever version of ours wrote it; what came later is asked for with a default.
_KEYS: Mapping[str, type | UnionType] = {
    "collection": str,
    "split": str,
    "documents": int | None,
    "measures": list,
    "systems": list,
    "baseline": str | None,
    "comparisons": list,
    "notes": list,
    "training": dict,
    "provenance": dict,
}
_SYSTEM_KEYS: Mapping[str, type | UnionType] = {
    "name": str,
    "role": str,
    "queries": int,
    "intervals": dict,
    "params": int | None,
    **dict.fromkeys(("encode_ms_p50", "query_ms_p50", "query_ms_p95", "bytes_per_doc"), int | float | None),
}


def write_report(
    folder: Path,
    *,
    collection: str,
    split: str,
    systems: Sequence[SystemResult],
    documents: int | None = None,
    baseline: str | None = None,
    training: Mapping[str, Path] | None = None,
    provenance: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    agreements: Sequence[Mapping[str, Any]] = (),
    reference: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Write ``report.json``, ``report.html``, ``plots``, ``runs/<system>.trec`` and ``per_query/<system>.tsv``.

    ``report.json`` comes last, so that a folder with it has everything it speaks of. What an earlier report wrote
    there and this one does not is removed after it, and nothing else.

    Args:
        folder: Where the report goes.
        collection: Name of the collection, distractors included, such as ``"msmarco-12k + scifact"``.
        split: The split whose judgements were used.
        systems: The rows, in the order they are shown; all measured on the same queries.
        documents: Size of the corpus searched.
        baseline: The system every other one is tested against; no tests when None.
        training: Student name to the ``metrics.jsonl`` of its training.
        provenance: What the reader needs to do it again: command, recipe, hashes. Versions and
            hardware are added.
        notes: Sentences shown under the table, such as a teacher weaker than the document encoder.
        agreements: How students agree with their teacher, see :func:`eval.fidelity.agreement_entry`.
        reference: Published figures, see :func:`eval.reference.reference_rows`.
        seed: Seed of the significance tests.

    Returns:
        The content of ``report.json``.

    Raises:
        DataError: no systems, two of one name, systems with different measures or queries, an unknown
            baseline, or an unreadable metrics file.
    """
    _require_comparable(systems)
    measures = list(systems[0].measures)
    slugs = _slugs([system.name for system in systems])
    evaluations = {system.name: system.evaluation for system in systems}
    # One query has no paired test, but its figures are still what was measured.
    alone = systems[0].queries < 2
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "collection": collection,
        "split": split,
        "documents": documents,
        "measures": measures,
        "systems": [system.to_json() for system in systems],
        "baseline": baseline,
        "comparisons": [
            asdict(row)
            for measure in measures
            if baseline and not alone
            for row in compare(evaluations, baseline, measure, seed)
        ],
        "notes": [*notes, *([_ONE_QUERY] if alone else [])],
        "reference": [dict(row) for row in reference],
        "agreements": [dict(entry) for entry in agreements],
        "per_query": {system.name: _rounded(system, measures[0]) for system in systems} if baseline else {},
        "training": {name: read_curves(path) for name, path in (training or {}).items()},
        "provenance": {**(provenance or {}), "versions": versions(), "hardware": hardware()},
    }
    earlier = _files_of_earlier(folder)
    written: set[Path] = set()
    for system in systems:
        slug = slugs[system.name]
        if system.run is not None:
            written.add(folder / _RUNS / f"{slug}.trec")
            write_trec(folder / _RUNS / f"{slug}.trec", system.run, slug)
        written.add(folder / _PER_QUERY / f"{slug}.tsv")
        write_per_query(folder / _PER_QUERY / f"{slug}.tsv", system.evaluation)
    with atomic_write(folder / REPORT_HTML) as file:
        file.write(render_page(report))
    written.update(write_pictures(report, folder / _PLOTS))
    write_json(folder / REPORT_JSON, report)
    # Last, so that a report is whole until the next one is; left there, compare would take them for systems of this.
    for path in earlier - written:
        path.unlink(missing_ok=True)
    return report


def _files_of_earlier(folder: Path) -> set[Path]:
    """Return the files of the report that lies in a folder, as its own ``report.json`` names them; none without it."""
    try:
        report = _read_report(folder)
    except DataError:
        return set()
    slugs = _slugs([system["name"] for system in report["systems"]]).values()
    tables = {
        folder / kind / f"{slug}{end}" for slug in slugs for kind, end in ((_RUNS, ".trec"), (_PER_QUERY, ".tsv"))
    }
    return tables | {path for path in (folder / _PLOTS).glob("*") if _PLOT.fullmatch(path.name)}


def versions() -> dict[str, str]:
    """Return the versions of everything that can change a number of the report."""
    return {**producers(), **{name: importlib.metadata.version(name) for name in _MEASURERS}}


def merge_reports(folders: Sequence[Path]) -> dict[str, Any]:
    """Put the systems of several reports of one collection and split into one.

    A system of the same name and values in more than one report (BM25, say) is taken from the first; where values
    differ, every such row has its folder in its name. Tests stay against the baseline of their own report, corrected
    over the systems that were in it.

    Raises:
        DataError: a folder without a report, or reports of different collections, splits, measures or
            corpus sizes, whose rows may not stand in one table; names the folder.
    """
    reports = [_read_report(folder) for folder in folders]
    for folder, report in zip(folders[1:], reports[1:], strict=True):
        _require_same_evaluation(folders[0], reports[0], folder, report)
    reports = _told_apart(folders, reports)
    lists = {key: _union(reports, key, same) for key, same in _SAME.items()}
    tables = {key: _first_of_each(report.get(key, {}) for report in reports) for key in ("per_query", "training")}
    systems = _first_of_each(report["provenance"].get("systems", {}) for report in reports)
    provenance = {**reports[0]["provenance"], "systems": systems, "reports": [str(folder) for folder in folders]}
    return {**reports[0], **lists, **tables, "provenance": provenance}


def _union(reports: Sequence[Mapping[str, Any]], key: str, same: Sequence[str]) -> list[Any]:
    entries = [entry for report in reports for entry in report.get(key, ())]
    return list(_first_of_each({tuple(entry[part] for part in same) or entry: entry} for entry in entries).values())


def _first_of_each(tables: Iterable[Mapping[Any, Any]]) -> dict[Any, Any]:
    merged: dict[Any, Any] = {}
    for table in tables:
        for key, value in table.items():
            merged.setdefault(key, value)
    return merged


def _require_same_evaluation(one: Path, first: Mapping[str, Any], other: Path, report: Mapping[str, Any]) -> None:
    for key in ("collection", "split", "measures", "documents"):
        if report[key] != first[key]:
            raise DataError(
                f"{other / REPORT_JSON}: {key} is {report[key]!r}, in {one} it is {first[key]!r}; "
                "merge reports of the same evaluation"
            )
    prints = [document["provenance"].get("collection") for document in (first, report)]
    if None not in prints and prints[0] != prints[1]:
        raise DataError(
            f"{other / REPORT_JSON}: collection {report['collection']!r} had other content than in {one} "
            f"(fingerprints {prints[1][:12]} and {prints[0][:12]}); evaluate both on the same files"
        )


def _told_apart(folders: Sequence[Path], reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the reports, systems that share a name and not their values renamed after their folder."""
    values: dict[str, set[tuple[float, ...]]] = {}
    for report in reports:
        for system in report["systems"]:
            values.setdefault(system["name"], set()).add(tuple(system[measure] for measure in report["measures"]))
    differing = [name for name, found in values.items() if len(found) > 1]
    return [
        _with_names(report, {name: f"{name} ({folder})" for name in differing})
        for folder, report in zip(folders, reports, strict=True)
    ]


def _with_names(report: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a report that calls some systems by new names, wherever it speaks of them."""

    def entries(key: str, *fields: str) -> list[dict[str, Any]]:
        return [
            {**entry, **{field: names.get(entry[field], entry[field]) for field in fields}}
            for entry in report.get(key, ())
        ]

    def table(of: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in of.items()}

    provenance = report["provenance"]
    return {
        **report,
        "systems": entries("systems", "name"),
        "comparisons": entries("comparisons", "system", "baseline"),
        "agreements": entries("agreements", "student", "teacher"),
        "baseline": names.get(report["baseline"], report["baseline"]),
        "per_query": table(report.get("per_query", {})),
        "training": table(report["training"]),
        "provenance": {**provenance, "systems": table(provenance.get("systems", {}))},
    }


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT_JSON
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the report ({error}); give a run's folder") from None
    flaw = _flaw(report)
    if flaw:
        raise DataError(f"{path}: not a report this version can read: {flaw}; evaluate again, or give a run's folder")
    return dict(report)


def _flaw(report: object) -> str:
    """Return the first thing that keeps a file's content from being a report; empty when nothing does."""
    if not isinstance(report, dict):
        return "it holds no object"
    version = report.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        return f"format_version is {version!r}, known is {FORMAT_VERSION}"
    if flaw := _wrong_key(report, _KEYS):
        return flaw
    measures, systems = report["measures"], report["systems"]
    if not systems or not measures or not all(isinstance(measure, str) for measure in measures):
        return "it has no systems or no measures"
    for number, row in enumerate(systems, start=1):
        kinds = {**_SYSTEM_KEYS, **dict.fromkeys(measures, int | float)}
        if flaw := _wrong_key(row, kinds) or _wrong_key(row["intervals"], dict.fromkeys(measures, list)):
            return f"in system {number} {flaw}"
    for key, fields in _SAME.items():
        for number, entry in enumerate(report.get(key, ()), start=1):
            if flaw := _wrong_key(entry, dict.fromkeys(fields, str)) if fields else "":
                return f"in {key} {number} {flaw}"
    return ""


def _wrong_key(entry: object, kinds: Mapping[str, type | UnionType]) -> str:
    if not isinstance(entry, dict):
        return "there is no object"
    for key, kind in kinds.items():
        if key not in entry:
            return f"there is no {key!r}"
        if not isinstance(entry[key], kind):
            return f"{key!r} is {entry[key]!r:.40}"
    return ""


def hardware() -> dict[str, Any]:
    """Return what the timings were taken on: processor, cores this process may use, memory, system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found.group(1) if found else platform.processor() or "unknown"


def _rounded(system: SystemResult, measure: str) -> list[float]:
    """Return one measure's values in the order of the queries, as a plot needs them; ``per_query`` has every digit."""
    evaluation = system.evaluation
    order = sorted(range(len(evaluation.query_ids)), key=evaluation.query_ids.__getitem__)
    return [round(float(evaluation.values[measure][row]), 4) for row in order]


def _require_comparable(systems: Sequence[SystemResult]) -> None:
    if not systems:
        raise DataError("a report needs at least one system")
    first = systems[0]
    seen: set[str] = set()
    for system in systems:
        if system.name in seen:
            raise DataError(f"two systems are called {system.name!r}; give each its own name")
        seen.add(system.name)
        if list(system.measures) != list(first.measures):
            raise DataError(
                f"{system.name!r} was measured on {', '.join(system.measures)}, {first.name!r} on "
                f"{', '.join(first.measures)}; measure both alike"
            )
        odd = sorted(set(system.evaluation.query_ids) ^ set(first.evaluation.query_ids))
        if odd:
            raise DataError(
                f"{system.name!r} was measured on {system.queries} queries, {first.name!r} on {first.queries}; "
                f"query {odd[0]!r} is in only one of them: measure both on the same split"
            )


def _slugs(names: Sequence[str]) -> dict[str, str]:
    """Return a file name for each system name, numbered where two would share one."""
    slugs: dict[str, str] = {}
    for name in names:
        slug = stem = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "system"
        number = 1
        while slug in slugs.values():
            number += 1
            slug = f"{stem}-{number}"
        slugs[name] = slug
    return slugs
