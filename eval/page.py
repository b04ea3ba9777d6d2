"""``report.html``: one self-contained page made from the content of ``report.json`` alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from eval import formats, plots
from eval.tables import caption, summary_caption

Report = Mapping[str, Any]
Draw = Callable[[int, int], str]
_SIZES = {"wide": (860, 400), "narrow": (350, 330)}
_HALF_SIZES = {"wide": (420, 320), "narrow": (350, 310)}
_MOST_SCATTERS = 8


@dataclass(frozen=True)
class Plot:
    """One drawing of a report, at any size.

    Attributes:
        slug: Name of its file.
        section: ``latency``, ``memory``, ``queries`` or ``training``.
        title: What stands under it.
        draw: Width and height in CSS pixels to SVG.
        left_out: Systems that have no figure for it.
    """

    slug: str
    section: str
    title: str
    draw: Draw
    left_out: tuple[str, ...] = ()

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Return its size on wide and on narrow screens."""
        return _SIZES if self.section in ("latency", "memory") else _HALF_SIZES

    @property
    def drawings(self) -> Markup:
        """Return one drawing for wide and one for narrow screens; the letters stay readable on both."""
        return Markup("").join(
            Markup('<div class="{}">{}</div>').format(size, Markup(self.draw(*pixels)))  # noqa: S704 - plots escape
            for size, pixels in self.sizes.items()
        )


def render_page(report: Report) -> str:
    """Return the page: tables, plots, tests, agreement, published figures, provenance. Needs no network."""
    template = _environment().get_template("report.html.j2")
    drawn = list(report_plots(report))
    return template.render(
        report=report,
        best=_best(report["systems"], report["measures"]),
        caption=caption(report),
        headlines=_headlines(report),
        comparisons=_comparisons_by_measure(report),
        marks=_significance_marks(report),
        benched=[system for system in report["systems"] if system.get("cost")],
        diagnostics={name: found for name, curve in report["training"].items() if (found := curve.get("diagnostics"))},
        plots={plot.section: [p for p in drawn if p.section == plot.section] for plot in drawn},
        plot_rules=Markup(plots.RULES),  # noqa: S704 - our own style sheet
    )


def render_summary(summary: Report, folders: Mapping[str, str]) -> str:
    """Return the page of the means over sets.

    Args:
        summary: See :func:`eval.suite.summarise`.
        folders: Each collection's name and the folder of its report, beside the page.
    """
    template = _environment().get_template("summary.html.j2")
    rules = Markup(plots.RULES)  # noqa: S704 - our own style sheet
    best = _best([row["mean"] for row in summary["systems"]], summary["measures"])
    return template.render(
        summary=summary, best=best, caption=summary_caption(summary), folders=folders, plot_rules=rules
    )


def report_plots(report: Report) -> Iterator[Plot]:
    """Yield every plot the report's data allow."""
    measure = report["measures"][0]
    cost, label = "query_ms_p50", "milliseconds per query (median, log scale)"
    if not any(system[cost] for system in report["systems"]):
        # Encoding alone only where nothing else was timed.
        cost, label = "encode_ms_p50", "milliseconds to encode a query (median, log)"
    yield from _pareto("quality-latency", "latency", report, lambda row: row[cost], label, "ms")
    yield from _pareto(
        "quality-memory",
        "memory",
        report,
        lambda row: (row.get("cost") or {}).get("memory_bytes") and row["cost"]["memory_bytes"] / 1e6,
        "megabytes of memory (log scale)",
        "MB",
    )
    yield from _query_plots(report, measure)
    yield from _training_plots(report)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        quality=formats.quality,
        optional=formats.optional,
        in_stage_order=formats.in_stage_order,
        interval=formats.interval,
        difference=formats.difference,
        p_value=formats.p_value,
        count=formats.count,
        milliseconds=formats.milliseconds,
        megabytes=formats.megabytes,
        whole=formats.whole,
    )
    return environment


def _best(rows: Sequence[Report], measures: Sequence[str]) -> dict[str, float]:
    """Return the highest value of each measure; a template's ``attribute=`` would split ``IPrec@0.5`` at its dot."""
    return {measure: max(row[measure] for row in rows) for measure in measures}


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


def _significance_marks(report: Report) -> dict[tuple[str, str], str]:
    """Return a mark for each system and measure that differs from the baseline at 5 % after Holm's correction."""
    return {
        (row["system"], row["measure"]): "▲" if row["difference"] > 0 else "▼"
        for row in report["comparisons"]
        if row["p_holm"] < 0.05
    }


def _pareto(
    slug: str, section: str, report: Report, cost: Callable[[Report], float | None], label: str, unit: str
) -> Iterator[Plot]:
    measure = report["measures"][0]
    marks = [
        plots.Mark(system["name"], system["role"], value, system[measure], *system["intervals"][measure])
        for system in report["systems"]
        if (value := cost(system))
    ]
    if marks:
        left_out = tuple(system["name"] for system in report["systems"] if not cost(system))

        def draw(width: int, height: int) -> str:
            return plots.scatter(marks, label, measure, width, height, unit)

        yield Plot(slug, section, f"Mean {measure} with its 95 % interval", draw, left_out)


def _query_plots(report: Report, measure: str) -> Iterator[Plot]:
    """Yield each system against the baseline, query by query."""
    values = report.get("per_query", {})
    roles = {system["name"]: system["role"] for system in report["systems"]}
    rows = [row for row in report["comparisons"] if row["measure"] == measure and row["system"] in values]
    for number, row in enumerate(rows[:_MOST_SCATTERS], start=1):
        points = list(zip(values[row["baseline"]], values[row["system"]], strict=True))
        draw = functools.partial(_draw_bubbles, points, row["baseline"], row["system"], roles[row["system"]])
        counts = f"{row['wins']} better, {row['ties']} equal, {row['losses']} worse"
        yield Plot(f"queries-{number}", "queries", f"{row['system']}: {counts}", draw)


def _draw_bubbles(
    points: Sequence[tuple[float, float]], baseline: str, system: str, role: str, width: int, height: int
) -> str:
    return plots.bubbles(points, _short(baseline), _short(system), width, height, role)


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"{name[:33]}…"


_TRAINING_PLOTS = {
    "loss": ("Training loss", "loss"),
    "dev": ("Quality on dev, by the judgements", "nDCG@10 on dev"),
    "agreement_top1": ("Agreement: lists whose first document is the teacher's", "share of lists"),
    "agreement_kendall": ("Agreement: rank correlation with the teacher", "Kendall's tau"),
    "agreement_kl": ("Agreement: divergence from the teacher's lists, 0 at best", "KL divergence"),
}


def _training_plots(report: Report) -> Iterator[Plot]:
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]] = report["training"]
    for kind, (title, label) in _TRAINING_PLOTS.items():
        # A report of an earlier version has fewer curves.
        series = {name: points for name, curve in curves.items() if (points := curve.get(kind))}
        if series:
            slug = f"training-{kind.replace('_', '-')}"
            yield Plot(slug, "training", title, functools.partial(_draw_lines, series, label))


def _draw_lines(series: Mapping[str, Sequence[tuple[float, float]]], label: str, width: int, height: int) -> str:
    return plots.lines(series, "optimiser step", label, width, height)
