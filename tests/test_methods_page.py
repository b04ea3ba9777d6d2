"""docs/methods.md says what the recipes and the stored results say."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from retrieval_kd.recipes.loader import load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
RESULTS = sorted((ROOT / "benchmarks" / "results" / "methods").glob("*/*.json"))


def rows(name: str) -> list[str]:
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_stands_on_the_page(name: str) -> None:
    """Without it a new recipe, or a corrected source, would never reach the reader."""
    recipe = load_recipe(name)
    assert any(recipe.source in row and recipe.follows in row and recipe.published in row for row in rows(name))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_stored_result_stands_on_the_page(path: Path) -> None:
    """Without it the page could go on with figures whose runs have been repeated."""
    result = json.loads(path.read_text(encoding="utf-8"))
    shown = [f"{fmean(one['values']):.3f}" for one in result["collections"].values()]
    assert any(all(figure in row for figure in shown) for row in rows(result["name"]))


def test_there_are_results() -> None:
    """Without it an empty folder would leave the test above green."""
    assert len(RESULTS) >= 10
