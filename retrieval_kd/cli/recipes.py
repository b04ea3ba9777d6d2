"""``rkd recipes``: what recipes there are and what each one says."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from retrieval_kd.cli.common import DEFAULT_RECIPE, AsJson, Overrides, RecipeName

if TYPE_CHECKING:
    from retrieval_kd.recipes.schema import Needs, Recipe

app = typer.Typer(help="List the shipped recipes; show one in full.", no_args_is_help=False)

# Where a new user starts; every other recipe is one method on its own.
_FIRST = (DEFAULT_RECIPE, "demo")
_NEEDS: dict[Needs, str] = {
    "encoder": "the large encoder, no other teacher",
    "judgements": "the train split's judgements, no teacher of scores",
    "scores": "a teacher's scores of each candidate",
    "preferences": "a teacher that compares two candidates",
}


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes that come with the package, by what they need."""
    if context.invoked_subcommand is not None:
        return
    from retrieval_kd.recipes.loader import load_recipe, shipped_recipes
    from retrieval_kd.recipes.schema import Needs

    loaded = {name: load_recipe(name) for name in shipped_recipes()}
    if as_json:
        shown = ("name", "about", "source", "follows", "published", "needs")
        typer.echo(json.dumps([{key: getattr(recipe, key) for key in shown} for recipe in loaded.values()]))
        return
    groups = {"Start here": [loaded.pop(name) for name in _FIRST if name in loaded]}
    for needs in get_args(Needs):
        groups[f"Needs {_NEEDS[needs]}"] = [recipe for recipe in loaded.values() if recipe.needs == needs]
    width = max(len(recipe.name) for group in groups.values() for recipe in group)
    blocks = (
        "\n".join([title, *(f"  {recipe.name:<{width}}  {recipe.about}" for recipe in group)])
        for title, group in groups.items()
    )
    typer.echo("\n\n".join(blocks))


@app.command("show")
def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the resolved recipe as JSON.")] = False,
) -> None:
    """Explain a recipe, then print it with every default filled in, as YAML that rkd run reads back."""
    from retrieval_kd.recipes.loader import load_recipe, resolved, to_yaml

    loaded = load_recipe(recipe, overrides or ())
    if as_json:
        typer.echo(json.dumps(resolved(loaded)))
        return
    # The whole of it before the first line is printed: a loss that does not exist is refused here.
    explained = list(_explained(loaded))
    for line in explained:
        typer.echo(f"# {line}")
    typer.echo(to_yaml(loaded), nl=False)


def _explained(recipe: Recipe) -> Iterator[str]:
    """Yield what a recipe needs and what each term of its loss is, stage by stage."""
    from retrieval_kd.losses.registry import LOSSES, bind

    yield f"Needs {_NEEDS[recipe.needs]}."
    for stage in recipe.training:
        yield f"Stage {stage.name}:" if recipe.stages else "Losses:"
        for loss in stage.losses:
            bind(loss.name, loss.options)
            info = LOSSES[loss.name]
            teacher = ", by the large encoder's scores" if loss.teacher == "encoder" else ""
            summary = (inspect.getdoc(info.function) or "").splitlines()[0]
            yield f"  {loss.weight:g} x {loss.name}{teacher}: {summary} [{info.source}]"
