"""Losses over several score lists of the same candidates: from layers (LEAD) or from heads (BGE-M3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from retrieval_kd.losses.checks import NonNegative, Positive, check_lists, own_negatives, require, validated
from retrieval_kd.losses.masked import masked_log_softmax


def _check(mask: Tensor, student: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
    """Check [K, B, L] stacks as K lists under one mask; return them zeroed where padded."""
    require(
        student.dim() == 3 and len(student) > 0, f"student {list(student.shape)} must be [lists, queries, candidates]"
    )
    for name, scores in others.items():
        require(scores.shape == student.shape, f"{name} {list(scores.shape)} and student {list(student.shape)} differ")
    tall = mask.unsqueeze(0).expand(len(student), *mask.shape).flatten(0, 1)
    checked = check_lists(
        tall, student.flatten(0, 1), **{name: scores.flatten(0, 1) for name, scores in others.items()}
    )
    return tuple(scores.view_as(student) for scores in checked)


def _divergences(target: Tensor, student: Tensor) -> Tensor:
    """Return KL(target || student) of log-softmaxed stacks, float [K]; mean over queries."""
    return (target.exp() * (target - student)).sum(-1).mean(-1)


def layer_weights(teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Return float [K], summing to 1: layers that find the positive (column 0) weigh more."""
    return torch.softmax(masked_log_softmax(teacher, mask)[..., 0].mean(-1) / temperature, dim=0)


@validated
def layer_alignment(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    positives: Tensor,
    *,
    temperature: Positive = 1.0,
    layer_temperature: Positive = 10.0,
) -> Tensor:
    """Weighted sum over matched layers of KL(teacher layer || student layer); widths and tokenizers may differ.

    Args:
        student: float [K, B, L], each layer's own scores.
        teacher: float [K, B, L].
        mask: bool [B, L].
        positives: bool [B, L], for the weights, which take no other positive for a negative.
        temperature: Divides both sides' scores.
        layer_temperature: Flattens the weights, a softmax of minus the cross-entropy of each tempered teacher layer.

    Source: LEAD (Sun et al. 2022, arXiv 2212.05225), the feature term.
    """
    student, teacher = _check(mask, student, teacher=teacher)
    teacher = teacher.detach() / temperature
    divergences = _divergences(masked_log_softmax(teacher, mask), masked_log_softmax(student / temperature, mask))
    return (layer_weights(teacher, own_negatives(mask, positives), layer_temperature) * divergences).sum()


def _weights(given: tuple[float, ...], stack: Tensor, name: str) -> Tensor:
    require(len(given) in (0, len(stack)), f"{name}: {len(given)} weights for {len(stack)} heads")
    return torch.tensor(given or (1.0,) * len(stack), dtype=stack.dtype, device=stack.device)


@validated
def self_distillation(
    student: Tensor,
    mask: Tensor,
    *,
    temperature: Positive = 1.0,
    ensemble: Literal["sum", "mean"] = "sum",
    ensemble_weights: tuple[NonNegative, ...] = (),
    head_weights: tuple[NonNegative, ...] = (),
) -> Tensor:
    """KL of the heads' detached ensemble against each head; mean over heads.

    A sum sharpens: three equal heads still learn from it. A mean leaves heads that agree alone. The paper weighs all
    heads by 1; the released code has .3 on the sparse head in the ensemble and .1 on it in the loss.

    Args:
        student: float [K, B, L], one list for each head.
        mask: bool [B, L].
        temperature: Divides every head's scores.
        ensemble: How the heads become the teacher.
        ensemble_weights: Of each head in the ensemble; 1 when empty.
        head_weights: Of each head's divergence; 1 when empty.

    Source: BGE-M3 (Chen et al. 2024, arXiv 2402.03216), self-knowledge distillation.
    """
    (student,) = _check(mask, student)
    heads = student / temperature
    teacher = (_weights(ensemble_weights, heads, "ensemble_weights").view(-1, 1, 1) * heads).sum(0, keepdim=True)
    teacher = (teacher / len(heads) if ensemble == "mean" else teacher).detach()
    divergences = _divergences(masked_log_softmax(teacher, mask), masked_log_softmax(heads, mask))
    return (_weights(head_weights, heads, "head_weights") * divergences).mean()
