"""Gradients: against finite differences, at limits, under padding and in low precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import gradient, random_inputs, value
from torch import Tensor

from retrieval_kd.losses.inputs import InBatchInputs, StackInputs
from retrieval_kd.losses.registry import LOSSES, loss_info

# (loss, options, fields with gradient). TAID and self-distillation detach a target made of the student, which finite
# differences cannot see: they are checked where that target stands still.
CHECKS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("margin_mse", {"scale": 3.0}, ("student",)),
    ("in_batch_margin_mse", {"scale": 3.0}, ("student",)),
    ("listwise_kl", {}, ("student",)),
    ("listwise_kl", {"detach_teacher": False, "student_temperature": 0.3}, ("student", "teacher")),
    ("listwise_kl", {"detach_teacher": False, "direction": "student_teacher"}, ("student", "teacher")),
    ("listwise_kl", {"square_temperature": True, "reduction": "mean", "teacher_temperature": 2.0}, ("student",)),
    ("cross_entropy", {}, ("student",)),
    ("ranknet", {}, ("student",)),
    ("ranknet", {"weighting": "margin", "reduction": "sum", "scale": 4.0}, ("student",)),
    ("lambdarank", {}, ("student",)),
    ("lambdarank", {"cutoff": 2, "scale": 5.0}, ("student",)),
    ("list_mle", {"student_temperature": 0.2}, ("student",)),
    ("plackett_luce", {"student_temperature": 0.2}, ("student",)),
    ("pointwise_mse", {"scale": 10.0}, ("student",)),
    ("scaled_listwise_kl", {"low": -1.0, "high": 2.0}, ("student",)),
    ("joint_listwise", {}, ("student", "teacher")),
    ("joint_listwise", {"direction": "student_teacher", "reduction": "mean"}, ("student", "teacher")),
    ("joint_listwise", {"teacher_temperature": 3.0}, ("student", "teacher")),
    ("prod", {}, ("student",)),
    ("learning_without_forgetting", {}, ("student",)),
    ("taid", {}, ("student",)),
    ("taid", {"direction": "student_teacher", "square_temperature": True}, ("student",)),
    ("taid", {"of": "prod"}, ("student",)),
    ("taid", {"of": "scaled_listwise_kl", "low": -1.0, "high": 2.0}, ("student",)),
    ("taid", {"of": "tct", "gamma": 0.3}, ("student",)),
    ("pair_distill", {"student_temperature": 0.1}, ("student",)),
    ("info_nce", {}, ("student",)),
    ("denoised_info_nce", {"temperature": 0.1, "low": -2.0, "high": 2.0}, ("student",)),
    ("soft_nearest_neighbour", {}, ("student",)),
    ("partial_plackett_luce", {"depth": 0}, ("student",)),
    ("tct", {"gamma": 0.3}, ("student",)),
    ("passage_centric", {}, ("student", "documents")),
    ("passage_centric", {"negatives": "documents_and_queries"}, ("student", "documents")),
    ("adaptive_margin", {}, ("student", "documents")),
    ("adaptive_margin", {"target": "adaptive", "penalty": "absolute"}, ("student", "documents")),
    ("adaptive_margin", {"target": "adaptive", "detach_target": True, "negatives": "in_batch"}, ("student",)),
    ("adaptive_margin", {"target": "static", "penalty": "logistic"}, ("student",)),
    ("embedding_regression", {}, ("student",)),
    ("embedding_regression", {"kind": "l2"}, ("student",)),
    ("embedding_regression", {"kind": "cosine"}, ("student",)),
    ("contrastive_kd", {"temperature": 0.2}, ("student",)),
    ("relational_distance", {}, ("student",)),
    ("relational_angle", {}, ("student",)),
    ("layer_alignment", {}, ("student",)),
    ("self_distillation", {}, ("student",)),
]


def still(name: str, options: dict[str, Any]) -> tuple[Any, Callable[[Tensor], Tensor], dict[str, Any]]:
    """Return inputs, a map of their student, and options for which no detached target moves with the student."""
    inputs = random_inputs(loss_info(name, options).kind)
    if name == "taid":
        return dataclasses.replace(inputs, blend=torch.tensor(1.0)), lambda student: student, {}
    if name == "self_distillation":
        held = {"ensemble_weights": [1.0, 0.0, 0.0], "head_weights": [1.0, 1.0, 0.1]}
        return inputs, lambda student: torch.cat([inputs.student[:1], student[1:]]), held
    return inputs, lambda student: student, {}


def test_every_registered_loss_has_its_gradient_checked() -> None:
    """A new loss without a check could leak gradient through its masks unseen."""
    assert {name for name, _, _ in CHECKS} == set(LOSSES)


@pytest.mark.parametrize(("name", "options", "fields"), CHECKS, ids=lambda x: str(x))
def test_gradient_equals_finite_differences(name: str, options: dict[str, Any], fields: tuple[str, ...]) -> None:
    """A stray detach or an in-place change would leave the loss right and the training wrong."""
    inputs, held, extra = still(name, options)

    def loss(*tensors: Tensor) -> Tensor:
        given = dict(zip(fields, tensors, strict=True))
        given["student"] = held(given["student"])
        return value(name, dataclasses.replace(inputs, **given), options | extra)

    tensors = [getattr(inputs, name).detach().clone().requires_grad_() for name in fields]
    assert torch.autograd.gradcheck(loss, tensors, eps=1e-7, atol=1e-5, rtol=1e-4)


def padded(inputs: Any, width: int) -> Any:
    """Return the inputs with ``width`` more candidates that are masked out and hold NaN or infinity."""
    changes: dict[str, Tensor] = {}
    size = inputs.mask.shape[1]
    for field in dataclasses.fields(inputs):
        tensor = getattr(inputs, field.name)
        if tensor is None or tensor.dim() < 2:
            continue
        if field.name == "documents":
            # Documents of the batch are all real: the added ones are just nobody's candidates.
            changes[field.name] = torch.nn.functional.pad(tensor, (0, width, 0, width), value=0.5)
            continue
        square = tensor.dim() == 3 and tensor.shape[1] == size and not isinstance(inputs, StackInputs)
        fill = 0 if tensor.dtype == torch.bool else float("nan")
        changes[field.name] = torch.nn.functional.pad(
            tensor, (0, width, 0, width) if square else (0, width), value=fill
        )
    return dataclasses.replace(inputs, **changes)


MASKED = [(name, options) for name, options, _ in CHECKS if LOSSES[name].kind != "embeddings"]


@pytest.mark.parametrize(("name", "options"), MASKED, ids=lambda x: str(x))
def test_padding_is_as_good_as_absent(name: str, options: dict[str, Any]) -> None:
    """Padding that leaks makes a query's loss depend on which longer lists share its batch."""
    inputs = random_inputs(loss_info(name, options).kind)
    wide = padded(inputs, 2)
    assert value(name, wide, options).item() == pytest.approx(value(name, inputs, options).item(), rel=1e-12)
    size = inputs.student.shape[-1]
    found = gradient(name, wide, options)
    torch.testing.assert_close(found[..., :size], gradient(name, inputs, options), rtol=1e-9, atol=1e-12)
    assert not found[..., size:].any()


