"""What the log says about a step, by hand and against scipy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import kendalltau, zscore
from training_jobs import Job, curve, events

from retrieval_kd.recipes.schema import LossSpec
from retrieval_kd.training.metrics import MEANS, MetricsLog, agreement

ALL = torch.ones(1, 3, dtype=torch.bool)


def test_agreement_by_hand() -> None:
    """Without it a reversed comparison could call a student that ranks backwards a perfect copy."""
    teacher = torch.tensor([[3.0, 2.0, 1.0]])
    same, reversed_ = (agreement(student, teacher, ALL) for student in (teacher / 7, -teacher))
    assert (same["agreement_top1"], same["agreement_kendall"]) == (1, 1)
    assert same["agreement_kl"] == pytest.approx(0, abs=1e-12)
    assert same["student_spread"] == pytest.approx(2 / 7, rel=1e-6)
    assert same["teacher_spread"] == 2
    assert (reversed_["agreement_top1"], reversed_["agreement_kendall"]) == (0, -1)


def test_agreement_is_that_of_scipy_list_by_list() -> None:
    """Without it padding or ties could count, and the figure would depend on the longest list of a batch."""
    rng = np.random.default_rng(0)
    lengths = [2, 5, 7, 4]
    student, teacher = torch.zeros(4, 7), torch.full((4, 7), 99.0)
    mask = torch.zeros(4, 7, dtype=torch.bool)
    taus, divergences = [], []
    for i, length in enumerate(lengths):
        ours, theirs = rng.normal(size=length), rng.integers(0, 3, size=length).astype(float)
        theirs[:2] = [0, 2]
        mask[i, :length] = True
        student[i, :length], teacher[i, :length] = torch.tensor(ours), torch.tensor(theirs)
        taus.append(kendalltau(ours, theirs).statistic)
        p, q = (log_softmax(zscore(x)) for x in (theirs, ours))
        divergences.append(float((np.exp(p) * (p - q)).sum()))
    found = agreement(student, teacher, mask)
    assert found["agreement_kendall"] == pytest.approx(np.mean(taus), rel=1e-6)
    assert found["agreement_kl"] == pytest.approx(np.mean(divergences), rel=1e-6)


def test_a_teacher_that_cannot_decide_is_not_disagreed_with() -> None:
    """Without it a tie at the top would count as a miss, and equal scores as a NaN that JSON does not have."""
    tied = agreement(torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[5.0, 5.0, 1.0]]), ALL)
    assert tied["agreement_top1"] == 1
    flat = agreement(torch.tensor([[0.0, 1.0, 0.5]]), torch.ones(1, 3), ALL)
    assert flat["agreement_kendall"] is None
    assert flat["agreement_kl"] is not None
    json.dumps(flat, allow_nan=False)


def test_every_evaluation_stands_beside_the_agreement_since_the_one_before(tmp_path: Path) -> None:
    """Without it imitation and quality could not be told apart, or the means would run over the whole past."""
    summary = Job().run(tmp_path)
    train, dev = events(tmp_path), events(tmp_path, "dev")
    assert [row["step"] for row in dev] == [0, 3, 6, 9]
    for row in dev[1:]:
        steps = [one for one in train if row["step"] - 3 < one["step"] <= row["step"]]
        for key in MEANS:
            assert row[key] == pytest.approx(np.mean([one[key] for one in steps])), key
    assert {key: summary[key] for key in MEANS} == {key: dev[-1][key] for key in MEANS}
    assert summary["texts_per_second"] > 0
    assert all(0 <= row["padding"] < 1 for row in train)
    assert train[-1]["agreement_kl"] < train[0]["agreement_kl"]


def test_without_scores_the_encoder_is_agreed_with(tmp_path: Path) -> None:
    """Without it LEAF's log would have no agreement, or crash for want of a teacher."""
    job = Job("symmetric")
    job.data = replace(job.data, teacher=None)
    job.run(tmp_path, (LossSpec("embedding_regression"),))
    assert all(row["agreement_top1"] is not None for row in events(tmp_path))


def test_the_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """Without it a resumed run would log its steps twice, the first time with a torn line."""
    with MetricsLog(tmp_path, None) as log:
        for step in (1, 2, 3):
            log.write("train", step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    with MetricsLog(tmp_path, 2) as log:
        log.write("train", 3, {"loss": 30.0})
        assert log.means() == {"loss": 11.0}
    assert curve(tmp_path) == [(1, "train", 1.0), (2, "train", 2.0), (3, "train", 30.0)]
