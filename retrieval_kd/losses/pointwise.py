"""Regression of each score on the teacher's own."""

from __future__ import annotations

from torch import Tensor

from retrieval_kd.losses.checks import Finite, Positive, check_lists, validated
from retrieval_kd.losses.masked import masked_mean


@validated
def pointwise_mse(
    student: Tensor, teacher: Tensor, mask: Tensor, *, scale: Positive = 1.0, shift: Finite = 0.0
) -> Tensor:
    """Squared error of the student's scores against the teacher's raw logits; mean over valid candidates.

    The only score loss that fixes the level of the scores, not just their differences.

    Args:
        student: float [B, L].
        teacher: float [B, L].
        mask: bool [B, L].
        scale: Factor on the student's scores.
        shift: Added after it: what a similarity of 0 stands for, in the teacher's logits. Cosines of texts that have
            nothing in common lie near 0, logits do not.

    Source: DSE (Barkan et al. 2020, arXiv 1908.05161), with a dot-product head.
    """
    student, teacher = check_lists(mask, student, teacher=teacher)
    return masked_mean((scale * student + shift - teacher.detach()) ** 2, mask)