PER_QUERY = [
    "listwise_kl", "cross_entropy", "lambdarank", "list_mle", "plackett_luce", "scaled_listwise_kl",
    "joint_listwise", "prod", "learning_without_forgetting", "taid",
]  # fmt: skip


@pytest.mark.parametrize("name", PER_QUERY)
def test_a_batch_of_ragged_lists_is_the_mean_of_its_queries(name: str) -> None:
    """Rows that mix would make the loss depend on who shares the batch."""
    inputs = random_inputs("scores")
    alone = []
    for row in range(3):
        length = int(inputs.mask[row].sum())
        cut = {
            f: getattr(inputs, f)[row : row + 1, :length]
            for f in ("student", "teacher", "previous", "mask", "positives")
        }
        alone.append(value(name, dataclasses.replace(inputs, **cut)).item())
    assert value(name, inputs).item() == pytest.approx(sum(alone) / 3, rel=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_extreme_scores_give_finite_gradients(name: str) -> None:
    """A softmax that underflows must not turn into NaN: 0 * inf in one list would end the run."""
    inputs = random_inputs(LOSSES[name].kind, dtype=torch.float32)
    spread = {"student": inputs.student * 1e4}
    if getattr(inputs, "teacher", None) is not None and name != "adaptive_margin":
        spread["teacher"] = inputs.teacher * 1e4
    found = gradient(name, dataclasses.replace(inputs, **spread))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", sorted(n for n in LOSSES if "teacher" in LOSSES[n].needs))
def test_a_teacher_that_cannot_tell_candidates_apart_gives_no_nan(name: str) -> None:
    """All-equal scores mean no pairs, no spread, no ranks: each is a division by zero waiting."""
    inputs = random_inputs(LOSSES[name].kind)
    flat = dataclasses.replace(inputs, teacher=torch.full_like(inputs.teacher, 0.3))
    assert torch.isfinite(value(name, flat))
    assert torch.isfinite(gradient(name, flat)).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_low_precision_is_computed_in_float32(name: str) -> None:
    """Under autocast scores come in bfloat16; a softmax in 8 bits of mantissa would lose the teacher's order."""
    inputs = random_inputs(LOSSES[name].kind, dtype=torch.float32)
    low = dataclasses.replace(inputs, student=inputs.student.bfloat16())
    high = dataclasses.replace(inputs, student=inputs.student.bfloat16().float())
    assert value(name, low).dtype == torch.float32
    assert value(name, low).item() == pytest.approx(value(name, high).item(), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in sorted(LOSSES) if "teacher" in LOSSES[n].needs and n != "joint_listwise"])
def test_the_teacher_gets_no_gradient(name: str) -> None:
    """A frozen teacher that carries a graph would double the memory; a live one would drift to please the student."""
    inputs = random_inputs(LOSSES[name].kind)
    teacher = inputs.teacher.clone().requires_grad_()
    student = inputs.student.clone().requires_grad_()
    value(name, dataclasses.replace(inputs, teacher=teacher, student=student)).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("name", "count"),
    [("contrastive_kd", 1), ("relational_distance", 1), ("relational_angle", 1), ("relational_angle", 2)],
)
def test_too_few_vectors_to_compare_cost_nothing(name: str, count: int) -> None:
    """An epoch's last batch may have one or two texts: the run would die there, or go on with NaN."""
    full = random_inputs("embeddings")
    few = dataclasses.replace(full, student=full.student[:count], teacher=full.teacher[:count], bank=full.bank[:0])
    assert value(name, few).item() == 0.0
    assert gradient(name, few).tolist() == [[0.0] * 3] * count


def test_a_batch_left_without_negatives_still_backpropagates() -> None:
    """When every negative looks like a false one the step must be 0, not a crash hours in."""
    inputs = random_inputs("in_batch")
    assert isinstance(inputs, InBatchInputs)
    all_scored = dataclasses.replace(
        inputs,
        scored=torch.ones_like(inputs.mask),
        teacher=torch.ones_like(inputs.student),
        mask=torch.ones_like(inputs.mask),
    )
    assert value("denoised_info_nce", all_scored).item() == 0.0
    assert not gradient("denoised_info_nce", all_scored).any()
