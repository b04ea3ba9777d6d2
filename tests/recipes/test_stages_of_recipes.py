"""Stages in a recipe: what they inherit, how they are addressed, and names that do not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from retrieval_kd.errors import RecipeError
from retrieval_kd.recipes.loader import load_recipe, to_yaml
from retrieval_kd.recipes.schema import CandidatesSpec, SourceSpec

STAGED = """
name: staged
about: Two stages.
source: nowhere
candidates: {depth: 40, window: [1, 20]}
teacher: {model: /models/small}
losses: [{name: margin_mse, weight: 0.5}]
schedule: {epochs: 3, learning_rate: 1e-3}
stages:
  - name: warmup
    schedule: {epochs: 1}
  - name: hard
    candidates: {sources: [bm25, {kind: student, stage: warmup}], negatives: 7}
    teacher: {model: /models/large, max_length: 64}
    losses: [{name: listwise_kl}]
    selection: disagreement
"""


def test_a_recipe_without_stages_says_so() -> None:
    """Without it --set stages.warmup.schedule.epochs=1 would be told to write a list."""
    with pytest.raises(RecipeError, match=r"a recipe without stages has their keys itself, such as schedule\.epochs"):
        load_recipe("margin_mse", ["stages.warmup.schedule.epochs=1"])


@pytest.fixture
def staged(tmp_path: Path) -> str:
    """A recipe of two stages."""
    path = tmp_path / "staged.yaml"
    path.write_text(STAGED)
    return str(path)


def test_a_stage_has_what_it_does_not_name_from_the_recipe(staged: str) -> None:
    """Without it a stage that names its epochs alone would train at the default rate instead of the recipe's."""
    warmup, hard = load_recipe(staged).training
    assert (warmup.schedule.epochs, warmup.schedule.learning_rate) == (1, 1e-3)
    assert (hard.schedule.epochs, hard.schedule.learning_rate) == (3, 1e-3)
    assert warmup.candidates == CandidatesSpec(depth=40, window=(1, 20))
    assert (hard.candidates.depth, hard.candidates.negatives) == (40, 7)
    assert hard.candidates.sources == (SourceSpec("bm25"), SourceSpec("student", stage="warmup"))
    assert (warmup.teacher.model, hard.teacher.model) == ("/models/small", "/models/large")
    assert [loss.name for loss in (*warmup.losses, *hard.losses)] == ["margin_mse", "listwise_kl"]
    assert (warmup.selection.kind, hard.selection.kind) == ("all", "disagreement")


def test_a_recipe_without_stages_is_one_stage() -> None:
    """Without it each caller would have to know two shapes of a recipe."""
    recipe = load_recipe("margin_mse", ["schedule.epochs=7", "candidates.negatives=5"])
    (only,) = recipe.training
    assert (only.schedule, only.candidates, only.losses) == (recipe.schedule, recipe.candidates, recipe.losses)


def test_a_staged_recipe_reads_back_equal(staged: str, tmp_path: Path) -> None:
    """Without it the recipe.yaml beside a result would inherit twice and describe another run."""
    recipe = load_recipe(staged)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(str(path)) == recipe


def test_overrides_find_stages_and_losses_by_name(staged: str) -> None:
    """Without it an override would break when a stage is put before the one it means."""
    recipe = load_recipe(
        staged, ["stages.hard.schedule.epochs=9", "stages.0.losses=[ranknet]", "losses.margin_mse.weight=2"]
    )
    assert [stage.schedule.epochs for stage in recipe.training] == [1, 9]
    assert recipe.training[0].losses[0].name == "ranknet"
    assert recipe.losses[0].weight == 2
    assert load_recipe(staged, ["schedule.learning_rate=0.5"]).training[1].schedule.learning_rate == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.warmpu.schedule.epochs=1", "nothing here is called 'warmpu', did you mean 'warmup'?"),
        ("stages.7.schedule.epochs=1", "'7' is not a position in a list of 2"),
        ("stages.warmup.schedul.epochs=1", "stage 'warmup': schedul: unknown key, did you mean 'schedule'?"),
        ("stages.warmup.schedule.epochs=0", "stage 'warmup': schedule.epochs: 0 must be at least 1"),
        ("stages.warmup.losses=[]", "stage 'warmup': losses is empty"),
        ("stages.hard.name=warmup", "has two of one name"),
        ("stages.hard.name=a.b", "must be letters, digits"),
        ("stages=[{schedule: {epochs: 1}}]", "stages.0: a stage is a mapping with a name"),
        ("stages.hard.candidates.sources=[{kind: student, stage: warmpu}]", "no stage 'warmpu', did you mean 'warmup'"),
        ("stages.0.candidates.sources=[{kind: student, stage: hard}]", "stage 'hard' is not done by then"),
        ("candidates.sources=[{kind: student, stage: warmup}]", "stage 'warmup' is not done by then"),
        ("candidates.sources=[bm25, bm25]", "names one twice"),
        ("candidates.sources=[run]", "run, and only run, takes a path"),
        ("candidates.sources=[{kind: bm25, encoder: x}]", "bm25 takes no encoder"),
        ("candidates.filter={}", "candidates.filter: empty"),
        ("candidates.filter.ratio=1.5", "candidates.filter.ratio: 1.5 is not in (0, 1]"),
        ("candidates.filter.percentiles=[90, 10]", "must lie in 0..100, first before last"),
        ("selection.kind=disagreemnt", "selection.kind: 'disagreemnt', did you mean 'disagreement'?"),
        ("selection.student_ranks=[5, 2]", "selection.student_ranks: [5, 2]"),
        ("joint.learning_rate=2", "joint.learning_rate: 2.0 is not in (0, 1)"),
    ],
)  # fmt: skip
def test_wrong_stages_are_named(staged: str, override: str, message: str) -> None:
    """Without it a misspelt stage would be a stage of its own, or an override that changes nothing."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(staged, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_recipes_of_the_documentation_load(tmp_path: Path) -> None:
    """Without it the page about stages could show a key that no recipe takes."""
    page = Path(__file__).resolve().parents[2] / "docs" / "stages.md"
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    whole = [block for block in blocks if block.startswith("name:")]
    assert (len(blocks), len(whole)) == (4, 2)
    for text in whole:
        path = tmp_path / "whole.yaml"
        path.write_text(text)
        assert load_recipe(str(path)).training
    # What is a section alone is put into a whole recipe.
    candidates, stages = (block for block in blocks if block not in whole)
    path = tmp_path / "section.yaml"
    path.write_text("name: two\nabout: two\nsource: two\nlosses: [embedding_regression]\n" + stages)
    assert [stage.frozen_documents for stage in load_recipe(str(path)).training] == [True, False]
    path.write_text(re.sub(r"candidates: .*\n", candidates, whole[1], count=1))
    (stage,) = load_recipe(str(path)).training
    assert [source.kind for source in stage.candidates.sources] == ["bm25", "dense", "dense", "student", "run"]
