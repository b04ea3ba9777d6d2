"""Progress bars for people; silent when standard error is not a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Advance = Callable[[int], None]
_SILENT = ContextVar("_SILENT", default=False)


@contextlib.contextmanager
def progress(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Show a bar on standard error while the block runs; bars within it are not drawn, they would overwrite it.

    Args:
        label: What is being done, such as ``"score pairs"``.
        total: How many units there are; None when unknown.
        unit: What is counted, shown with the speed, such as ``"texts"``.

    Yields:
        ``advance(n)``, to be called as units get done.
    """
    if _SILENT.get() or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    with silence(), Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(label, total=total, rate="")

        def advance(count: int) -> None:
            bar.update(task, advance=count)
            speed = bar.tasks[0].speed
            if speed:
                bar.update(task, rate=f"{speed:,.0f} {unit}/s")

        yield advance


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Show no bars while the block runs: inside something timed, drawing them would be what is measured."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)
