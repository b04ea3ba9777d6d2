"""What a teacher's scores would do to a recipe's losses, said before the first step instead of found after the last."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from retrieval_kd.errors import DataError
from retrieval_kd.losses.checks import option_types
from retrieval_kd.losses.registry import loss_info
from retrieval_kd.losses.scaled import percentile_scale
from retrieval_kd.recipes.schema import LossSpec
from retrieval_kd.runs import Scores
from retrieval_kd.scores.inspect import ScoreReport, inspect
from retrieval_kd.training.batches import TrainingSet

# Lists looked at, evenly spread: enough for any share that matters, whatever the number of queries.
_LISTS = 20_000


def teacher_warnings(data: TrainingSet, losses: Sequence[LossSpec]) -> tuple[str, ...]:
    """Return one line for each way in which the teacher's scores would train nothing without an error.

    Args:
        data: The lists with their scores.
        losses: The recipe's terms; those that take the softmax of the teacher's scores say at which temperature,
            those that clip them where.

    Raises:
        DataError: a score is NaN or infinite; names the query and the document.
    """
    if data.teacher is None:
        return ()
    _check_finite(data)
    sample = [data.teacher[i] for i in range(0, len(data.teacher), -(-len(data.teacher) // _LISTS))]
    report = inspect(sample)
    if report.equal_lists == report.queries:
        return ("teacher: all scores within each list are equal, so there is nothing to learn; check the teacher",)
    lines = []
    if report.equal_lists:
        lines.append(f"teacher: {report.equal_lists} of {report.queries} lists have equal scores and teach nothing")
    for spec in losses:
        if spec.teacher == "scores" and "teacher" in loss_info(spec.name, spec.options).needs:
            lines += _clipped(spec, sample, report) + _underflow(spec, sample)
    return tuple(lines)


def _check_finite(data: TrainingSet) -> None:
    for item, scores in zip(data.lists, data.teacher or (), strict=True):
        wrong = ~np.isfinite(scores)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"teacher: the score of query {item.query_id!r} and document {item.doc_ids[at]!r} is {scores[at]}; "
                "mend the teacher and score again"
            )


def _options(spec: LossSpec) -> dict[str, Any]:
    """Return all options of a loss: its defaults, and what the recipe sets."""
    function = loss_info(spec.name, spec.options).function
    parameters = signatures.signature(function).parameters
    return {**{name: parameters[name].default for name in option_types(function)}, **spec.options}


def _as_read(spec: LossSpec, sample: Sequence[Scores]) -> list[Scores]:
    """Return the scores as the loss has them before it divides them by a temperature."""
    options = _options(spec)
    if "low" in options:
        low, high = float(options["low"]), float(options["high"])
        return [percentile_scale(torch.from_numpy(scores), low, high).numpy() for scores in sample]
    return [options.get("teacher_scale", 1.0) * scores for scores in sample]


def _clipped(spec: LossSpec, sample: Sequence[Scores], report: ScoreReport) -> list[str]:
    """Name a loss that clips scores which differ to equal ones."""
    options = _options(spec)
    if "low" not in options:
        return []
    lost = inspect(_as_read(spec, sample)).equal_lists - report.equal_lists
    if not lost:
        return []
    line = (
        f"losses: {spec.name} clips the teacher's scores to low {options['low']:g} and high {options['high']:g}, where "
        f"those of {lost} of {report.queries} lists become equal and teach nothing; set low and high to their 1st and "
        f"99th percentile, {report.p1:.3g} and {report.p99:.3g}, or teacher.normalise to percentile"
    )
    return [line]


def _temperature(spec: LossSpec) -> tuple[str, float]:
    """Return the option that divides the teacher's scores in a softmax, and its value; empty where there is none."""
    options = _options(spec)
    names = ["teacher_temperature"]
    # Beside in-batch scores it divides the student's alone.
    if loss_info(spec.name, spec.options).kind == "scores":
        names.append("temperature")
    return next(((name, float(options[name])) for name in names if name in options), ("", 1.0))


def _underflow(spec: LossSpec, sample: Sequence[Scores]) -> list[str]:
    option, temperature = _temperature(spec)
    if not option:
        return []
    report = inspect([scores / temperature for scores in _as_read(spec, sample)])
    if not report.underflow or report.enough is None:
        return []
    line = (
        f"losses: at {spec.name}'s {option} {temperature:g}, {report.underflow:.1%} of the teacher's scores underflow "
        f"the softmax and teach nothing (its lists spread over {report.mean_spread * temperature:.3g} on average); "
        f"{option} {temperature * report.enough:.2g} would do"
    )
    return [line]
