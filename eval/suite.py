"""Several systems on several collections: each is opened, run and measured once; then the mean over the sets."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.dense import DenseSystem
from eval.fidelity import agreement_entry, cosines, fidelity, require_retrieval
from eval.measures import require_measurable
from eval.opening import Component, Opener
from eval.page import render_summary
from eval.reference import reference_means, reference_rows
from eval.report import write_report
from eval.results import SystemResult
from eval.shape import Passages, Shape
from eval.significance import compare
from eval.specs import SystemSpec, in_order, require_rerank_depth
from eval.systems import System, judge
from retrieval_kd.artifacts import atomic_write, write_json
from retrieval_kd.collections import beir, msmarco
from retrieval_kd.collections.base import Collection, split_queries
from retrieval_kd.collections.irds import PREFIX
from retrieval_kd.collections.open import open_collection
from retrieval_kd.errors import DataError, did_you_mean
from retrieval_kd.recipes.schema import CollectionSpec
from retrieval_kd.runs import write_qrels

SUMMARY_JSON = "summary.json"
SUMMARY_HTML = "summary.html"
QRELS_TXT = "qrels.txt"


@dataclass(frozen=True)
class Setup:
    """How every system of a suite is measured.

    Attributes:
        split: The split whose judgements count.
        measures: ir_measures names.
        depth: Documents retrieved for each query.
        distractors: Collections whose documents join each corpus without judgements; one that is itself
            measured does not join itself.
        remove_self: Drop the document with the query's id; None does so for ArguAna and Quora.
        maxp: Search passages and rank documents by the best.
        timed: Queries timed on each system; 0 times none.
        seed: Seed of intervals and tests.
        baseline: Reference of the system the others are tested against; the first when empty.
        reference: Show published figures of the same collection and split beside the measured ones.
        teacher: Reference of the system whose rankings the others should give; none when empty.
        max_loss: With a teacher, the largest loss of the first measure that passes; anything passes when None.
    """

    split: str = "test"
    measures: tuple[str, ...] = ("nDCG@10", "RR@10", "R@100")
    depth: int = 100
    distractors: tuple[str, ...] = ()
    remove_self: bool | None = None
    maxp: bool = False
    timed: int = 100
    seed: int = 0
    baseline: str = ""
    reference: bool = False
    teacher: str = ""
    max_loss: float | None = None


@dataclass(frozen=True)
class Set:
    """One collection of a suite and the set it is averaged into: CQADupStack's twelve are one set."""

    path: str
    group: str


def expand(path: str) -> list[Set]:
    """Return the collections of a path: itself, or those of a folder of collections such as ``cqadupstack``."""
    folder = Path(path)
    if path.startswith(PREFIX):
        return _expand_irds(path)
    # An empty path, as of an unset variable, is not the current folder: opening it says so.
    if (
        not path.strip()
        or not folder.is_dir()
        or any((folder / name).is_file() for name in (beir.CORPUS, *msmarco.CORPORA))
    ):
        return [Set(path, "")]
    parts = sorted(part for part in folder.iterdir() if (part / beir.CORPUS).is_file())
    return [Set(str(part), folder.resolve().name) for part in parts] or [Set(path, "")]


def _expand_irds(path: str) -> list[Set]:
    try:
        from ir_datasets import registry
    except ImportError:
        return [Set(path, "")]
    dataset = path.removeprefix(PREFIX)
    if dataset in registry:
        return [Set(path, "")]
    depth = dataset.count("/") + 1
    parts = sorted(name for name in registry if name.startswith(f"{dataset}/") and name.count("/") == depth)
    return [Set(PREFIX + part, path) for part in parts] or [Set(path, "")]


def joined(path: str, distractors: Sequence[str]) -> Collection:
    """Open a collection with its distractors; one that is the collection itself does not join it.

    Raises:
        DataError: see :func:`retrieval_kd.collections.open.open_collection`.
    """
    others = tuple(other for other in distractors if not _same(other, path))
    return open_collection(CollectionSpec(path, others))


