"""A report's plots as files: the page's own drawings as SVG, and PNG where a picture is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eval import plots
from eval.page import report_plots
from retrieval_kd.artifacts import atomic_write

Report = Mapping[str, Any]
_COLOURS = {"bi-encoder": "#2257b5", "reranker": "#b1500f", "student": "#0b6e63", "server": "#7a3fa3"}
_PLAIN = "#566173"


def write_pictures(report: Report, folder: Path) -> list[Path]:
    """Write ``NAME.svg`` for every plot of a report, and ``NAME.png`` for those of quality against cost.

    Returns:
        The files.
    """
    written = []
    for plot in report_plots(report):
        width, height = plot.sizes["wide"]
        path = folder / f"{plot.slug}.svg"
        with atomic_write(path) as file:
            file.write(plots.standalone(plot.draw(width, height), width, height))
        written.append(path)
    written += _paretos(report, folder)
    return written


def _paretos(report: Report, folder: Path) -> list[Path]:
    measure = report["measures"][0]
    costs: Mapping[str, tuple[str, Callable[[Report], float | None]]] = {
        "quality-latency": ("milliseconds per query, median", lambda row: row["query_ms_p50"]),
        "quality-memory": (
            "megabytes of memory",
            lambda row: row["cost"]["memory_bytes"] / 1e6 if row.get("cost") and row["cost"]["memory_bytes"] else None,
        ),
    }
    written = []
    for slug, (label, cost) in costs.items():
        rows = [(row, value) for row in report["systems"] if (value := cost(row))]
        if rows:
            written.append(_draw(rows, measure, label, folder / f"{slug}.png"))
    return written


def _draw(rows: list[tuple[Report, float]], measure: str, label: str, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    costs = [value for _, value in rows]
    middle = math.sqrt(min(costs) * max(costs))
    # Said outright: matplotlib's own limits around a single cost can have no width.
    room = max(max(costs) / min(costs), 10.0) ** 0.2
    axes.set_xlim(min(costs) / room, max(costs) * room)
    for row, value in rows:
        low, high = row["intervals"][measure]
        colour = _COLOURS.get(row["role"], _PLAIN)
        axes.vlines([value], [low], [high], color=colour, alpha=0.5, linewidth=2)
        axes.plot([value], [row[measure]], "o", color=colour)
        # Labels of the dearer half stand on the left, so that none leaves the picture.
        left = value > middle
        axes.annotate(
            row["name"],
            (value, row[measure]),
            xytext=(-7 if left else 7, 5),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=8,
            color=colour,
        )
    front = plots.pareto([plots.Mark(r["name"], r["role"], v, r[measure], 0.0, 0.0) for r, v in rows])
    axes.plot([mark.x for mark in front], [mark.y for mark in front], "--", color=_PLAIN, linewidth=1, zorder=0)
    axes.set_xlabel(f"{label} (log scale)")
    axes.set_ylabel(measure)
    queries = rows[0][0]["queries"]
    axes.set_title(
        f"means over {queries:,} queries with 95 % intervals; dashed: no other system beats these on both",
        fontsize=9, loc="left",
    )  # fmt: skip
    axes.grid(axis="y", color="#dce1e8")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic_write(path, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    return path
