"""Likelihoods of a whole ranking: each place is a softmax over what is left (Plackett-Luce)."""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval_kd.losses.checks import (
    Count,
    Positive,
    check_labels,
    check_lists,
    finite,
    require,
    scored_candidates,
    validated,
)
from retrieval_kd.losses.masked import masked_softmax


def _order(teacher: Tensor, group: Tensor) -> Tensor:
    """Return column numbers by group ascending, then teacher descending, then column."""
    by_teacher = teacher.argsort(stable=True, dim=1, descending=True)
    return by_teacher.gather(1, group.gather(1, by_teacher).argsort(stable=True, dim=1))


def _place_losses(scores: Tensor, mask: Tensor, order: Tensor) -> Tensor:
    """Return [B, L]: at each place of the order, -log of its softmax among it and all later places; padding last."""
    ordered, real = scores.gather(1, order), mask.gather(1, order)
    # Far below every score, yet finite: exp is 0 all the same, and logcumsumexp's gradient stays a number.
    ordered = ordered.masked_fill(~real, scores.detach().min() - 1e4)
    return (ordered.flip(1).logcumsumexp(1).flip(1) - ordered).masked_fill(~real, 0.0)


@validated
def list_mle(student: Tensor, teacher: Tensor, mask: Tensor, *, student_temperature: Positive = 1.0) -> Tensor:
    """Minus log-likelihood of the teacher's order; sum over places, mean over queries. Ties keep the list's order.

    Args:
        student: float [B, L].
        teacher: float [B, L]; only its order counts.
        mask: bool [B, L].
        student_temperature: Divides the student's scores.

    Source: ListMLE (Xia et al. 2008).
    """
    student, teacher = check_lists(mask, student, teacher=teacher)
    order = _order(teacher, (~mask).long())
    return _place_losses(student / student_temperature, mask, order).sum(1).mean()


@validated
def plackett_luce(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    student_temperature: Positive = 1.0,
    teacher_temperature: Positive = 1.0,
) -> Tensor:
    """ListMLE whose places weigh as much as the teacher's softmax there; the positive (column 0) comes first.

    A teacher certain of the positive gives cross-entropy. Convex in the student's scores.

    Args:
        student: float [B, L].
        teacher: float [B, L].
        mask: bool [B, L].
        student_temperature: Divides the student's scores.
        teacher_temperature: Divides the teacher's scores in the weights.

    Source: PLD, Plackett-Luce distillation (2025).
    """
    student, teacher = check_lists(mask, student, teacher=teacher)
    check_labels(mask)
    teacher = teacher.detach()
    group = 1 + (~mask).long()
    group[:, 0] = 0
    order = _order(teacher, group)
    weights = masked_softmax(teacher / teacher_temperature, mask).gather(1, order)
    return (weights * _place_losses(student / student_temperature, mask, order)).sum(1).mean()


@validated
def partial_plackett_luce(
    student: Tensor, teacher: Tensor, scored: Tensor, mask: Tensor, *, temperature: Positive = 0.05, depth: Count = 2
) -> Tensor:
    """Minus log-likelihood of the teacher's first ``depth`` documents in order, every other allowed document below.

    With two scored documents this is preferred > other > rest of the batch; without a rest, Bradley-Terry.

    Args:
        student: float [B, C].
        teacher: float [B, C]; only its order among scored documents counts.
        scored: bool [B, C], at least one in each row.
        mask: bool [B, C].
        temperature: Divides the student's scores.
        depth: Places whose order counts; 0 takes all scored ones.

    Source: Syntriever (Kim and Baek 2025), stage 2.
    """
    (student,) = check_lists(mask, student)
    known = scored_candidates(scored, mask, student)
    require(teacher.shape == student.shape, f"teacher {list(teacher.shape)} and student {list(student.shape)} differ")
    require(bool(known.any(1).all()), "a row has no document that the teacher scored")
    order = _order(finite("teacher", teacher, known), 2 - known.long() - mask.long())
    counted = known.gather(1, order)
    if depth:
        counted = counted & (torch.arange(counted.shape[1], device=counted.device) < depth)
    return (_place_losses(student / temperature, mask, order) * counted).sum(1).mean()
