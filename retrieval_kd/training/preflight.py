"""What a teacher's scores would do to a recipe's losses, said before the first step instead of found after the last."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Sequence

import numpy as np

from retrieval_kd.errors import DataError
from retrieval_kd.losses.checks import option_types
from retrieval_kd.losses.registry import LOSSES
from retrieval_kd.recipes.schema import LossSpec
from retrieval_kd.runs import Scores
from retrieval_kd.scores.inspect import inspect
from retrieval_kd.training.batches import TrainingSet

# Lists looked at, evenly spread: enough for any share that matters, whatever the number of queries.
_LISTS = 20_000


def teacher_warnings(data: TrainingSet, losses: Sequence[LossSpec]) -> tuple[str, ...]:
    """Return one line for each way in which the teacher's scores would train nothing without an error.

    Args:
        data: The lists with their scores.
        losses: The recipe's terms; those that take the softmax of the teacher's scores say at which temperature.

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
        option, temperature = _softmax(spec)
        if option:
            lines += _underflow(spec.name, option, temperature, sample)
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


def _softmax(spec: LossSpec) -> tuple[str, float]:
    """Return the option that divides the teacher's scores in a softmax, and its value; empty where there is none."""
    info = LOSSES[spec.name]
    options = option_types(info.function)
    # A loss that scales scores by percentiles brings them to 0..1 itself.
    if spec.teacher != "scores" or "teacher" not in info.needs or "low" in options:
        return "", 1.0
    option = "teacher_temperature"
    if option not in options and info.kind == "scores":
        option = "temperature"
    if option not in options:
        return "", 1.0
    default = signatures.signature(info.function).parameters[option].default
    return option, float(spec.options.get(option, default))


def _underflow(name: str, option: str, temperature: float, sample: Sequence[Scores]) -> list[str]:
    report = inspect([scores / temperature for scores in sample])
    if not report.underflow or report.enough is None:
        return []
    line = (
        f"losses: at {name}'s {option} {temperature:g}, {report.underflow:.1%} of the teacher's scores underflow the "
        f"softmax and teach nothing (its lists spread over {report.mean_spread * temperature:.3g} on average); "
        f"{option} {temperature * report.enough:.2g} would do"
    )
    return [line]
