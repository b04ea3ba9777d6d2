"""Losses that also compare documents with documents; both towers must share their encoder."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.checks import (
    Finite,
    Positive,
    check_lists,
    check_mask,
    check_positives,
    finite,
    require,
    validated,
)
from retrieval_kd.losses.masked import masked_logsumexp, masked_mean


def _check(student: Tensor, documents: Tensor, positives: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's scores, the similarities of each query's first positive to all documents, its column."""
    (student,) = check_lists(mask, student)
    check_positives(positives, mask)
    count = student.shape[1]
    require(documents.shape == (count, count), f"documents {list(documents.shape)} must be {[count, count]}")
    first = positives.int().argmax(1)
    return student, finite("documents", documents)[first], first


@validated
def passage_centric(
    student: Tensor,
    documents: Tensor,
    positives: Tensor,
    mask: Tensor,
    *,
    temperature: Positive = 1.0,
    negatives: Literal["documents", "documents_and_queries"] = "documents",
) -> Tensor:
    """Draw the positive nearer to its query than to the query's negatives; mean over queries.

    Args:
        student: float [B, C].
        documents: float [C, C], the same encoder's similarity of document to document.
        positives: bool [B, C]; the first of each row is the passage at the centre.
        mask: bool [B, C].
        temperature: Divides all similarities.
        negatives: ``documents`` is the paper's formula, the query's negatives; ``documents_and_queries`` the code's
            denominator, the batch's other queries and all documents that are nobody's positive.

    Source: PAIR (Ren et al. 2021, arXiv 2108.06027), L_P; mix with ``info_nce`` as .1 to .9.
    """
    student, near, first = _check(student, documents, positives, mask)
    own = student.gather(1, first.unsqueeze(1))
    if negatives == "documents":
        others, allowed = near, mask & ~positives
    else:
        others = torch.cat([near, student.T[first]], dim=1)
        allowed = torch.cat([mask & ~positives.any(0), ~positives.T[first]], dim=1)
        require(bool(allowed.any(1).all()), "a positive has neither a negative document nor another query in the batch")
    against = masked_logsumexp(others / temperature, allowed).unsqueeze(1)
    return F.softplus(against - own / temperature).mean()


@validated
def adaptive_margin(
    student: Tensor,
    documents: Tensor,
    positives: Tensor,
    listed: Tensor,
    mask: Tensor,
    *,
    target: Literal["static", "adaptive", "distributed"] = "distributed",
    margin: Finite = 1.0,
    penalty: Literal["squared", "absolute", "logistic"] = "squared",
    negatives: Literal["listed", "in_batch"] = "listed",
    detach_target: bool = False,
) -> Tensor:
    """Regress the margin of the positive over each negative on how alike the two documents are; no teacher.

    Args:
        student: float [B, C], cosines.
        documents: float [C, C], cosines of document to document by the same encoder.
        positives: bool [B, C]; the first of each row is taken.
        listed: bool [B, C], the query's own list.
        mask: bool [B, C].
        target: ``adaptive`` is cos(d+, d-)/2 + 1/2 of the margin's own documents; ``distributed`` sets each margin
            against the targets of all the batch's positives with that negative; ``static`` is ``margin``.
        margin: The target when static.
        penalty: Of margin - target: its square, its absolute value, or log(1 + exp(-x)).
        negatives: Those of the query's own list, or all documents it competes with.
        detach_target: Keep the gradient out of the target; the released code lets it through.

    Raises:
        DataError: A similarity of documents is not a cosine.

    Source: Adaptive relevance margins (Gienapp et al. 2025, arXiv 2407.21515).
    """
    check_mask("listed", listed, student.shape)
    student, near, first = _check(student, documents, positives, mask)
    require(bool((near.abs() <= 1 + 1e-3).all()), "documents are not cosines; adaptive_margin needs unit vectors")
    allowed = mask & ~positives & (listed if negatives == "listed" else mask)
    margins = student.gather(1, first.unsqueeze(1)) - student
    targets = near / 2 + 0.5
    targets = targets.detach() if detach_target else targets
    if target == "static":
        gaps = margins - margin
    elif target == "adaptive":
        gaps = margins - targets
    else:
        gaps = margins.unsqueeze(1) - targets.unsqueeze(0)
        allowed = allowed.unsqueeze(1).expand_as(gaps)
    penalties = {"squared": torch.square, "absolute": torch.abs, "logistic": lambda gap: F.softplus(-gap)}
    return masked_mean(penalties[penalty](gaps), allowed)
