"""Write ``docs/evaluation.md`` from the measurements stored in ``docs/evaluation``.

Every figure on the page is read from a JSON file that a command made; the page names the command. Nothing is
measured here.

    python benchmarks/evaluation_page.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
STORED = DOCS / "evaluation"
PAGE = DOCS / "evaluation.md"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page's text."""
    text = (STORED / "page.md").read_text(encoding="utf-8")
    for marker, make in SECTIONS.items():
        text = text.replace(f"<!-- {marker} -->", make())
    return text


def stored(name: str) -> Any:
    return json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def published() -> str:
    """Put our figures beside the published ones."""
    rows = []
    for entry in stored("published"):
        found, wanted = entry["measured"], entry["published"]
        rows.append(
            [
                f"{entry['system']} on {entry['collection']}", f"{found:.4f}", f"{wanted:.4f}", entry["source"],
                f"{found - wanted:+.4f}",
            ]
        )  # fmt: skip
    return table(["system, test split, nDCG@10", "here", "published", "by", "difference"], rows)


def cranfield() -> str:
    report = stored("cranfield")
    rows = [
        [row["name"], *(f"{row[m]:.4f}" for m in report["measures"]), f"{row['judged_at_10']:.2f}"]
        for row in report["systems"]
    ]
    return table(
        [f"Cranfield, {report['systems'][0]['queries']} queries, graded", *report["measures"], "judged@10"], rows
    )


def toolkits() -> str:
    report = stored("toolkits")
    rows = [
        [f"{row['run']}: {row['toolkit']}", *("–" if row[m] is None else f"{row[m]:.4f}" for m in report["measures"])]
        for row in report["rows"]
    ]
    title = f"{report['collection']}, {report['queries']} queries, {report['system']}"
    return table([title, *report["measures"]], rows)


def exact() -> str:
    report = stored("exact")
    rows = [
        [name, "–", "–", "–", "–"]
        if row is None
        else [
            name,
            f"{row['search_s']:.1f}",
            f"{row['evaluated_s']:.1f}",
            f"{row['peak_mb']:,.0f}",
            f"{row['ndcg']:.4f}",
        ]
        for name, row in report["systems"].items()
    ]
    first = next(row for row in report["systems"].values() if row)
    title = f"{first['queries']:,} queries over {first['documents']:,} documents, k {report['k']}, one thread"
    return table([title, "search s", "with measures s", "peak MB", "nDCG@10"], rows)


def whole() -> str:
    report = stored("whole")
    rows = [
        [name, f"{row['seconds']:.0f}", f"{row['cpu_s']:.0f}", f"{row['peak_mb']:,.0f}", f"{row['ndcg']:.4f}"]
        for name, row in report["systems"].items()
    ]
    return f"    {report['command']}\n\n{table(['encoding included', 'seconds', 'CPU s', 'peak MB', 'nDCG@10'], rows)}"


def example() -> str:
    summary = stored("example")
    sets = [entry["name"] for entry in summary["sets"]]
    rows = [
        [row["name"], *(f"{row['sets'][name]['nDCG@10']:.3f}" for name in sets), f"{row['mean']['nDCG@10']:.3f}"]
        for row in summary["systems"]
    ]
    sizes = "; ".join(f"{_short(entry['name'])}, {entry['queries']:,} queries" for entry in summary["sets"])
    short = [_short(name) for name in sets]
    return f"{table(['nDCG@10', *short, f'mean of {len(sets)}'], rows)}\n\nSplit {summary['split']}: {sizes}."


def _short(name: str) -> str:
    """Return a collection's name without its distractors, which the page names."""
    return name.split("+")[0]


SECTIONS = {
    "published": published,
    "cranfield": cranfield,
    "toolkits": toolkits,
    "exact": exact,
    "whole": whole,
    "example": example,
}

if __name__ == "__main__":
    main()
