"""The page of figures is what its stored measurements make, and can be done again."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from eval.reference import reference_rows
from eval.reproduce import read_tables, reproduce

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_the_page_is_made_from_its_measurements() -> None:
    """A figure edited by hand on the page would never be measured again."""
    page = runpy.run_path(str(ROOT / "benchmarks" / "evaluation_page.py"))["page"]()
    assert (DOCS / "evaluation.md").read_text(encoding="utf-8") == page
    assert "<!--" not in page


def test_ours_are_as_near_to_published_figures_as_the_page_says() -> None:
    """The published column must be the shipped reference's, and the promise of nearness kept."""
    for entry in json.loads((DOCS / "evaluation" / "published.json").read_text()):
        rows = reference_rows(entry["collection"], entry["split"], (entry["measure"],))
        assert entry["published"] in [row["value"] for row in rows]
        allowed = 0.02 if entry["system"].startswith("BM25") else 0.002
        assert abs(entry["measured"] - entry["published"]) < allowed


def test_the_shipped_tables_are_read() -> None:
    """A table that cannot be read is found out by the first reader."""
    tables = read_tables(DOCS / "evaluation" / "tables.yaml", {"data": "DIR", "models": "DIR"})
    assert [table.name for table in tables] == [
        "SciFact",
        "NFCorpus",
        "Cranfield",
        "BM25 on two sets",
        "README: the demo",
        "README: distil on MS MARCO passages",
        "README: distil, symmetric",
        "README: margin_mse on MS MARCO passages",
        "README: margin_mse, symmetric",
    ]


@pytest.mark.slow
def test_bm25_figures_are_reproduced(shared: Path) -> None:
    """A tokenizer's new release moves BM25 without any change of ours."""
    folders = {"data": str(shared / "data" / "beir"), "models": str(shared / "models")}
    tables = [
        table
        for table in read_tables(DOCS / "evaluation" / "tables.yaml", folders)
        if table.command.startswith("rkd eval") and "minilm" not in table.command
    ]
    outcomes = list(reproduce(tables))
    assert len(outcomes) == 3
    assert all(outcome.ok for outcome in outcomes), outcomes
