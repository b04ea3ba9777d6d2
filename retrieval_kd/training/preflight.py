"""What a teacher's scores would do to a recipe's losses, said before the first step instead of found after the last."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from retrieval_kd.errors import DataError
from retrieval_kd.losses.checks import option_types
from retrieval_kd.losses.inputs import EmbeddingInputs, InBatchInputs, Inputs, PairInputs
from retrieval_kd.losses.registry import Kind, loss_info
from retrieval_kd.losses.scaled import percentile_scale
from retrieval_kd.recipes.schema import LossSpec
from retrieval_kd.runs import Scores
from retrieval_kd.scores.inspect import ScoreReport, inspect
from retrieval_kd.training.batches import TrainingSet
from retrieval_kd.training.terms import Step, Teacher

T = TypeVar("T")
# Stored lists looked at, evenly spread: enough for any share that matters, whatever the number of queries.
_LISTS = 20_000
# A matrix product can give equal scores other last digits.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class _Source:
    """Where losses find what they learn from: stored with the lists, or made anew with each step."""

    kind: Kind
    teacher: Teacher
    stored: bool

    @property
    def name(self) -> str:
        if self.kind == "stacks":
            return "layer teacher"
        return {"scores": "teacher", "encoder": "encoder", "late_interaction": "late-interaction teacher"}[self.teacher]


def teacher_warnings(data: TrainingSet, losses: Sequence[LossSpec], preview: Iterable[Step] = ()) -> tuple[str, ...]:
    """Return one line for each way in which a teacher's scores would train nothing without an error.

    Args:
        data: The lists with what is stored of them.
        losses: The recipe's terms; those that take the softmax of the teacher's scores say at which temperature,
            those that clip them where.
        preview: A few steps; only made where a loss reads scores that are not stored.

    Raises:
        DataError: a score is NaN or infinite; names the query and the document.
    """
    _check_finite(data)
    readers: dict[_Source, list[LossSpec]] = {}
    for spec in losses:
        if (source := _source(spec, data)) is not None:
            readers.setdefault(source, []).append(spec)
    steps = [] if all(source.stored for source in readers) else list(preview)
    lines: list[str] = []
    for source, specs in readers.items():
        sample = _sample(source, data, steps)
        if not sample:
            continue
        report = inspect(sample)
        lines += _equal(source, report)
        if source.stored and source.kind == "scores":
            lines += _idle_members(data)
        if report.equal_lists < report.queries:
            for spec in specs:
                lines += _clipped(spec, source, sample, report) + _underflow(spec, source, sample)
    return tuple(dict.fromkeys(lines))


def _source(spec: LossSpec, data: TrainingSet) -> _Source | None:
    """Return where a loss finds its teacher's scores; None where it reads none."""
    info = loss_info(spec.name, spec.options)
    if info.kind == "pairs":
        return _Source("pairs", "scores", stored=True)
    if info.kind == "embeddings" or "teacher" not in info.needs:
        return None
    if info.kind != "stacks" and spec.teacher == "scores" and data.teacher is not None:
        return _Source("scores", "scores", stored=True)
    return _Source(info.kind, spec.teacher, stored=False)


def _sample(source: _Source, data: TrainingSet, steps: Sequence[Step]) -> list[Scores]:
    """Return lists of scores as the losses get them from a source."""
    if not source.stored:
        return [scores for step in steps for scores in _lists(step.inputs(source.kind, source.teacher))]
    if source.kind == "pairs":
        return [_both_ways(preferences) for preferences in _spread(data.preferences or ())]
    return list(_spread(data.teacher or ()))


