"""Teachers that would train nothing, named before the first step."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_jobs import Job

from retrieval_kd.errors import DataError
from retrieval_kd.recipes.schema import LossSpec
from retrieval_kd.training.batches import TrainingSet
from retrieval_kd.training.preflight import teacher_warnings

KL = LossSpec("listwise_kl")


def data(scale: float) -> TrainingSet:
    job = Job()
    return replace(job.data, teacher=[scale * scores for scores in job.data.teacher or ()])


def test_scores_on_a_sane_scale_need_no_warning() -> None:
    """Without it every run would begin with warnings that nobody reads."""
    losses = [KL, LossSpec("margin_mse"), LossSpec("prod"), LossSpec("embedding_regression"), LossSpec("tct")]
    assert teacher_warnings(data(1.0), losses) == ()


def test_equal_scores_are_named() -> None:
    """Without it a collapsed teacher would train a uniform student at a plausible, falling loss."""
    assert teacher_warnings(data(0.0), [KL]) == (
        "teacher: all scores within each list are equal, so there is nothing to learn; check the teacher",
    )
    some = data(1.0)
    assert some.teacher is not None
    some.teacher[3][:] = 2.0  # type: ignore[index]
    assert teacher_warnings(some, [KL]) == ("teacher: 1 of 24 lists have equal scores and teach nothing",)


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        (LossSpec("listwise_kl", options={"teacher_temperature": 0.01}), "teacher_temperature"),
        (LossSpec("tct"), "teacher_temperature"),
        (LossSpec("prod", options={"temperature": 0.05}), "temperature"),
        (LossSpec("taid", options={"teacher_temperature": 0.05}), "teacher_temperature"),
        (LossSpec("taid", options={"of": "prod", "temperature": 0.05}), "temperature"),
        (LossSpec("plackett_luce", options={"teacher_temperature": 0.05}), "teacher_temperature"),
    ],
)
def test_the_temperature_named_would_do(spec: LossSpec, option: str) -> None:
    """Without it the advice could leave the softmax as one-hot as it was."""
    scores = data(40.0)
    (line,) = teacher_warnings(scores, [spec])
    found = re.search(rf"at {spec.name}'s {option} .* {option} ([\d.e+]+) would do", line)
    assert found, line
    assert teacher_warnings(scores, [replace(spec, options={option: float(found[1])})]) == ()


def test_losses_without_a_softmax_of_the_teacher_are_not_warned_of() -> None:
    """Without it Margin-MSE on raw logits, its own recipe, would be called broken."""
    names = ["margin_mse", "ranknet", "info_nce", "pointwise_mse", "partial_plackett_luce"]
    losses = [*(LossSpec(name) for name in names), LossSpec("tct", teacher="encoder")]
    assert teacher_warnings(data(1000.0), losses) == ()


@pytest.mark.parametrize("name", ["scaled_listwise_kl", "denoised_info_nce"])
def test_scores_that_are_clipped_to_equal_ones_are_named_and_the_advice_helps(name: str) -> None:
    """Without it logits below 0 would all be clipped to 0: a loss of exactly 0 to the end of the run, or no mask."""
    raw = data(1000.0)
    assert raw.teacher is not None
    logits = replace(raw, teacher=[scores - 20_000 for scores in raw.teacher])
    (line,) = teacher_warnings(logits, [LossSpec(name)])
    assert "to low 0 and high 1, where those of 24 of 24 lists become equal" in line
    bounds = re.search(r"percentile, ([-\d.e+]+) and ([-\d.e+]+), or", line)
    assert bounds, line
    assert teacher_warnings(logits, [LossSpec(name, options={"low": float(bounds[1]), "high": float(bounds[2])})]) == ()


def test_lists_equal_before_they_are_clipped_are_not_named_twice() -> None:
    """Without it the advice to move the bounds would be given where the teacher is to blame."""
    some = data(0.01)
    assert some.teacher is not None
    some.teacher[3][:] = 0.5  # type: ignore[index]
    spec = LossSpec("scaled_listwise_kl", options={"low": -1.0})
    assert teacher_warnings(some, [spec]) == ("teacher: 1 of 24 lists have equal scores and teach nothing",)


def test_a_scale_of_the_teacher_counts_in_its_softmax() -> None:
    """Without it PROD would be measured at scores that its softmax never sees."""
    spec = LossSpec("prod", options={"teacher_scale": 1000.0})
    (line,) = teacher_warnings(data(1.0), [spec])
    assert "at prod's temperature 4" in line
    assert teacher_warnings(data(1000.0), [replace(spec, options={"teacher_scale": 0.001})]) == ()


def test_a_score_that_is_no_number_stops_the_run_and_is_named() -> None:
    """Without it one NaN would reach the loss hours later, without its query."""
    broken = data(1.0)
    assert broken.teacher is not None
    broken.teacher[5][2] = np.nan  # type: ignore[index]
    item = broken.lists[5]
    with pytest.raises(DataError, match=rf"query '{item.query_id}' and document '{item.doc_ids[2]}' is nan"):
        teacher_warnings(broken, [KL])


def test_a_run_says_it_and_keeps_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without it the warning would scroll away, and the manifest would show a clean run."""
    job = Job()
    job.data = data(0.0)
    with caplog.at_level(logging.WARNING):
        summary = job.run(tmp_path, (KL,))
    assert "nothing to learn" in caplog.text
    assert len(summary["warnings"]) == 1
