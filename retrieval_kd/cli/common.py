"""What the verbs share: arguments, and how results are shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from retrieval_kd import processes

if TYPE_CHECKING:
    from retrieval_kd.stages import Workspace

DEFAULT_RECIPE = "distil"
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name (rkd recipes) or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as student.mode=symmetric."),
]
Artifacts = Annotated[Path, typer.Option("--artifacts", help="Where stages keep their results, shared between runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ARTIFACTS = Path("runs/artifacts")


class WithDefault(TyperGroup):
    """A verb with sub-verbs that also takes a recipe by itself: what names no sub-verb is the default's."""

    DEFAULT = "recipe"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default sub-verb in front of arguments that name none."""
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else [self.DEFAULT, *args])


def announce(sentence: str) -> None:
    """Tell the person what is being done, on standard error; one of torchrun's processes speaks for all."""
    if processes.index() == 0:
        typer.echo(f"» {sentence}", err=True)


def open_workspace(recipe: str, overrides: Sequence[str] | None, artifacts: Path) -> Workspace:
    """Load a recipe with its overrides and prepare its stages."""
    from retrieval_kd.recipes.loader import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from eval.measures import parse_measure
    from retrieval_kd.stages import Workspace
    from retrieval_kd.training.loop import check_losses

    # Both are first used after hours of scoring and training.
    for stage in loaded.training:
        compares = any(member.kind == "pairwise" for member in stage.teacher.ensemble)
        check_losses(stage.losses, pairwise=compares)
    for measure in loaded.evaluation.measures:
        parse_measure(measure)
    return Workspace(loaded, artifacts, announce)


def emit(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result: JSON for machines, ``key  value`` lines for people, ``key / inner`` of mappings."""
    if processes.index() > 0:
        return
    if as_json:
        # Escaped, it loses no letter of an id or a path to the terminal's encoding.
        typer.echo(json.dumps(result))
        return
    lines = dict(_lines(result))
    width = max(map(len, lines), default=0)
    for key, value in lines.items():
        typer.echo(f"{key:<{width}}  {value}")


def _lines(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield from ((f"{key} / {inner}", item) for inner, item in _lines(value))
        else:
            yield key, value