def _spread(lists: Sequence[T]) -> Iterator[T]:
    return (lists[i] for i in range(0, len(lists), max(1, -(-len(lists) // _LISTS))))


def _both_ways(preferences: Scores) -> Scores:
    """Return the probabilities of all compared pairs and of their converses: equal where each is one half."""
    p = preferences[~np.isnan(preferences)]
    return np.concatenate([p, 1 - p]) if len(p) else np.full(1, 0.5, dtype=np.float32)


def _lists(inputs: Inputs) -> Iterator[Scores]:
    if isinstance(inputs, EmbeddingInputs | PairInputs) or inputs.teacher is None:
        return
    known = inputs.mask
    if isinstance(inputs, InBatchInputs) and inputs.scored is not None:
        known = known & inputs.scored
    teacher = inputs.teacher.detach().cpu()
    for row, real in zip(teacher.flatten(0, -2), known.cpu().expand_as(teacher).flatten(0, -2), strict=True):
        yield _unrounded(row[real].numpy())


def _unrounded(scores: Scores) -> Scores:
    """Return scores that are the same where they differ in their last digits alone."""
    alike = np.ptp(scores) <= _ROUNDING * np.abs(scores).max()
    return np.full_like(scores, scores[0]) if alike else scores


def _idle_members(data: TrainingSet) -> list[str]:
    """Name the members of an ensemble that prefer no document: the mean of the normalised scores hides them."""
    lines = []
    for name, scores in ({} if data.members is None else data.members()).items():
        report = inspect([_unrounded(one) for one in _spread(scores)])
        if report.equal_lists:
            lines.append(
                f"teacher member {name}: all scores equal in {report.equal_lists} of {report.queries} lists, which it "
                "teaches nothing; check it"
            )
    return lines


def _equal(source: _Source, report: ScoreReport) -> list[str]:
    same, what = ("undecided", "preferences") if source.kind == "pairs" else ("equal", "scores")
    if report.equal_lists == report.queries:
        nothing = f"all {what} within each list are {same}, so there is nothing to learn"
        return [f"{source.name}: {nothing}; check the {source.name}"]
    if report.equal_lists:
        lists = f"{report.equal_lists} of {report.queries} lists"
        return [f"{source.name}: {lists} have {same} {what} and teach nothing"]
    return []


def _check_finite(data: TrainingSet) -> None:
    if data.teacher is None:
        return
    for item, scores in zip(data.lists, data.teacher, strict=True):
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


def _clipped(spec: LossSpec, source: _Source, sample: Sequence[Scores], report: ScoreReport) -> list[str]:
    """Name a loss that clips scores which differ to equal ones."""
    options = _options(spec)
    if "low" not in options:
        return []
    lost = inspect(_as_read(spec, sample)).equal_lists - report.equal_lists
    if not lost:
        return []
    # What is not stored is not normalised.
    otherwise = ", or teacher.normalise to percentile" if source.stored else ""
    line = (
        f"losses: {spec.name} clips the {source.name}'s scores to low {options['low']:g} and high {options['high']:g}, "
        f"where those of {lost} of {report.queries} lists become equal and teach nothing; set low and high to their "
        f"1st and 99th percentile, {report.p1:.3g} and {report.p99:.3g}{otherwise}"
    )
    return [line]


def _temperature(spec: LossSpec) -> tuple[str, float]:
    """Return the option that divides the teacher's scores in a softmax, and its value; empty where there is none."""
    options = _options(spec)
    names = ["teacher_temperature"]
    # Beside in-batch scores it divides the student's alone.
    if loss_info(spec.name, spec.options).kind != "in_batch":
        names.append("temperature")
    return next(((name, float(options[name])) for name in names if name in options), ("", 1.0))


def _underflow(spec: LossSpec, source: _Source, sample: Sequence[Scores]) -> list[str]:
    option, temperature = _temperature(spec)
    if not option:
        return []
    report = inspect([scores / temperature for scores in _as_read(spec, sample)])
    if not report.underflow or report.enough is None:
        return []
    line = (
        f"losses: at {spec.name}'s {option} {temperature:g}, {report.underflow:.1%} of the {source.name}'s scores "
        f"underflow the softmax and teach nothing (its lists spread over {report.mean_spread * temperature:.3g} on "
        f"average); {option} {temperature * report.enough:.2g} would do"
    )
    return [line]