def run_suite(
    collections: Sequence[str],
    specs: Sequence[SystemSpec],
    setup: Setup,
    cache: Path,
    out: Path,
    command: str,
    announce: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure every system on every collection and write a report for each.

    One collection's report lies in ``out`` itself; of several, each has a folder there, and
    ``summary.json`` has the mean over the sets. ``qrels.txt`` and the runs are what trec_eval reads.

    Args:
        collections: Folders, ``irds:`` ids, or folders of collections.
        specs: The systems.
        setup: How they are measured.
        cache: Where vectors and scores are kept.
        out: Where the reports go.
        command: What is recorded as the way to do it again.
        announce: Told what is being done.

    Returns:
        The content of each ``report.json``.

    Raises:
        RkdError: whatever is wrong with a collection, a system or a measure, before anything slow where
            that can be known.
    """
    require_measurable(setup.measures, setup.depth)
    if not specs:
        raise DataError(
            "no system to measure; name --system (see --help), --bm25, --index, --rerank, --server or --run"
        )
    ordered = in_order(specs)
    _require_roles(ordered, setup)
    sets = [part for path in collections for part in expand(path)]
    folders = _folders([part.path for part in sets])
    if len(sets) > 1:
        _require_told_apart(sets, [joined(part.path, setup.distractors).name for part in sets], folders)
    reports: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        opener = Opener(cache, stack)
        for part, folder in zip(sets, folders, strict=True):
            collection = joined(part.path, setup.distractors)
            where = out if len(sets) == 1 else out / folder
            report = _measure(collection, ordered, setup, opener, where, command, announce)
            reports.append({**report, "group": part.group})
    if len(sets) > 1:
        summary = summarise(reports, setup.reference)
        names = [str(report["collection"]) for report in reports]
        with atomic_write(out / SUMMARY_HTML) as file:
            file.write(render_summary(summary, dict(zip(names, folders, strict=True))))
        write_json(out / SUMMARY_JSON, summary)
    return reports


def summarise(reports: Sequence[Mapping[str, Any]], reference: bool = False) -> dict[str, Any]:
    """Return each system's means on each set and over the sets, with the list of sets that was averaged.

    The collections of a group (CQADupStack) are averaged into one set first. A mean over sets weighs
    them alike, whatever their number of queries.

    Args:
        reports: The content of each ``report.json``, and the group it belongs to.
        reference: Put published figures beside the measured ones.

    Raises:
        DataError: the reports do not have the same systems and measures.
    """
    measures = list(reports[0]["measures"])
    names = [system["name"] for system in reports[0]["systems"]]
    for report in reports:
        if [system["name"] for system in report["systems"]] != names or list(report["measures"]) != measures:
            raise DataError(
                f"{report['collection']}: other systems or measures than {reports[0]['collection']}; "
                "a mean over sets needs the same everywhere: give each system a name, as in NAME=model:FOLDER"
            )
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        groups.setdefault(report.get("group") or report["collection"], []).append(report)
    rows = []
    for position, name in enumerate(names):
        values = {
            group: {measure: _mean([part["systems"][position][measure] for part in parts]) for measure in measures}
            for group, parts in groups.items()
        }
        mean = {measure: _mean([value[measure] for value in values.values()]) for measure in measures}
        rows.append({"name": name, "role": reports[0]["systems"][position]["role"], "sets": values, "mean": mean})
    return {
        "split": reports[0]["split"],
        "measures": measures,
        "sets": [
            {
                "name": group,
                "collections": [part["collection"] for part in parts],
                "queries": sum(part["systems"][0]["queries"] for part in parts),
            }
            for group, parts in groups.items()
        ],
        "systems": rows,
        "reference": reference_means(reports) if reference else [],
    }


def _measure(
    collection: Collection,
    specs: Sequence[SystemSpec],
    setup: Setup,
    opener: Opener,
    out: Path,
    command: str,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    queries, qrels = split_queries(collection, setup.split), collection.qrels(setup.split)
    shape = Shape.of(collection, setup.remove_self, setup.maxp)
    searched: Collection = Passages(collection) if setup.maxp else collection
    if setup.max_loss is not None and len(qrels) < 2:
        raise DataError(
            f"{collection.name}: split {setup.split!r} judges one query, --max-loss needs at least two; "
            "give a larger split, or leave it out"
        )
    components: dict[str, Component] = {}
    systems: dict[str, System] = {}
    results: list[SystemResult] = []
    depth = shape.search_depth(setup.depth)
    for spec in specs:
        require_rerank_depth(spec, depth)
        announce(f"{collection.name}: {spec}")
        system = opener.open(spec, searched, collection, qrels, components)
        run = system.run(queries, depth)
        measured = shape(run, setup.depth)
        components[spec.reference] = Component(system.name, run, measured)
        systems[spec.reference] = system
        results.append(judge(system, measured, queries, qrels, setup.measures, setup.depth, setup.seed, setup.timed))
    names = {spec.reference: result.name for spec, result in zip(specs, results, strict=True)}
    baseline = names.get(setup.baseline or setup.teacher, results[0].name) if len(results) > 1 else None
    written = write_report(
        out,
        collection=collection.name,
        split=setup.split,
        systems=results,
        documents=sum(1 for _ in collection.documents()),
        baseline=baseline,
        provenance={
            "command": command,
            "collection": collection.fingerprint,
            "systems": {
                result.name: f"{spec} {opener.identities.get(str(spec), '')}".strip()
                for spec, result in zip(specs, results, strict=True)
            },
        },
        notes=shape.notes,
        reference=reference_rows(collection.name, setup.split, setup.measures) if setup.reference else (),
        agreements=_agreements(systems, components, setup.teacher, queries) if setup.teacher else (),
        seed=setup.seed,
    )
    write_qrels(out / QRELS_TXT, qrels)
    if setup.teacher and setup.max_loss is not None:
        evaluations = {result.name: result.evaluation for result in results}
        for comparison in compare(evaluations, names[setup.teacher], setup.measures[0], setup.seed):
            require_retrieval(comparison, setup.max_loss)
    return written


def _require_roles(specs: Sequence[SystemSpec], setup: Setup) -> None:
    """Refuse a baseline or teacher that is no system, and a gate that nothing would have to pass."""
    known = [spec.reference for spec in specs]
    for role, reference in (("baseline", setup.baseline), ("teacher", setup.teacher)):
        if reference and reference not in known:
            raise DataError(f"{role} {reference!r} is not among the systems{did_you_mean(reference, known)}")
    if setup.max_loss is None:
        return
    if not setup.teacher:
        raise DataError(f"--max-loss {setup.max_loss:g}: a loss is against a teacher; name it with --teacher")
    if len(known) < 2:
        raise DataError(
            f"--max-loss {setup.max_loss:g}: teacher {setup.teacher!r} is the only system; name those it teaches too"
        )


def _require_told_apart(sets: Sequence[Set], names: Sequence[str], folders: Sequence[str]) -> None:
    """Refuse collections that would be averaged as one, have one name in the summary, or be written over each other."""
    for (one, name, folder), (other, other_name, other_folder) in itertools.combinations(
        zip(sets, names, folders, strict=True), 2
    ):
        together = one.group and other.group and Path(one.path).parent == Path(other.path).parent
        as_one = not together and (one.group or name) == (other.group or other_name)
        if as_one or name == other_name or folder == other_folder:
            raise DataError(
                f"{one.path} and {other.path}: a summary could not tell them apart; give each once and rename a "
                "folder, or measure one at a time"
            )


def _agreements(
    systems: Mapping[str, System], components: Mapping[str, Component], teacher: str, queries: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Compare every system's rankings, and vectors where they share a space, with the teacher's."""
    original, wanted = systems[teacher], components[teacher]
    entries = []
    for reference, component in components.items():
        if reference == teacher:
            continue
        near, copy = None, systems[reference]
        if isinstance(original, DenseSystem) and isinstance(copy, DenseSystem):
            cards = original.encoder.card, copy.encoder.card
            if cards[0].space_fingerprint == cards[1].space_fingerprint:
                texts = list(queries.values())
                near = cosines(copy.encoder.encode(texts, "query"), original.encoder.encode(texts, "query"))
        agreement = fidelity(component.shaped, wanted.shaped)
        entries.append(agreement_entry(component.name, wanted.name, agreement, near))
    return entries


def _folders(paths: Sequence[str]) -> list[str]:
    """Return a folder name for each collection, longer where two would share one."""
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", path.removeprefix(PREFIX)).strip("-.") for path in paths]
    short = [Path(path).name for path in paths]
    return [a if short.count(a) == 1 else b for a, b in zip(short, names, strict=True)]


def _same(one: str, other: str) -> bool:
    return one == other or (
        Path(one).exists() and Path(other).exists() and Path(one).resolve() == Path(other).resolve()
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
