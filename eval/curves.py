"""Training curves read from the training loop's ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retrieval_kd.errors import DataError

_MAX_POINTS = 400
Point = tuple[float, float]


def read_curves(path: Path, measure: str = "nDCG@10") -> dict[str, list[Point]]:
    """Read ``loss`` and ``dev`` as ``(step, value)`` points; the loss is averaged down to at most 400 of them.

    A resumed run may have logged a step twice: the later line counts.

    Raises:
        DataError: the file is absent, or a line is not a metrics event; names file and line.
    """
    loss: dict[float, float] = {}
    dev: dict[float, float] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot read the training metrics ({error.strerror}); give a metrics.jsonl") from None
    for number, line in enumerate(lines, start=1):
        try:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "train":
                loss[float(event["step"])] = float(event["loss"])
            elif event["event"] == "dev":
                dev[float(event["step"])] = float(event[measure])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}:{number}: not a metrics event ({type(error).__name__}: {error}); train again or mend the line"
            ) from None
    return {"loss": _averaged(sorted(loss.items())), "dev": sorted(dev.items())}


def _averaged(points: list[Point]) -> list[Point]:
    width = -(-len(points) // _MAX_POINTS) or 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
