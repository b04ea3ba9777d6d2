"""Margin-MSE: the student learns the teacher's score differences, not its scores."""

from __future__ import annotations

from torch import Tensor

from retrieval_kd.losses.checks import (
    Positive,
    check_labels,
    check_lists,
    check_positives,
    require,
    scored_candidates,
    validated,
)
from retrieval_kd.losses.masked import masked_mean


@validated
def margin_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, scale: Positive = 1.0) -> Tensor:
    """Squared difference of the margins of the positive (column 0) over each other candidate.

    The mean runs over all valid margins of the batch, so a long list weighs more than a short one. Invariant to a
    shift of either side's scores within a query, not to their scale: cosines need ``scale`` to reach a cross-encoder's
    margins.

    Args:
        student: float [B, L].
        teacher: float [B, L], raw logits or normalised.
        mask: bool [B, L].
        scale: Factor on the student's scores.

    Source: Hofstaetter et al. 2020, arXiv 2010.02666; two candidates give the paper's pair form.
    """
    student, teacher = check_lists(mask, student, teacher=teacher)
    check_labels(mask)
    student_margins = scale * (student[:, :1] - student[:, 1:])
    teacher_margins = (teacher[:, :1] - teacher[:, 1:]).detach()
    return masked_mean((student_margins - teacher_margins) ** 2, mask[:, 1:])


@validated
def in_batch_margin_mse(
    student: Tensor, teacher: Tensor, scored: Tensor, positives: Tensor, mask: Tensor, *, scale: Positive = 1.0
) -> Tensor:
    """Margin-MSE of each query's first positive over every other document of the batch, among those the teacher scored.

    A positive without a score, such as a judged document that stands in another query's list only, is left out.

    Args:
        student: float [B, C].
        teacher: float [B, C].
        scored: bool [B, C], where the teacher's score is known, of one positive at least.
        positives: bool [B, C].
        mask: bool [B, C].
        scale: Factor on the student's scores.

    Source: TAS-B (Hofstaetter et al. 2021, arXiv 2104.06967), its in-batch term.
    """
    known = scored_candidates(scored, mask, student)
    student, teacher = check_lists(known, student, teacher=teacher)
    check_positives(positives, mask)
    measured = positives & known
    require(bool(measured.any(1).all()), "a row has no positive with a teacher score, so it has no margins to learn")
    first = measured.int().argmax(1, keepdim=True)
    student_margins = scale * (student.gather(1, first) - student)
    teacher_margins = (teacher.gather(1, first) - teacher).detach()
    return masked_mean((student_margins - teacher_margins) ** 2, known & ~positives)
