"""Losses over the distribution that a list of scores defines by its softmax."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from retrieval_kd.losses.checks import Positive, check_lists, own_negatives, require, validated
from retrieval_kd.losses.masked import masked_log_softmax

Direction = Literal["teacher_student", "student_teacher"]
Reduction = Literal["batchmean", "mean"]


def interpolate(student: Tensor, teacher: Tensor, blend: Tensor) -> Tensor:
    """Return (1 - blend) student + blend teacher, without gradient: TAID's target; blend is one number in 0..1."""
    require(blend.dim() == 0 and 0 <= float(blend) <= 1, f"blend: {blend.tolist()} is not one number in 0..1")
    return torch.lerp(student.detach(), teacher.detach().to(student.dtype), blend.to(student))


@validated
def listwise_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    blend: Tensor | None = None,
    *,
    student_temperature: Positive = 1.0,
    teacher_temperature: Positive = 1.0,
    direction: Direction = "teacher_student",
    reduction: Reduction = "batchmean",
    square_temperature: bool = False,
    detach_teacher: bool = True,
) -> Tensor:
    """Kullback-Leibler divergence between the softmax of the teacher's and of the student's list.

    Args:
        student: float [B, L].
        teacher: float [B, L].
        mask: bool [B, L].
        blend: float [], puts the blend of both sides' tempered scores in the teacher's place; see ``taid``.
        student_temperature: Divides the student's scores.
        teacher_temperature: Divides the teacher's scores.
        direction: ``teacher_student`` is KL(teacher || student), which covers all the teacher likes;
            ``student_teacher`` is KL(student || teacher), which settles on its favourite.
        reduction: ``batchmean`` sums over each list and averages over queries; ``mean`` averages over all valid
            entries, as RocketQAv2's and DKRR's released code do, which weakens the term by the list's length.
        square_temperature: Multiply by the product of the temperatures (Hinton's T^2), so that the size of the
            gradient does not depend on them.
        detach_teacher: Keep gradients from the teacher; False trains both (RocketQAv2).

    Source: Hinton et al. 2015; as list loss PairDistill, DiSCo, Translate-Distill, DKRR, RocketQAv2.
    """
    student, teacher = check_lists(mask, student, teacher=teacher)
    teacher = teacher.detach() if detach_teacher else teacher
    student, teacher = student / student_temperature, teacher / teacher_temperature
    ours = masked_log_softmax(student, mask)
    theirs = masked_log_softmax(teacher if blend is None else interpolate(student, teacher, blend), mask)
    first, second = (theirs, ours) if direction == "teacher_student" else (ours, theirs)
    divergence = (first.exp() * (first - second)).sum()
    factor = student_temperature * teacher_temperature if square_temperature else 1.0
    return factor * divergence / (len(mask) if reduction == "batchmean" else mask.sum())


@validated
def cross_entropy(student: Tensor, mask: Tensor, positives: Tensor, *, temperature: Positive = 1.0) -> Tensor:
    """Softmax cross-entropy of the positive (column 0) against its own list's negatives; mean over queries.

    The list's other positives are left out: they are no negatives.

    Args:
        student: float [B, L].
        mask: bool [B, L].
        positives: bool [B, L].
        temperature: Divides the scores.
    """
    (student,) = check_lists(mask, student)
    return -masked_log_softmax(student / temperature, own_negatives(mask, positives))[:, 0].mean()
