"""RocketQAv2: retriever and reranker learn from each other over one list."""

from __future__ import annotations

from torch import Tensor

from retrieval_kd.losses.checks import Positive, validated
from retrieval_kd.losses.listwise import Direction, Reduction, cross_entropy, listwise_kl


@validated
def joint_listwise(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    positives: Tensor,
    *,
    direction: Direction = "teacher_student",
    reduction: Reduction = "batchmean",
    detach_teacher: bool = False,
    scale: Positive = 1.0,
    teacher_temperature: Positive = 1.0,
) -> Tensor:
    """Cross-entropy of the live teacher on the positive (column 0), plus the divergence of both lists.

    The released code has direction ``teacher_student``, reduction ``mean`` and lets the gradient into the teacher; the
    paper writes ``student_teacher``.

    Args:
        student: float [B, L], the retriever.
        teacher: float [B, L], the reranker, with gradient.
        mask: bool [B, L].
        positives: bool [B, L], for the cross-entropy, which takes no other positive for a negative.
        direction: As in ``listwise_kl``.
        reduction: As in ``listwise_kl``.
        detach_teacher: Teach the reranker by its labels alone.
        scale: Factor on the student's scores; cosines need one to reach what logits reach.
        teacher_temperature: Divides the teacher's scores in the divergence.

    Source: RocketQAv2 (Ren et al. 2021, arXiv 2110.07367).
    """
    divergence = listwise_kl(
        scale * student,
        teacher,
        mask,
        teacher_temperature=teacher_temperature,
        direction=direction,
        reduction=reduction,
        detach_teacher=detach_teacher,
    )
    return cross_entropy(teacher, mask, positives) + divergence
