"""Losses over pairs of one list's candidates, ordered by the teacher."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.checks import Positive, check_lists, check_mask, finite, require, validated
from retrieval_kd.losses.masked import masked_mean


def differences(scores: Tensor) -> Tensor:
    """Return [B, L, L] with entry (i, j) = score i - score j."""
    return scores.unsqueeze(2) - scores.unsqueeze(1)


def ordered_pairs(teacher: Tensor, mask: Tensor) -> Tensor:
    """Return bool [B, L, L], True where both candidates are real and the teacher puts i strictly above j."""
    return (differences(teacher) > 0) & mask.unsqueeze(2) & mask.unsqueeze(1)


@validated
def ranknet(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    scale: Positive = 1.0,
    weighting: Literal["none", "margin"] = "none",
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Logistic loss of every pair that the teacher orders: log(1 + exp(s_j - s_i)) where t_i > t_j.

    Ties of the teacher say nothing and are left out; a batch of ties alone gives 0.

    Args:
        student: float [B, L].
        teacher: float [B, L]; only its order counts, unless weighted.
        mask: bool [B, L].
        scale: Factor on the student's scores.
        weighting: ``margin`` weighs each pair by t_i - t_j.
        reduction: ``mean`` over all pairs of the batch; ``sum`` over a list's pairs, then the mean over queries.

    Source: Burges et al. 2005. With ``sum`` Instruction Distillation's paper (Sun et al. 2023, arXiv 2311.01555),
    with ``mean`` its code; the paper prints the opposite sign, which would train the student backwards.
    """
    student, teacher = check_lists(mask, student, teacher=teacher)
    teacher = teacher.detach()
    pairs = ordered_pairs(teacher, mask)
    terms = F.softplus(-scale * differences(student))
    if weighting == "margin":
        terms = terms * differences(teacher)
    total = terms.masked_fill(~pairs, 0.0).sum()
    return total / (pairs.sum().clamp(min=1) if reduction == "mean" else len(mask))


@validated
def pair_distill(
    student: Tensor, preferences: Tensor, compared: Tensor, mask: Tensor, *, student_temperature: Positive = 1.0
) -> Tensor:
    """KL([p, 1 - p] || softmax([s_i, s_j])) of the pairs a pairwise teacher compared; mean over pairs, 0 without any.

    Least, 0, where s_i - s_j = logit(p). Its gradient is that of RankNet with the soft label p.

    Args:
        student: float [B, L].
        preferences: float [B, L, L], probability (not its logarithm) that i is more relevant than j.
        compared: bool [B, L, L], pairs of real candidates.
        mask: bool [B, L].
        student_temperature: Divides the student's scores.

    Raises:
        DataError: A compared pair's preference is not in 0..1, or one of the pair is padding.

    Source: PairDistill (Huang and Chen 2024), the pairwise term.
    """
    (student,) = check_lists(mask, student)
    shape = torch.Size((*student.shape, student.shape[1]))
    check_mask("compared", compared, shape)
    require(preferences.shape == shape, f"preferences {list(preferences.shape)} must be {list(shape)}")
    require(
        not bool((compared & ~(mask.unsqueeze(2) & mask.unsqueeze(1))).any()),
        "compared marks a pair with padding in it",
    )
    p = finite("preference", preferences, compared).detach()
    require(bool(((p >= 0) & (p <= 1)).all()), "a preference is not in 0..1; give probabilities, not their logarithms")
    delta = differences(student) / student_temperature
    cross = p * F.softplus(-delta) + (1 - p) * F.softplus(delta)
    return masked_mean(cross + torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p), compared)
