"""Teachers that would train nothing, named before the first step."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from training_jobs import ROWS, SCHEDULE, Job, matrix, reranker

from retrieval_kd.errors import DataError
from retrieval_kd.recipes.schema import LossSpec
from retrieval_kd.training import loop
from retrieval_kd.training.batches import TrainingSet
from retrieval_kd.training.machine import Machine
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


SHORT = replace(SCHEDULE, epochs=1)


def scored_live(source: str, scale: float) -> Callable[[Path, LossSpec], tuple[str, ...]]:
    """Return what trains on a teacher that scores each batch as it comes, its scores ``scale`` times a sane size."""
    work = Job()
    work.data = replace(work.data, teacher=None)
    options = {}
    if source == "encoder":
        work.data = replace(work.data, query_targets=scale * work.data.query_targets)
    elif source == "late_interaction":
        work.data = replace(work.data, maxsim=matrix(work, scale))
    elif source == "layers":
        options["layer_teacher"] = layer_teacher = work.layer_teacher()
        encode = layer_teacher.queries.encode

        def longer(*arguments: object) -> object:
            encoded = encode(*arguments)  # type: ignore[arg-type]
            return replace(encoded, layers=scale * encoded.layers)  # type: ignore[operator]

        layer_teacher.queries.encode = longer  # type: ignore[assignment, method-assign]
    else:
        options["joint"] = joint = reranker(work)  # type: ignore[assignment]
        with torch.no_grad():
            joint.module.classifier.weight.mul_(10 * scale)  # type: ignore[union-attr, operator]

    def warned(folder: Path, spec: LossSpec) -> tuple[str, ...]:
        return tuple(work.run(folder, (spec,), SHORT, **options)["warnings"])

    return warned


LIVE = [
    ("encoder", LossSpec("tct", teacher="encoder")),
    ("encoder", LossSpec("listwise_kl", teacher="encoder")),
    ("late_interaction", LossSpec("tct", teacher="late_interaction")),
    ("layers", LossSpec("layer_alignment")),
    ("joint", LossSpec("joint_listwise")),
]
CALLED = {"late_interaction": "late-interaction teacher", "layers": "layer teacher", "joint": "teacher"}


@pytest.mark.parametrize(("source", "spec"), LIVE)
def test_a_teacher_that_scores_as_training_goes_is_looked_at_too(tmp_path: Path, source: str, spec: LossSpec) -> None:
    """Without it MaxSim sums or logits in the thousands would train to the end on one document a list, unsaid."""
    option = "temperature" if source == "layers" else "teacher_temperature"
    name = CALLED.get(source, source)
    (line,) = scored_live(source, 5000.0)(tmp_path / "wide", spec)
    found = re.search(rf"at {spec.name}'s {option} .* of the {name}'s scores .* {option} ([\d.e+]+) would do", line)
    assert found, line
    mended = replace(spec, options={option: float(found[1])})
    assert scored_live(source, 5000.0)(tmp_path / "mended", mended) == ()
    assert scored_live(source, 1.0)(tmp_path / "sane", spec) == ()
    nothing = f"{name}: all scores within each list are equal, so there is nothing to learn; check the {name}"
    assert scored_live(source, 0.0)(tmp_path / "flat", spec) == (nothing,)


def test_a_look_ahead_draws_nothing_and_keeps_nothing() -> None:
    """Without it a resumed run could warn of other shares, and three batches of activations would stay in memory."""
    work = Job("symmetric", dropout=0.3)
    joint = reranker(work)
    run = loop._Run(
        Machine(), work.student, work.documents, work.data, (LossSpec("joint_listwise"),), SHORT, None, joint
    )
    one, other = run.preview(ROWS), run.preview(ROWS)
    assert one.teacher is not None
    assert other.teacher is not None
    for tensor, again in ((one.queries, other.queries), (one.teacher, other.teacher)):
        assert torch.equal(tensor, again)
        assert tensor.grad_fn is None


def test_stored_scores_cost_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it every run would encode batches for teachers whose scores lie there to be read."""
    monkeypatch.setattr(loop._Run, "preview", None)
    work = Job()
    work.run(tmp_path, (KL, LossSpec("pair_distill"), LossSpec("tct"), LossSpec("embedding_regression")), SHORT)


