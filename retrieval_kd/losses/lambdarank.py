"""LambdaRank: pairs weighted by what swapping them would change in nDCG."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.checks import Count, Positive, check_lists, require, validated
from retrieval_kd.losses.pairwise import differences, ordered_pairs


def _gains(teacher: Tensor, mask: Tensor, gain: str) -> Tensor:
    if gain == "exponential":
        require(bool((teacher >= 0).all()), "exponential gains need grades of at least 0; use gain: minmax for logits")
        return (torch.exp2(teacher) - 1).masked_fill(~mask, 0.0)
    lowest = teacher.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    spread = teacher.masked_fill(~mask, -torch.inf).amax(1, keepdim=True) - lowest
    return ((teacher - lowest) / torch.where(spread > 0, spread, 1.0)).masked_fill(~mask, 0.0)


def _discounts(ranks: Tensor, cutoff: int) -> Tensor:
    discounts = 1.0 / torch.log2(ranks + 2.0)
    return discounts.masked_fill(ranks >= cutoff, 0.0) if cutoff else discounts


@validated
def lambdarank(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    scale: Positive = 1.0,
    gain: Literal["minmax", "exponential"] = "minmax",
    cutoff: Count = 0,
) -> Tensor:
    """Logistic loss of every ordered pair, times the nDCG its swap would cost; sum over pairs, mean over queries.

    Args:
        student: float [B, L]; its order gives the ranks, which carry no gradient.
        teacher: float [B, L].
        mask: bool [B, L].
        scale: Factor on the student's scores.
        gain: ``minmax`` maps each list's teacher scores to 0..1; ``exponential`` takes 2^t - 1 of graded labels.
        cutoff: Ranks that count, as in nDCG@10; all when 0.

    Source: Burges et al. 2006; in this form LambdaLoss (Wang et al. 2018).
    """
    student, teacher = check_lists(mask, student, teacher=teacher)
    teacher = teacher.detach()
    gains = _gains(teacher, mask, gain)
    ranks = student.detach().masked_fill(~mask, -torch.inf).argsort(stable=True, dim=1, descending=True).argsort(1)
    discounts = _discounts(ranks, cutoff)
    places = torch.arange(student.shape[1], device=student.device)
    ideal = (gains.sort(1, descending=True).values * _discounts(places, cutoff)).sum(1)
    costs = (differences(gains) * differences(discounts)).abs() / torch.where(ideal > 0, ideal, 1.0).view(-1, 1, 1)
    terms = costs * F.softplus(-scale * differences(student))
    return terms.masked_fill(~ordered_pairs(teacher, mask), 0.0).sum() / len(mask)
