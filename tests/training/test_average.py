"""Averages of weights: by hand, resumed, and left in the student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from training_jobs import SCHEDULE, Job, stopping_after

from retrieval_kd.recipes.schema import ScheduleSpec
from retrieval_kd.training.average import WeightAverage


def walk(schedule: ScheduleSpec, values: list[float]) -> float:
    """Average a one-weight model that takes these values, one a step."""
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, schedule)
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model, step / len(values))
    return average.of(model).weight.item()  # type: ignore[operator, union-attr]


def test_averages_by_hand() -> None:
    """Without it the untrained weights could count, or the half of the steps that was to be left out."""
    uniform = ScheduleSpec(average="uniform", average_from=0.5)
    assert walk(uniform, [100, 100, 1, 2]) == pytest.approx(1.5)
    ema = ScheduleSpec(average="ema", average_decay=0.9, average_from=0.0)
    assert walk(ema, [1, 2, 4]) == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4)


def test_equal_weights_average_to_themselves() -> None:
    """Without it the average of identical checkpoints could drift."""
    assert walk(ScheduleSpec(average="uniform", average_from=0.0), [0.1] * 50) == pytest.approx(0.1, abs=1e-7)


def test_before_the_first_step_that_counts_the_model_itself_is_measured() -> None:
    """Without it early evaluations would measure the untrained student, and call it the best."""
    model = nn.Linear(1, 1)
    average = WeightAverage(model, ScheduleSpec(average="uniform"))
    average.update(model, 0.5)
    assert average.of(model) is model


@pytest.mark.parametrize("kind", ["uniform", "ema"])
def test_an_interrupted_average_goes_on_to_the_bit(tmp_path: Path, kind: Literal["uniform", "ema"]) -> None:
    """Without it a resumed run would average the second half of its steps alone."""
    schedule = replace(SCHEDULE, average=kind, average_from=0.2, checkpoints=9)
    whole, plain, resumed = Job(), Job(), Job()
    whole.run(tmp_path / "whole", schedule=schedule)
    plain.run(tmp_path / "plain", schedule=SCHEDULE)
    with stopping_after(6):
        Job().run(tmp_path / "resumed", schedule=schedule)
    resumed.run(tmp_path / "resumed", schedule=schedule)
    ours, theirs, without = (job.student.state_dict() for job in (whole, resumed, plain))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert any(not torch.equal(tensor, without[name]) for name, tensor in ours.items())
