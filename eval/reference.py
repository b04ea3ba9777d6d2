"""Published figures beside measured ones, each with its source and only for the very same collection and split."""

from __future__ import annotations

import functools
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_HEADER = ["collection", "split", "measure", "system", "value", "source", "note"]
# Other names of the same judged collection; a corpus with distractors, or a part of one, is not among them.
_ALIASES = {
    "climatefever": "climate-fever",
    "dbpedia-entity": "dbpedia",
    "fiqa2018": "fiqa",
    "msmarco-passage-dev": "msmarco-passage",
    "touche": "touche2020",
    "treccovid": "trec-covid",
    "webis-touche2020": "touche2020",
    "irds:beir/dbpedia-entity/test": "dbpedia",
    "irds:beir/webis-touche2020/v2": "touche2020",
    "irds:beir/cqadupstack": "cqadupstack",
    **{f"irds:beir/{name}": name for name in ("arguana", "climate-fever", "nq", "scidocs", "trec-covid")},
    **{
        f"irds:beir/{name}{part}": name
        for name in ("fever", "fiqa", "hotpotqa", "nfcorpus", "quora", "scifact")
        for part in ("", "/test")
    },
}

# A published figure of a group is the mean over all of these and of nothing else.
_GROUPS = {
    "cqadupstack": frozenset(
        {
            "android", "english", "gaming", "gis", "mathematica", "physics",
            "programmers", "stats", "tex", "unix", "webmasters", "wordpress",
        }
    )
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        collection: Lower-case name of the collection.
        split: The split.
        measure: ir_measures name.
        system: The system, its variant named.
        value: The figure.
        source: Where it stands.
        note: What differs from a plain evaluation, often empty.
    """

    collection: str
    split: str
    measure: str
    system: str
    value: float
    source: str
    note: str


@functools.cache
def published() -> tuple[Published, ...]:
    """Return every published figure that is shipped."""
    text = importlib.resources.files("eval").joinpath("data/reference.tsv").read_text(encoding="utf-8")
    header, *rows = (line.split("\t") for line in text.splitlines())
    assert header == _HEADER
    return tuple(
        Published(collection, split, measure, system, float(value), source, note)
        for collection, split, measure, system, value, source, note in rows
    )


def reference_rows(collection: str, split: str, measures: Sequence[str]) -> list[dict[str, Any]]:
    """Return the published figures of a collection, split and measures, as ``report.json`` has them."""
    name = collection.casefold()
    name = _ALIASES.get(name, name)
    found = [p for p in published() if (p.collection, p.split) == (name, split) and p.measure in measures]
    return [asdict(row) for row in sorted(found, key=lambda p: (measures.index(p.measure), -p.value, p.system))]


def group_rows(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the published figures of a group, such as CQADupStack, from the reports on its collections.

    There are none unless every collection of the group is there, without distractors.
    """
    first = reports[0]
    group = str(first["group"]).casefold()
    name = _ALIASES.get(group, group)
    members = frozenset(str(report["collection"]).casefold().rpartition("/")[2] for report in reports)
    return reference_rows(name, first["split"], first["measures"]) if members == _GROUPS.get(name) else []


def reference_means(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each published system's figures over several reports' sets.

    A mean is given only where a system has a figure for every set: a mean over fewer sets is another
    number, and the difference between set lists is larger than most differences between systems.
    """
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        sets.setdefault(_set_name(report), []).append(report)
    by_system: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for name, parts in sets.items():
        for row in group_rows(parts) if parts[0].get("group") else parts[0].get("reference", ()):
            values = by_system.setdefault((row["system"], row["source"]), {})
            values.setdefault(row["measure"], {})[name] = row["value"]
    rows = []
    for (system, source), measures in by_system.items():
        means = {
            measure: math.fsum(values.values()) / len(sets) if set(values) == set(sets) else None
            for measure, values in measures.items()
        }
        rows.append({"system": system, "source": source, "sets": measures, "mean": means})
    return rows


def _set_name(report: Mapping[str, Any]) -> str:
    return str(report.get("group") or report["collection"])
