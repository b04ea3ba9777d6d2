"""What every loss refuses, with a message that says what is wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, get_args, get_origin

import pytest
import torch
from loss_cases import random_inputs, value

from retrieval_kd.errors import DataError, RecipeError, RkdError
from retrieval_kd.losses.checks import Positive, option_types
from retrieval_kd.losses.registry import LOSSES, bind

ALL = sorted(LOSSES)
MASKED = [n for n in ALL if "mask" in LOSSES[n].needs]
BESIDE = [(n, f) for n in ALL for f in ("previous", "documents", "bank") if f in LOSSES[n].needs]
TAUGHT = [n for n in ALL if "teacher" in LOSSES[n].needs]


def refused(name: str, message: str, **changes: object) -> None:
    inputs = dataclasses.replace(random_inputs(LOSSES[name].kind), **changes)
    with pytest.raises(DataError, match=message) as caught:
        value(name, inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ALL)
def test_a_student_score_that_is_no_number(name: str, bad: float) -> None:
    """One NaN reaches every weight in one step."""
    student = random_inputs(LOSSES[name].kind).student.clone()
    student.view(-1)[0] = bad
    refused(name, "student .*NaN and infinity" if name != "joint_listwise" else "NaN and infinity", student=student)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("name", TAUGHT)
def test_a_teacher_score_that_is_no_number(name: str, bad: float) -> None:
    """Missing teacher scores often come as NaN; trained on, they end the run."""
    teacher = random_inputs(LOSSES[name].kind).teacher.clone()
    teacher.view(-1)[0] = bad
    refused(name, "NaN and infinity", teacher=teacher)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "field"), BESIDE)
def test_other_values_that_are_no_numbers(name: str, field: str, bad: float) -> None:
    """Without it a NaN of a frozen copy, of a document or of a bank would reach every weight as a teacher's does."""
    values = getattr(random_inputs(LOSSES[name].kind), field).clone()
    values[-1, 0] = bad
    refused(name, "NaN and infinity", **{field: values})


@pytest.mark.parametrize("name", TAUGHT)
def test_a_narrower_teacher(name: str) -> None:
    """It would broadcast: every candidate gets one target, a uniform distribution at a plausible loss."""
    teacher = random_inputs(LOSSES[name].kind).teacher
    if name in ("relational_distance", "relational_angle"):
        refused(name, "same texts", teacher=teacher[:1])
    else:
        refused(name, "differ|dimensions", teacher=teacher[..., :1])


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_another_shape_or_type(name: str) -> None:
    """A [B, 1] mask broadcasts, and a mask of 0 and 1 multiplies where it should select."""
    mask = random_inputs(LOSSES[name].kind).mask
    refused(name, "differ in shape|allow|padding", mask=mask[:, :1])
    refused(name, "torch.bool", mask=mask.float())


@pytest.mark.parametrize("name", MASKED)
def test_fewer_than_two_candidates(name: str) -> None:
    """The softmax of one candidate is 1: the query trains nothing and weighs in the mean."""
    inputs = random_inputs(LOSSES[name].kind)
    mask = inputs.mask.clone()
    mask[1, :] = False
    mask[1, 2] = True
    changes = {"mask": mask}
    if hasattr(inputs, "compared"):
        changes["compared"] = torch.zeros_like(inputs.compared)
    refused(name, "row 1 has fewer than two|row 4 has fewer than two", **changes)


@pytest.mark.parametrize("name", [n for n in ALL if LOSSES[n].kind == "embeddings"])
def test_no_vectors(name: str) -> None:
    """A batch without texts has no mean."""
    inputs = random_inputs("embeddings")
    refused(name, "empty", student=inputs.student[:0], teacher=inputs.teacher[:0])


def options_of(wanted: object) -> list[tuple[str, str]]:
    return [(n, o) for n in ALL for o, kind in option_types(LOSSES[n].function).items() if kind == wanted]


@pytest.mark.parametrize(("name", "option"), options_of(Positive))
@pytest.mark.parametrize("bad", [0, -1.0, math.inf, math.nan, "1", True, None])
def test_temperatures_and_scales_that_are_not_positive_numbers(name: str, option: str, bad: object) -> None:
    """Zero divides, a negative one ranks backwards, infinity makes every list flat; a recipe hears of it by name."""
    with pytest.raises(RecipeError, match=f"{option}: .* above 0 .*{name}"):
        bind(name, {option: bad})
    with pytest.raises(DataError, match=f"{option}: .* above 0"):
        LOSSES[name].function(*LOSSES[name].arguments(random_inputs(LOSSES[name].kind)), **{option: bad})


def test_every_option_has_a_type_that_is_checked() -> None:
    """A bare float would take NaN."""
    for name in ALL:
        for option, kind in option_types(LOSSES[name].function).items():
            checked = kind is bool or get_origin(kind) in (Annotated, tuple) or bool(get_args(kind))
            assert checked, f"{name}.{option}: {kind}"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("listwise_kl", {"direction": "both"}, "direction: 'both' is not one of teacher_student, student_teacher"),
        ("listwise_kl", {"square_temperature": 1}, "square_temperature: 1 is neither true nor false"),
        ("tct", {"gamma": 1.5}, "gamma: 1.5 is not a number in 0..1"),
        ("lambdarank", {"cutoff": 2.5}, "cutoff: 2.5 is not a finite whole number of at least 0"),
        ("self_distillation", {"head_weights": 3}, "head_weights: 3 is not a list"),
        ("self_distillation", {"head_weights": [1, -1]}, "head_weights: -1 is not"),
        ("adaptive_margin", {"margin": math.nan}, "margin: nan is not a finite number"),
    ],
)
def test_other_options_out_of_range(name: str, options: dict[str, object], message: str) -> None:
    """Each is one line in a recipe, and the message names it."""
    with pytest.raises(RecipeError, match=message):
        bind(name, options)


