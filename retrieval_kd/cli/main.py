"""The ``rkd`` command. Each verb imports what it needs when it runs, so that ``--help`` stays instant."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from retrieval_kd import __version__
from retrieval_kd.cli import demo, evaluate, index, recipes, run, score, search, serve, stages
from retrieval_kd.errors import RkdError


class _Verbs(TyperGroup):
    """The verbs; an interruption is said here, for above this typer makes a silent exit of it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted; run the same command to go on", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="rkd",
    cls=_Verbs,
    help="Turn a slow, accurate ranker into a fast search service: distil, export, index, serve, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Options that stand before any verb."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for room in ("retrieval_kd", "index", "serve", "eval"):
        logging.getLogger(room).setLevel(logging.INFO)
    if debug:
        os.environ["RKD_DEBUG"] = "1"


app.command("demo")(demo.demo)
app.command("run")(run.run)
app.command("mine")(stages.mine)
app.command("teach")(stages.teach)
app.add_typer(score.app, name="score")
app.command("train")(stages.train)
app.command("export")(stages.export)
app.add_typer(index.app, name="index")
app.command("serve")(serve.serve)
app.command("search")(search.search)
app.add_typer(evaluate.app, name="eval")
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Run the command line: 0 done, 1 failed with one line that says why, 2 wrong usage, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # What a terminal's encoding lacks, a dash or a letter of a document, is no reason to fail after the work.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except RkdError as error:
        _fail(error, str(error))
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            _fail(error, f"disk full while writing {error.filename or 'a file'}: free some space and run it again")
        _fail(error, f"{error.filename or 'system'}: {error.strerror or error}")
    except ModuleNotFoundError as error:
        _fail(error, f"{error.name} is not installed; pip install 'retrieval-kd[cpu,train,eval]'")


def _fail(error: Exception, message: str) -> None:
    if os.environ.get("RKD_DEBUG"):
        raise error
    typer.echo(f"error: {message}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
