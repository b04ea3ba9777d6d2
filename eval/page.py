"""``report.html``: one self-contained page made from the content of ``report.json`` alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from eval import formats, plots
from eval.tables import caption

Report = Mapping[str, Any]
_SIZES = (("wide", 860, 400), ("narrow", 350, 330))
_HALF_SIZES = (("wide", 420, 280), ("narrow", 350, 250))


def render_page(report: Report) -> str:
    """Return the page: table, quality against latency, training curves, tests, provenance. Needs no network."""
    template = _environment().get_template("report.html.j2")
    return template.render(
        report=report,
        caption=caption(report),
        headlines=_headlines(report),
        comparisons=_comparisons_by_measure(report),
        latency=_latency_plot(report),
        training=_training_plots(report),
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        quality=formats.quality,
        interval=formats.interval,
        difference=formats.difference,
        p_value=formats.p_value,
        count=formats.count,
        milliseconds=formats.milliseconds,
        whole=formats.whole,
    )
    return environment


def _headlines(report: Report) -> list[str]:
    """Say for each student what share of the baseline's quality it keeps, and whether the data can tell them apart."""
    measure = report["measures"][0]
    by_name = {system["name"]: system for system in report["systems"]}
    sentences = []
    for row in report["comparisons"]:
        system, baseline = by_name[row["system"]], by_name[row["baseline"]]
        if row["measure"] != measure or "student" not in system["role"] or baseline[measure] == 0:
            continue
        low, high = (formats.difference(bound) for bound in row["interval"])
        verdict = "significant" if row["p_holm"] < 0.05 else "not significant"
        kept = 100 * system[measure] / baseline[measure]
        sentences.append(
            f"{row['system']} reaches {kept:.1f} % of {row['baseline']}'s {measure}: a difference of "
            f"{formats.difference(row['difference'])} (95 % interval {low} to {high}), {verdict} at 5 %."
        )
    return sentences


def _comparisons_by_measure(report: Report) -> dict[str, list[Report]]:
    return {
        measure: rows
        for measure in report["measures"]
        if (rows := [row for row in report["comparisons"] if row["measure"] == measure])
    }


def _latency_plot(report: Report) -> dict[str, Any]:
    """Draw what was timed from query text to ranking; encoding alone only where nothing else was timed."""
    measure = report["measures"][0]
    cost, label = "query_ms_p50", "milliseconds per query (median, log scale)"
    if not any(system[cost] for system in report["systems"]):
        cost, label = "encode_ms_p50", "milliseconds to encode a query (median, log)"
    marks = [
        plots.Mark(system["name"], system["role"], system[cost], system[measure], *system["intervals"][measure])
        for system in report["systems"]
        if system[cost]
    ]
    return {
        "drawings": _drawings(_SIZES, lambda width, height: plots.scatter(marks, label, measure, width, height))
        if marks
        else "",
        "untimed": [system["name"] for system in report["systems"] if not system[cost]],
        "measure": measure,
    }


def _training_plots(report: Report) -> list[dict[str, Any]]:
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]] = report["training"]
    titles = {"loss": ("Training loss", "loss"), "dev": ("Dev quality", "nDCG@10 on dev")}
    found = []
    for kind, (title, label) in titles.items():
        series = {name: curve[kind] for name, curve in curves.items() if curve[kind]}
        if series:
            draw = functools.partial(_draw_lines, series, label)
            found.append({"title": title, "drawings": _drawings(_HALF_SIZES, draw)})
    return found


def _draw_lines(series: Mapping[str, Sequence[tuple[float, float]]], label: str, width: int, height: int) -> str:
    return plots.lines(series, "optimiser step", label, width, height)


def _drawings(sizes: Sequence[tuple[str, int, int]], draw: Callable[[int, int], str]) -> Markup:
    return Markup("").join(
        Markup('<div class="{}">{}</div>').format(size, Markup(draw(width, height)))  # noqa: S704 - plots escape
        for size, width, height in sizes
    )