@pytest.mark.parametrize(
    "name", ["margin_mse", "cross_entropy", "plackett_luce", "joint_listwise", "prod", "layer_alignment"]
)
def test_a_positive_that_is_padding(name: str) -> None:
    """Losses that read column 0 as the positive would train towards padding."""
    mask = random_inputs("scores").mask.clone()
    mask[1, 0] = False
    refused(name, "column 0", mask=mask)


@pytest.mark.parametrize("name", [n for n in ALL if "positives" in LOSSES[n].needs and LOSSES[n].kind == "in_batch"])
def test_labels_that_cannot_be_learnt_in_a_batch(name: str) -> None:
    """No positive is log 0, no negative a constant, a forbidden positive a contradiction."""
    inputs = random_inputs("in_batch")
    none, every = inputs.positives.clone(), inputs.positives.clone()
    none[1] = False
    every[1] = inputs.mask[1]
    forbidden = inputs.positives.clone()
    forbidden[1, 6] = True
    refused(name, "no positive", positives=none)
    refused(name, "no negative|not allow", positives=every)
    refused(name, "not allow", positives=forbidden)
    refused(name, "positives .* differ", positives=inputs.positives[:, :1])


@pytest.mark.parametrize("name", ["cross_entropy", "joint_listwise", "prod", "layer_alignment"])
def test_positives_of_another_shape(name: str) -> None:
    """They would broadcast one column's judgement over the list."""
    refused(name, "positives .* differ in shape", positives=random_inputs("scores").positives[:, :1])


@pytest.mark.parametrize("name", [n for n in ALL if "scored" in LOSSES[n].needs])
def test_scored_of_another_shape(name: str) -> None:
    """It would broadcast one column's knowledge over the batch."""
    refused(name, "scored .* differ in shape", scored=random_inputs("in_batch").scored[:, :1])


@pytest.mark.parametrize("bad", [1.5, -0.2, math.nan])
def test_preferences_that_are_no_probabilities(bad: float) -> None:
    """The released code stores log-probabilities; taken for probabilities they give a negative cross-entropy."""
    inputs = random_inputs("pairs")
    preferences = inputs.preferences.clone()
    preferences[inputs.compared] = bad
    refused("pair_distill", "0..1|NaN", preferences=preferences)


def test_comparisons_with_padding_and_of_another_shape() -> None:
    """A pair with padding compares a document with nothing."""
    inputs = random_inputs("pairs")
    refused("pair_distill", "padding in it", compared=torch.ones_like(inputs.compared))
    refused("pair_distill", "preferences", preferences=inputs.preferences[:, :, :1])
    refused("pair_distill", "compared", compared=inputs.compared[:, :, :1])


def test_document_similarities_that_do_not_fit() -> None:
    """Raw dot products leave the target's 0..1; a narrow matrix is of other documents."""
    documents = random_inputs("in_batch").documents
    refused("adaptive_margin", "not cosines", documents=documents * 9)
    refused("adaptive_margin", "documents .* must be", documents=documents[:3])
    refused("passage_centric", "documents .* must be", documents=documents[:, :3])
    refused("adaptive_margin", "listed .* differ", listed=random_inputs("in_batch").listed[:, :1])


@pytest.mark.parametrize("name", ["passage_centric", "adaptive_margin"])
def test_towers_that_do_not_share_an_encoder(name: str) -> None:
    """PAIR and ARM compare documents with documents; asymmetric training has no such similarities."""
    refused(name, f"{name} needs 'documents'", documents=None)


def test_lambdarank_grades_below_zero() -> None:
    """2^t - 1 of raw logits is a gain below 0."""
    inputs = random_inputs("scores")
    with pytest.raises(DataError, match="minmax"):
        value("lambdarank", inputs, {"gain": "exponential"})


def test_weights_for_another_number_of_heads_and_percentiles_upside_down() -> None:
    """Both would broadcast or turn the teacher round."""
    with pytest.raises(DataError, match="2 weights for 3 heads"):
        value("self_distillation", random_inputs("stacks"), {"head_weights": [1.0, 2.0]})
    with pytest.raises(DataError, match=r"low: 2\.0 must be below high: 1\.0"):
        value("scaled_listwise_kl", random_inputs("scores"), {"low": 2.0})


@pytest.mark.parametrize("blend", [torch.tensor(1.5), torch.tensor([0.5]), torch.tensor(math.nan)])
def test_blends_outside_the_segment(blend: torch.Tensor) -> None:
    """Beyond 1 the target runs past the teacher."""
    refused("taid", "blend", blend=blend)


def test_a_bank_of_another_width() -> None:
    """Vectors of another encoder left in a resumed bank."""
    refused("contrastive_kd", "bank", bank=torch.ones(2, 7))


@pytest.mark.parametrize("name", ALL)
def test_errors_are_the_products_own(name: str) -> None:
    """The command line prints RkdError as one line and everything else as a crash."""
    empty = dataclasses.replace(random_inputs(LOSSES[name].kind), student=torch.empty(0))
    with pytest.raises(RkdError):
        value(name, empty)


def test_a_positive_that_the_teacher_did_not_score() -> None:
    """Its zero-filled score would stand for the teacher's in every margin."""
    inputs = random_inputs("in_batch")
    refused("in_batch_margin_mse", "no positive with a teacher score", scored=~inputs.positives)
