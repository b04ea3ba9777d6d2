"""Listwise specialisation: teacher scores scaled by the corpus's percentiles, and InfoNCE without false negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval_kd.losses.checks import (
    Finite,
    Fraction,
    Positive,
    check_lists,
    check_positives,
    finite,
    require,
    scored_candidates,
    validated,
)
from retrieval_kd.losses.contrastive import info_nce
from retrieval_kd.losses.listwise import listwise_kl


def percentile_scale(scores: Tensor, low: float, high: float) -> Tensor:
    """Return the scores clipped to low..high and mapped to 0..1.

    Args:
        scores: float, any shape.
        low: The corpus's low percentile, 0 after scaling.
        high: The corpus's high percentile, 1 after scaling.
    """
    require(low < high, f"low: {low} must be below high: {high}")
    return (scores.clamp(low, high) - low) / (high - low)


@validated
def scaled_listwise_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    blend: Tensor | None = None,
    *,
    low: Finite = 0.0,
    high: Finite = 1.0,
    student_temperature: Positive = 0.05,
    teacher_temperature: Positive = 0.3,
) -> Tensor:
    """Listwise KL of cosines against teacher scores scaled to 0..1 by two percentiles of the whole corpus.

    Args:
        student: float [B, L], cosines.
        teacher: float [B, L].
        mask: bool [B, L].
        blend: float [], moves the target as in ``listwise_kl``.
        low: 1st percentile of the teacher's scores.
        high: 99th percentile.
        student_temperature: Divides the student's scores.
        teacher_temperature: Divides the scaled teacher's.

    Source: Tamber et al. 2025, arXiv 2502.19712 and 2505.19274 (CADET).
    """
    (student, teacher) = check_lists(mask, student, teacher=teacher)
    return listwise_kl(
        student,
        percentile_scale(teacher, low, high),
        mask,
        blend,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )


def false_negatives(
    teacher: Tensor, scored: Tensor, positives: Tensor, threshold: float, low: float, high: float
) -> Tensor:
    """Return bool [B, C]: scored non-positives above ``threshold`` times the query's best scaled score."""
    scaled = percentile_scale(teacher, low, high)
    best = scaled.masked_fill(~scored, -torch.inf).amax(1, keepdim=True)
    return scored & ~positives & (scaled > threshold * best)


@validated
def denoised_info_nce(
    student: Tensor,
    teacher: Tensor,
    scored: Tensor,
    positives: Tensor,
    mask: Tensor,
    *,
    temperature: Positive = 0.01,
    threshold: Fraction = 0.6,
    low: Finite = 0.0,
    high: Finite = 1.0,
) -> Tensor:
    """InfoNCE whose denominator leaves out what the teacher finds nearly as good as the query's best document.

    A query left without negatives is left out; a batch of those gives 0.

    Args:
        student: float [B, C].
        teacher: float [B, C].
        scored: bool [B, C], where the teacher's score is known.
        positives: bool [B, C].
        mask: bool [B, C].
        temperature: Divides the student's scores.
        threshold: Share of the best score above which a negative is taken for a false one.
        low: 1st percentile of the teacher's scores.
        high: 99th percentile.

    Source: Tamber et al. 2025, arXiv 2502.19712 and 2505.19274 (CADET).
    """
    (student,) = check_lists(mask, student)
    check_positives(positives, mask)
    require(teacher.shape == student.shape, f"teacher {list(teacher.shape)} and student {list(student.shape)} differ")
    known = scored_candidates(scored, mask, student)
    kept = mask & ~false_negatives(finite("teacher", teacher, known), known, positives, threshold, low, high)
    rows = (kept & ~positives).any(1)
    if not bool(rows.any()):
        return student.sum() * 0.0
    return info_nce(student[rows], positives[rows], kept[rows], temperature=temperature)