def test_equal_scores_of_a_product_are_equal_up_to_its_rounding(tmp_path: Path) -> None:
    """Without it a collapsed encoder would pass, told from a good one by the last digits of a matrix product."""
    work = Job()
    rng = np.random.default_rng(1)
    work.data = replace(
        work.data,
        maxsim=lambda queries, docs: torch.from_numpy(30 * (1 + 1e-7 * rng.random((len(queries), len(docs))))),
    )
    (line,) = work.run(tmp_path, (LossSpec("tct", teacher="late_interaction"),), SHORT)["warnings"]
    assert "nothing to learn" in line


def test_a_member_that_prefers_nothing_is_named() -> None:
    """Without it the other member's order would hide a collapsed one, and half of a teacher be paid for in vain."""
    whole = data(1.0)
    assert whole.teacher is not None
    dead = [np.full_like(scores, -11.2) for scores in whole.teacher]
    rounded = [scores + np.float32(1e-6) * np.arange(len(scores), dtype=np.float32) for scores in dead]
    members = {"cross-encoder": [*rounded[:-1], whole.teacher[-1]], "bi-encoder": whole.teacher}
    both = replace(whole, members=lambda: members)
    (line,) = teacher_warnings(both, [KL])
    assert line.startswith("teacher member cross-encoder: all scores equal in 23 of 24 lists")
    assert teacher_warnings(both, [LossSpec("embedding_regression")]) == ()


def test_undecided_preferences_are_named() -> None:
    """Without it a pairwise teacher that answers one half to everything would train a uniform student."""
    spec = LossSpec("pair_distill")
    some = data(1.0)
    assert some.preferences is not None
    assert teacher_warnings(some, [spec]) == ()
    some.preferences[3][~np.isnan(some.preferences[3])] = 0.5  # type: ignore[index]
    assert teacher_warnings(some, [spec]) == ("teacher: 1 of 24 lists have undecided preferences and teach nothing",)
    undecided = replace(some, preferences=[np.full_like(one, 0.5) for one in some.preferences])
    (line,) = teacher_warnings(undecided, [spec])
    assert "all preferences within each list are undecided, so there is nothing to learn" in line


@pytest.mark.parametrize(
    ("source", "spec", "remedy"),
    [
        ("late_interaction", LossSpec("tct", teacher="late_interaction"), "mend the teacher"),
        ("joint", LossSpec("joint_listwise"), r"mend the teacher or lower joint\.learning_rate"),
    ],
)
def test_a_live_score_that_is_no_number_is_named(tmp_path: Path, source: str, spec: LossSpec, remedy: str) -> None:
    """Without it the error would name a row and a column of a batch that nobody can look up."""
    warned = scored_live(source, float("nan"))
    with pytest.raises(DataError, match=rf"^teacher: the score of query 'q\d+' and document 'd\d+' is nan; {remedy}$"):
        warned(tmp_path, spec)


def test_a_live_score_that_fails_later_is_named_with_its_step(tmp_path: Path) -> None:
    """Without it only the first batches would be looked at, and a document of the last epoch is found by nobody."""
    work, calls = Job(), []

    def score(query_ids: Sequence[str], doc_ids: Sequence[str]) -> Tensor:
        calls.append(doc_ids)
        scores = torch.rand(len(query_ids), len(doc_ids))
        scores[1, 2] = torch.inf if len(calls) == 5 else 0.0
        return scores

    work.data = replace(work.data, maxsim=score)
    with pytest.raises(
        DataError, match=r"^step 2: teacher: the score of query 'q\d+' and document '(d\d+)' is inf;"
    ) as told:
        work.run(tmp_path, (LossSpec("tct", teacher="late_interaction"),), SHORT)
    assert repr(calls[-1][2]) in str(told.value)
