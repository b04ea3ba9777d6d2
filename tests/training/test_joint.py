"""RocketQAv2: a reranker that learns along with the student; both resume, both move, and for the right reasons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_jobs import SCHEDULE, Job, curve, events, reranker, stopping_after

from retrieval_kd.recipes.schema import LossSpec, ScheduleSpec

LOSSES = (LossSpec("joint_listwise"),)
DETACHED = (LossSpec("joint_listwise", options={"detach_teacher": True}),)


def together(
    folder: Path, losses: Any = LOSSES, schedule: ScheduleSpec = SCHEDULE, rate: float = 1e-3
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train both and return their weights."""
    work = Job(dropout=0.2)
    joint = reranker(work, rate)
    work.run(folder, losses, schedule, joint=joint)
    return work.student.state_dict(), joint.module.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_both_learn(tmp_path: Path) -> None:
    """Without it the reranker could stay as it was and be called jointly trained."""
    work = Job()
    joint = reranker(work, rate=1e-2, dropout=0.0)
    before = [{name: t.clone() for name, t in module.state_dict().items()} for module in (work.student, joint.module)]
    work.run(tmp_path, LOSSES, ScheduleSpec(**{**vars(SCHEDULE), "epochs": 8}), joint=joint)
    assert not same(before[0], work.student.state_dict())
    assert not same(before[1], joint.module.state_dict())
    losses = [value for _, event, value in curve(tmp_path) if event == "train"]
    assert sum(losses[-6:]) < 0.85 * sum(losses[:6])


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Without it a resumed run would go on with a trained student and a fresh reranker."""
    with stopping_after(5):
        together(tmp_path / "a")
    resumed = together(tmp_path / "a")
    whole = together(tmp_path / "b")
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert same(resumed[0], whole[0])
    assert same(resumed[1], whole[1])


def test_a_detached_reranker_learns_from_its_labels_alone(tmp_path: Path) -> None:
    """Without it the option would be a word: a student that learns faster would drag the reranker along."""
    last = ScheduleSpec(**{**vars(SCHEDULE), "evaluations": 1, "clip": 1e9})
    faster = ScheduleSpec(**{**vars(last), "learning_rate": 3e-2})
    alone = [together(tmp_path / f"d{i}", DETACHED, how) for i, how in enumerate((last, faster))]
    assert not same(alone[0][0], alone[1][0])
    assert same(alone[0][1], alone[1][1])
    joined = [together(tmp_path / f"j{i}", LOSSES, how) for i, how in enumerate((last, faster))]
    assert not same(joined[0][1], joined[1][1])


def test_the_reranker_has_a_rate_of_its_own(tmp_path: Path) -> None:
    """Without it a cross-encoder would train at a bi-encoder's rate and forget what it knew."""
    slow, fast = (together(tmp_path / str(rate), rate=rate)[1] for rate in (1e-6, 1e-3))
    start = reranker(Job()).module.state_dict()

    def moved(weights: dict[str, torch.Tensor]) -> float:
        return max(float((weights[name] - start[name]).abs().max()) for name in start)

    assert moved(slow) < 2e-5
    assert moved(fast) > 1e-3


def test_caching_moves_both_alike(tmp_path: Path) -> None:
    """Without it the reranker's gradients would be those of the last micro-batch, or of other dropout draws."""
    for cached in (False, True):
        together(tmp_path / str(cached), schedule=replace(SCHEDULE, epochs=1, gradient_cache=cached, micro_tokens=32))
    # Not the weights: Adam turns the sign of a gradient that is zero but for rounding into a whole step.
    for one, other in zip(events(tmp_path / "False"), events(tmp_path / "True"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
