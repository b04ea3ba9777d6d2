"""Training curves and diagnostics read from the training loop's ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrieval_kd.errors import DataError

AGREEMENT = ("agreement_top1", "agreement_kendall", "agreement_kl")
DIAGNOSTICS = (*AGREEMENT, "student_spread", "teacher_spread", "gradient_norm", "padding", "texts_per_second")
"""What the training loop logs of a step beside its loss; ``retrieval_kd/training/metrics.py`` says what each is."""

_MAX_POINTS = 400
_LAST = 10
Point = tuple[float, float]


def read_curves(path: Path, measure: str = "nDCG@10") -> dict[str, Any]:
    """Read what a training run logged.

    A resumed run may have logged a step twice: the later line counts. A key that no line has, such as in a file of an
    earlier version, leaves an empty curve and no diagnostic.

    Returns:
        ``loss``, ``dev`` and each of :data:`AGREEMENT` as ``(step, value)`` points, all but ``dev`` averaged down to
        at most 400 of them; ``diagnostics``: of each of :data:`DIAGNOSTICS` the ``mean`` over all steps and ``last``,
        that over the last tenth of them.

    Raises:
        DataError: the file is absent, or a line is not a metrics event; names file and line.
    """
    train: dict[float, Mapping[str, float]] = {}
    dev: dict[float, float] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot read the training metrics ({error.strerror}); give a metrics.jsonl") from None
    for number, line in enumerate(lines, start=1):
        try:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "train":
                known = {key: float(event[key]) for key in DIAGNOSTICS if event.get(key) is not None}
                train[float(event["step"])] = {"loss": float(event["loss"]), **known}
            elif event["event"] == "dev":
                dev[float(event["step"])] = float(event[measure])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}:{number}: not a metrics event ({type(error).__name__}: {error}); train again or mend the line"
            ) from None
    curves = {
        key: [(step, values[key]) for step, values in sorted(train.items()) if key in values]
        for key in ("loss", *DIAGNOSTICS)
    }
    return {
        "loss": _averaged(curves["loss"]),
        "dev": sorted(dev.items()),
        **{key: _averaged(curves[key]) for key in AGREEMENT},
        "diagnostics": {
            key: {"mean": _mean(points), "last": _mean(points[-math.ceil(len(points) / _LAST) :])}
            for key in DIAGNOSTICS
            if (points := curves[key])
        },
    }


def _averaged(points: list[Point]) -> list[Point]:
    width = -(-len(points) // _MAX_POINTS) or 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(group[-1][0], _mean(group)) for group in groups]


def _mean(points: list[Point]) -> float:
    return sum(value for _, value in points) / len(points)
