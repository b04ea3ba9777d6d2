"""The training log: JSON lines for machines, TensorBoard for people, both exact under resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from retrieval_kd.artifacts import atomic_write

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object a line; opening it for a resumed run forgets what came after the checkpoint."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        """Keep the lines up to ``resume_step`` (none when None) and drop the rest, so no step is logged twice."""
        from torch.utils.tensorboard import SummaryWriter

        path = folder / METRICS
        last = -1 if resume_step is None else resume_step
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= last]
        with atomic_write(path) as file:
            file.writelines(f"{line}\n" for line in kept)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one event at one step."""
        self._file.write(json.dumps({"event": event, "step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in _flat(values).items():
            self._board.add_scalar(f"{event}/{name}", value, step)

    def __enter__(self) -> Self:
        """Open the log."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush and close both logs, after an error too."""
        self._file.close()
        self._board.close()


def _whole_lines(path: Path) -> list[str]:
    """Return the lines that ended; a kill can leave a torn last line."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{inner}": number for inner, number in _flat(value).items()})
        elif value is not None:
            flat[name] = float(value)
    return flat
