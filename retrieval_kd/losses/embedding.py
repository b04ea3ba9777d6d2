"""Losses between the student's and the teacher's vectors of the same texts."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.checks import check_vectors, validated


@validated
def embedding_regression(
    student: Tensor, teacher: Tensor, *, kind: Literal["squared_l2", "l2", "cosine"] = "squared_l2"
) -> Tensor:
    """Distance of each student vector from the teacher's of the same text, mean over texts.

    Between unit vectors the squared distance is 2 - 2 cosine, so ``squared_l2`` is twice ``cosine`` there.

    Args:
        student: float [N, d].
        teacher: float [N, d], of the same width.
        kind: ``squared_l2``, ``l2`` (its root) or ``cosine`` (1 - cosine).

    Source: LEAF (Vujanic and Rueckstiess 2025, arXiv 2509.12539).
    """
    student, teacher = check_vectors(student, teacher)
    if kind == "cosine":
        distances = 1.0 - F.cosine_similarity(student, teacher, dim=-1)
    elif kind == "l2":
        distances = torch.linalg.vector_norm(student - teacher, dim=-1)
    else:
        distances = (student - teacher).square().sum(-1)
    return distances.mean()
