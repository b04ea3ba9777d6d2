"""``rkd recipes``: what recipes there are and what each one says."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from retrieval_kd.cli.common import AsJson, Overrides, RecipeName

app = typer.Typer(help="List the shipped recipes; show one in full.", no_args_is_help=False)


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes that come with the package."""
    if context.invoked_subcommand is not None:
        return
    from retrieval_kd.recipes.loader import load_recipe, shipped_recipes

    loaded = [load_recipe(name) for name in shipped_recipes()]
    if as_json:
        typer.echo(json.dumps([{"name": r.name, "about": r.about, "source": r.source} for r in loaded]))
        return
    width = max(len(recipe.name) for recipe in loaded)
    for recipe in loaded:
        typer.echo(f"{recipe.name:<{width}}  {recipe.about}")


@app.command("show")
def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the resolved recipe as JSON.")] = False,
) -> None:
    """Print a recipe with every default filled in, as YAML that rkd run reads back."""
    from retrieval_kd.recipes.loader import load_recipe, resolved, to_yaml

    loaded = load_recipe(recipe, overrides or ())
    typer.echo(json.dumps(resolved(loaded)) if as_json else to_yaml(loaded), nl=as_json)
