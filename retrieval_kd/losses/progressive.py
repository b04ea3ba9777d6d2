"""PROD: a row of ever stronger teachers, without forgetting the stage before."""

from __future__ import annotations

from torch import Tensor

from retrieval_kd.losses.checks import Fraction, Positive, validated
from retrieval_kd.losses.listwise import cross_entropy, listwise_kl


@validated
def prod(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    positives: Tensor,
    blend: Tensor | None = None,
    *,
    temperature: Positive = 4.0,
    label_weight: Fraction = 0.1,
    student_scale: Positive = 1.0,
    teacher_scale: Positive = 1.0,
) -> Tensor:
    """label_weight cross-entropy (column 0) + (1 - label_weight) T^2 KL(teacher/T || student/T).

    Args:
        student: float [B, L].
        teacher: float [B, L].
        mask: bool [B, L].
        positives: bool [B, L], for the cross-entropy, which takes no other positive for a negative.
        blend: float [], moves the target as in ``listwise_kl``.
        temperature: T, of both sides; the cross-entropy has none.
        label_weight: Weight of the cross-entropy.
        student_scale: Factor on the student's scores; cosines need one to reach what logits reach.
        teacher_scale: Factor on the teacher's.

    Source: PROD (Lin et al. 2023, arXiv 2209.13335).
    """
    student, teacher = student_scale * student, teacher_scale * teacher
    labels = cross_entropy(student, mask, positives)
    return label_weight * labels + (1 - label_weight) * _tempered(student, teacher, mask, temperature, blend)


@validated
def learning_without_forgetting(
    student: Tensor, previous: Tensor, mask: Tensor, *, temperature: Positive = 4.0, scale: Positive = 1.0
) -> Tensor:
    """T^2 KL(previous/T || student/T): hold on to what the student knew as the stage began; 0 at its first step.

    Args:
        student: float [B, L].
        previous: float [B, L], scores of the frozen copy.
        mask: bool [B, L].
        temperature: T, of both sides.
        scale: Factor on both sides' scores.

    Source: PROD, its regulariser, after Li and Hoiem 2016.
    """
    return _tempered(scale * student, scale * previous, mask, temperature)


def _tempered(student: Tensor, target: Tensor, mask: Tensor, temperature: float, blend: Tensor | None = None) -> Tensor:
    return listwise_kl(
        student,
        target,
        mask,
        blend,
        student_temperature=temperature,
        teacher_temperature=temperature,
        square_temperature=True,
    )
