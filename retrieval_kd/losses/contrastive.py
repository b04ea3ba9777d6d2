"""Losses over every query of a batch against every document of it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.checks import Fraction, Positive, check_lists, check_positives, scored_candidates, validated
from retrieval_kd.losses.listwise import listwise_kl
from retrieval_kd.losses.masked import masked_logsumexp


@validated
def info_nce(student: Tensor, positives: Tensor, mask: Tensor, *, temperature: Positive = 0.05) -> Tensor:
    """Softmax cross-entropy of each positive against the query's negatives.

    Several positives of a query are averaged and never stand in each other's denominator; then the mean over queries.

    Args:
        student: float [B, C], every query against every unique document of the batch.
        positives: bool [B, C], at least one in each row.
        mask: bool [B, C], the documents that a query competes with; its positives among them.
        temperature: Divides the scores.

    Source: van den Oord et al. 2018, arXiv 1807.03748.
    """
    (student,) = check_lists(mask, student)
    check_positives(positives, mask)
    scores = student / temperature
    negatives = masked_logsumexp(scores, mask & ~positives).unsqueeze(1)
    terms = F.softplus(negatives - scores).masked_fill(~positives, 0.0)
    return (terms.sum(1) / positives.sum(1)).mean()


@validated
def soft_nearest_neighbour(student: Tensor, positives: Tensor, mask: Tensor, *, temperature: Positive = 0.05) -> Tensor:
    """Minus log of the softmax mass on all positives together; mean over queries. One positive gives InfoNCE.

    Follows the paper's formula: the released code feeds the raw scores to cross-entropy, where a query's other
    positives act as negatives.

    Args:
        student: float [B, C].
        positives: bool [B, C], at least one in each row.
        mask: bool [B, C].
        temperature: Divides the scores.

    Source: Syntriever (Kim and Baek 2025), stage 1.
    """
    (student,) = check_lists(mask, student)
    check_positives(positives, mask)
    scores = student / temperature
    return (masked_logsumexp(scores, mask) - masked_logsumexp(scores, positives)).mean()


@validated
def tct(
    student: Tensor,
    teacher: Tensor,
    scored: Tensor,
    positives: Tensor,
    mask: Tensor,
    blend: Tensor | None = None,
    *,
    student_temperature: Positive = 1.0,
    teacher_temperature: Positive = 0.25,
    gamma: Fraction = 0.0,
) -> Tensor:
    """Weigh InfoNCE by gamma, KL(teacher || student) by 1 - gamma, over the documents that the teacher scored.

    Defaults follow the released code: no InfoNCE, a sharpened teacher. The paper mixes both.

    Args:
        student: float [B, C].
        teacher: float [B, C], MaxSim or other in-batch scores.
        scored: bool [B, C], where the teacher's score is known.
        positives: bool [B, C].
        mask: bool [B, C].
        blend: float [], moves the target as in ``listwise_kl``.
        student_temperature: Divides the student's scores, in both terms.
        teacher_temperature: Divides the teacher's scores.
        gamma: Weight of InfoNCE.

    Source: TCT-ColBERT (Lin et al. 2020, arXiv 2010.11386).
    """
    divergence = listwise_kl(
        student,
        teacher,
        scored_candidates(scored, mask, student),
        blend,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    return gamma * info_nce(student, positives, mask, temperature=student_temperature) + (1 - gamma) * divergence
