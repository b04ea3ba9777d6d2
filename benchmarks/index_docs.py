"""Write the tables of ``docs/index.md`` from the results of ``index_kinds.py``.

python benchmarks/index_docs.py benchmarks/results/index-*.json
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from retrieval_kd.artifacts import atomic_write

PAGE = Path(__file__).resolve().parents[1] / "docs" / "index.md"
BEGIN, END = "<!-- figures: written by benchmarks/index_docs.py -->", "<!-- end of figures -->"
HEADINGS = (
    "system", "recall@10", "queries/s, one at a time", "queries/s, 64 at once", "build, CPU s",
    "bytes/vector", "open, CPU ms", "peak building, MiB", "peak searching, MiB",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().results]
    text = PAGE.read_text(encoding="utf-8")
    figures = "\n\n".join(section(report) for report in reports)
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    with atomic_write(PAGE) as file:
        file.write(pattern.sub(lambda _: f"{BEGIN}\n\n{figures}\n\n{END}", text))


def section(report: dict[str, Any]) -> str:
    versions = report["versions"]
    setting = (
        f"{report['documents']:,} vectors of {report['dimension']} numbers ({report['vectors']}); queries: "
        f"{report['queries']}. Target: {report['target_recall']} of the exact ten. One thread of "
        f"{report['machine']['cores']} shared cores, processor time; faiss-cpu {versions.get('faiss-cpu')}, "
        f"numpy {versions.get('numpy')}."
    )
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *(cells(row) for row in report["systems"])]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{setting}\n\n{table}\n\n`{report['command']}`"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    build, search = row["build"], row.get("search", {})
    if "failed" in build:
        return (row["name"], f"not built: {build['failed']}", *[""] * (len(HEADINGS) - 2))
    built = (f"{build['cpu_seconds']:.1f}", f"{build['bytes_per_vector']:,.0f}")
    if "failed" in search:
        return (row["name"], f"not searched: {search['failed']}", "", "", *built, "", f"{build['peak_mib']:,.0f}", "")
    # A memory that was not measured is left empty.
    peaks = tuple("" if part["peak_mib"] is None else f"{part['peak_mib']:,.0f}" for part in (build, search))
    opened = (f"{search['open_cpu_ms']:.1f}", *peaks)
    if search["effort"] is None:
        return (row["name"], f"{search['recall']:.3f} at most", "", "", *built, *opened)
    speed = (f"{search['per_cpu_second_alone']:,.0f}", f"{search['per_cpu_second_in_64']:,.0f}")
    return (row["name"], f"{search['recall']:.4f}", *speed, *built, *opened)


if __name__ == "__main__":
    main()
