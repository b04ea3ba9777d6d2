"""What the shipped recipes say of themselves."""

from __future__ import annotations

import pytest

from retrieval_kd.losses.registry import LOSSES, bind, bind_state
from retrieval_kd.recipes.loader import load_recipe, shipped_recipes

OWN = {"demo", "distil"}


@pytest.mark.parametrize("name", shipped_recipes())
def test_what_a_recipe_says_it_needs_is_what_its_losses_read(name: str) -> None:
    """Without it a user without a cross-encoder could pick a method that scores for hours."""
    recipe = load_recipe(name)
    read = set()
    for stage in recipe.training:
        for loss in stage.losses:
            info = LOSSES[loss.name]
            if info.kind == "pairs":
                read.add("preferences")
            elif loss.teacher == "scores" and info.kind in ("scores", "in_batch") and "teacher" in info.needs:
                read.add("scores")
    strongest = next((needs for needs in ("preferences", "scores") if needs in read), None)
    assert recipe.needs == strongest if strongest else recipe.needs in ("encoder", "judgements")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_stage_binds(name: str) -> None:
    """Without it a misspelt option of a later stage would be found after the earlier ones have trained."""
    for stage in load_recipe(name).training:
        for loss in stage.losses:
            bind(loss.name, loss.options)
            bind_state(loss.name, loss.options)


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - OWN))
def test_every_method_says_where_it_comes_from_and_departs(name: str) -> None:
    """Without it a figure of ours could be taken for the paper's method where it is not."""
    recipe = load_recipe(name)
    assert recipe.source
    assert recipe.follows


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_says_what_was_published(name: str) -> None:
    """Without it nobody could tell a method without a figure from a figure that was forgotten."""
    assert load_recipe(name).published
