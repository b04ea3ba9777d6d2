"""The table of systems for a terminal and for a README, from a report's JSON."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval import formats
from eval.reproduce import Outcome
from eval.results import SystemResult

Report = Mapping[str, Any]
_NO_FOLDING = 1000
_LATEX = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "–": "--", "±": r"$\pm$"}


def format_report(report: Report) -> str:
    """Return a report as plain text: the table, what was averaged, and the notes."""
    notes = "".join(f"\n- {note}" for note in report["notes"])
    parts = [f"{_table(report['systems'], report['measures'])}\n{caption(report)}{notes}"]
    agreements = report.get("agreements", ())
    teachers = dict.fromkeys(entry["teacher"] for entry in agreements)
    parts += [_agreements([entry for entry in agreements if entry["teacher"] == teacher]) for teacher in teachers]
    if report.get("reference"):
        rows = [[row["system"], row["measure"], f"{row['value']:.4g}", row["source"]] for row in report["reference"]]
        parts.append(plain_table(["published, not measured here", "measure", "figure", "source"], rows))
    return "\n\n".join(parts)


def _agreements(entries: Sequence[Report]) -> str:
    headings = [
        f"against {entries[0]['teacher']}", "same first", f"overlap@{entries[0]['depth']}", "Kendall tau",
        "correlation", "divergence", "cosine p1", "cosine p50",
    ]  # fmt: skip
    rows = [
        [
            entry["student"],
            *(formats.quality(entry[key]) for key in ("top1", "overlap", "kendall_tau", "correlation", "divergence")),
            *(formats.quality(entry["cosines"][key]) if entry["cosines"] else "–" for key in ("p1", "p50")),
        ]
        for entry in entries
    ]
    return plain_table(headings, rows)


def format_table(systems: Sequence[SystemResult]) -> str:
    """Return the systems as a plain-text table: means with half the width of their 95 % interval, then cost."""
    return _table([system.to_json() for system in systems], list(systems[0].measures) if systems else [])


def _table(rows: Sequence[Report], measures: Sequence[str]) -> str:
    return plain_table(
        ["system", *_headings(measures)],
        [[row["name"], *(_plus_minus(row, measure) for measure in measures), *_costs(row)] for row in rows],
    )


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under headings as plain text, the first column to the left, without folding."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A fixed width and no colour: the same text in a terminal, a log file and a test.
    console = Console(
        file=io.StringIO(),
        width=_NO_FOLDING,
        color_system=None,
        force_terminal=False,
        legacy_windows=False,
        # A system may be called bm25[k1=0.9], :dog: or [/b].
        markup=False,
        emoji=False,
    )
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def markdown_table(report: Report) -> str:
    """Return the systems of a ``report.json`` as a Markdown table, with a line that says what was averaged."""
    measures = report["measures"]
    headings = _headings(measures)
    lines = [
        f"| system | {' | '.join(headings)} |",
        f"|---|{'---:|' * len(headings)}",
        *(
            f"| {' | '.join([_escaped(row['name']), *(_with_interval(row, m) for m in measures), *_costs(row)])} |"
            for row in report["systems"]
        ),
        "",
        caption(report),
    ]
    return "\n".join(lines)


def csv_table(report: Report) -> str:
    """Return the systems as CSV with full digits: mean, interval and cost of each, one system a line."""
    import csv

    measures = report["measures"]
    columns = ["params", "encode_ms_p50", "query_ms_p50", "query_ms_p95", "bytes_per_doc"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    bounds = [heading for measure in measures for heading in (measure, f"{measure} low", f"{measure} high")]
    writer.writerow(["collection", "split", "queries", "system", "role", *bounds, *columns])
    for row in report["systems"]:
        values = [value for measure in measures for value in (row[measure], *row["intervals"][measure])]
        costs = ["" if row[column] is None else row[column] for column in columns]
        writer.writerow(
            [report["collection"], report["split"], row["queries"], row["name"], row["role"], *values, *costs]
        )
    return out.getvalue().rstrip("\n")


def latex_table(report: Report) -> str:
    """Return the systems as a LaTeX table for the booktabs package, the caption with what was averaged."""
    measures = report["measures"]
    best = {measure: max(row[measure] for row in report["systems"]) for measure in measures}
    lines = [
        r"\begin{table}",
        rf"\caption{{{_latex(caption(report))}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(measures) + 1)}}}",
        r"\toprule",
        " & ".join(["system", *(_latex(measure) for measure in measures), "ms"]) + r" \\",
        r"\midrule",
    ]
    for row in report["systems"]:
        cells = [
            rf"\textbf{{{formats.quality(row[m])}}}" if row[m] == best[m] else formats.quality(row[m]) for m in measures
        ]
        lines.append(
            " & ".join([_latex(row["name"]), *cells, _latex(formats.milliseconds(row["query_ms_p50"]))]) + r" \\"
        )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _latex(text: str) -> str:
    return re.sub(r"[\\&%$#_{}^~–±]", lambda found: _LATEX.get(found[0], rf"\{found[0]}"), text)


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """Return reproduced figures as plain text, each with its mark."""
    rows = [
        [
            outcome.table,
            " / ".join(filter(None, [outcome.expected.set, outcome.expected.system])),
            outcome.expected.measure,
            f"{outcome.expected.value:.4f} ±{outcome.expected.tolerance:g}",
            "–" if outcome.found is None else f"{outcome.found:.4f}",
            "same" if outcome.ok else outcome.problem or "DIFFERS",
        ]
        for outcome in outcomes
    ]
    return plain_table(["table", "system", "measure", "expected", "now", ""], rows)


def format_costs(report: Report) -> str:
    """Return what a bench measured as plain text: latency by stage, then throughput, processor time and memory."""
    benched = [row for row in report["systems"] if row.get("cost")]
    timed = [
        (row["name"], stage, times) for row in benched for stage, times in formats.in_stage_order(row["cost"]["stages"])
    ]
    for row in benched:
        load = row["cost"]["open_loop"]
        if load and load["latency"]:
            stage = f"open loop, {load['offered_per_s']:.1f}/s, {load['failed']} of {load['sent']} failed"
            timed.append((row["name"], stage, load["latency"]))
    latencies = [
        [name, stage, *(formats.milliseconds(times[f"{key}_ms"]) for key in ("p50", "p95", "p99", "max"))]
        for name, stage, times in timed
    ]
    costs = [
        [
            row["name"],
            formats.milliseconds(row["cost"]["queries_per_s"]),
            formats.milliseconds(row["cost"]["cpu_s_per_1000"]),
            formats.megabytes(row["cost"]["memory_bytes"]),
            formats.megabytes(row["cost"]["peak_bytes"]),
            formats.whole(row["bytes_per_doc"]),
            formats.milliseconds(row["cost"]["build_s"]),
            formats.milliseconds(row["cost"]["documents_per_s"]),
        ]
        for row in benched
    ]
    headings = ["system", "queries/s", "CPU s/1000", "memory MB", "peak MB", "bytes/doc", "build s", "documents/s"]
    hardware = report["provenance"]["hardware"]
    cores = ", ".join(map(str, benched[0]["cost"]["cores"])) if benched else ""
    note = (
        f"{hardware['cpu']}, core {cores} of {hardware['cores']}; each system in a process of its own, warmed up. "
        "Memory is the process's, Python and libraries included."
    )
    stages = plain_table(["milliseconds, one query at a time", "stage", "p50", "p95", "p99", "max"], latencies)
    return f"{stages}\n\n{plain_table(headings, costs)}\n\n{note}"


def format_summary(summary: Report) -> str:
    """Return the means over sets as plain text: one table for each measure, the set list named."""
    sets = [entry["name"] for entry in summary["sets"]]
    parts = []
    for measure in summary["measures"]:
        headings = [measure, *sets, f"mean of {len(sets)}"]
        rows = [
            [
                row["name"],
                *(formats.quality(row["sets"][name][measure]) for name in sets),
                formats.quality(row["mean"][measure]),
            ]
            for row in summary["systems"]
        ]
        rows += [
            [
                f"{row['system']} (published)",
                *(formats.optional(row["sets"][measure].get(name)) for name in sets),
                formats.optional(row["mean"][measure]),
            ]
            for row in summary.get("reference", ())
            if measure in row["mean"]
        ]
        parts.append(plain_table(headings, rows))
    return "\n\n".join([*parts, summary_caption(summary)])


def summary_caption(summary: Report) -> str:
    """Return the sentence without which no mean over sets may be quoted."""
    described = [
        entry["name"]
        + (f" (mean of {len(entry['collections'])})" if len(entry["collections"]) > 1 else "")
        + f", {entry['queries']:,} queries"
        for entry in summary["sets"]
    ]
    return (
        f"Split {summary['split']}; each set weighs the same in the mean of {len(described)}: {'; '.join(described)}."
    )


def caption(report: Report) -> str:
    """Return the sentence without which no number of a report may be quoted."""
    queries = report["systems"][0]["queries"]
    documents = "" if report["documents"] is None else f" over {report['documents']:,} documents"
    return (
        f"{report['collection']}, split {report['split']}: means over all {queries:,} judged queries{documents}, "
        "with 95 % bootstrap intervals; a query without results counts as zero."
    )


def _headings(measures: Sequence[str]) -> list[str]:
    return [*measures, "parameters", "encode ms", "query ms", "bytes/doc"]


def _plus_minus(row: Report, measure: str) -> str:
    low, high = row["intervals"][measure]
    return f"{formats.quality(row[measure])} ±{formats.quality((high - low) / 2)}"


def _with_interval(row: Report, measure: str) -> str:
    return f"{formats.quality(row[measure])} ({formats.interval(row['intervals'][measure])})"


def _costs(row: Report) -> list[str]:
    return [
        formats.count(row["params"]),
        formats.milliseconds(row["encode_ms_p50"]),
        formats.milliseconds(row["query_ms_p50"]),
        formats.whole(row["bytes_per_doc"]),
    ]


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")
