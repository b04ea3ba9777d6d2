"""The report: ``report.json`` for machines, ``report.html`` for people, runs and per-query values beside them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
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
_MEASURERS = ("ir-measures", "pytrec-eval-terrier", "scipy")


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

    ``report.json`` comes last, so that a folder with it has everything it speaks of.

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
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "collection": collection,
        "split": split,
        "documents": documents,
        "measures": measures,
        "systems": [system.to_json() for system in systems],
        "baseline": baseline,
        "comparisons": [
            asdict(row) for measure in measures if baseline for row in compare(evaluations, baseline, measure, seed)
        ],
        "notes": list(notes),
        "reference": [dict(row) for row in reference],
        "agreements": [dict(entry) for entry in agreements],
        "per_query": {system.name: _rounded(system, measures[0]) for system in systems} if baseline else {},
        "training": {name: read_curves(path) for name, path in (training or {}).items()},
        "provenance": {**(provenance or {}), "versions": versions(), "hardware": hardware()},
    }
    for system in systems:
        slug = slugs[system.name]
        if system.run is not None:
            write_trec(folder / "runs" / f"{slug}.trec", system.run, slug)
        write_per_query(folder / "per_query" / f"{slug}.tsv", system.evaluation)
    with atomic_write(folder / REPORT_HTML) as file:
        file.write(render_page(report))
    write_pictures(report, folder / "plots")
    write_json(folder / REPORT_JSON, report)
    return report


def versions() -> dict[str, str]:
    """Return the versions of everything that can change a number of the report."""
    return {**producers(), **{name: importlib.metadata.version(name) for name in _MEASURERS}}


def merge_reports(folders: Sequence[Path]) -> dict[str, Any]:
    """Put the systems of several reports of one collection and split into one.

    A system that stands in more than one report (BM25, say) is taken from the first.

    Raises:
        DataError: a folder without a report, or reports of different collections, splits, measures or
            corpus sizes, whose rows may not stand in one table; names the folder.
    """
    merged: dict[str, Any] = {}
    for folder in folders:
        report = _read_report(folder)
        if not merged:
            merged = {**report, "notes": list(report["notes"]), "systems": list(report["systems"])}
            continue
        for key in ("collection", "split", "measures", "documents"):
            if report[key] != merged[key]:
                raise DataError(
                    f"{folder / REPORT_JSON}: {key} is {report[key]!r}, in {folders[0]} it is {merged[key]!r}; "
                    "merge reports of the same evaluation"
                )
        known = {system["name"] for system in merged["systems"]}
        merged["systems"].extend(system for system in report["systems"] if system["name"] not in known)
        merged["notes"].extend(note for note in report["notes"] if note not in merged["notes"])
    return merged


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((folder / REPORT_JSON).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{folder / REPORT_JSON}: cannot read the report ({error}); give a run's folder") from None
    return report


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
