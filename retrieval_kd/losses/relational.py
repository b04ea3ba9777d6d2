"""Relational distillation: the geometry of a batch of vectors, whatever their width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.losses.checks import check_vectors, validated
from retrieval_kd.losses.masked import masked_mean


def _relative_distances(vectors: Tensor) -> Tensor:
    """Return [N, N] distances over their mean among distinct points; duplicates stay at 0 with no gradient."""
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / masked_mean(distances, distances > 0).clamp(min=torch.finfo(distances.dtype).tiny)


@validated
def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between both sides' pairwise distances, each over its own mean; mean over pairs of different rows.

    0 whenever the student is a rotation, shift and scaling of the teacher, and for one vector, as an epoch's last batch
    may have.

    Args:
        student: float [N, d'].
        teacher: float [N, d].

    Source: Relational knowledge distillation (Park et al. 2019, arXiv 1904.05068); its weight there is 25.
    """
    student, teacher = check_vectors(student, teacher, same_width=False)
    gaps = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher), reduction="none")
    return masked_mean(gaps, ~torch.eye(len(student), dtype=torch.bool, device=student.device))


def _angles(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return [N, N, N] with entry (j, i, k) = cos of the angle at j between i and k, and where both rays exist."""
    rays = vectors.unsqueeze(0) - vectors.unsqueeze(1)
    squared = rays.square().sum(-1, keepdim=True)
    real = squared > 0
    units = rays / torch.where(real, squared, 1.0).sqrt()
    real = real.squeeze(-1)
    return units @ units.transpose(1, 2), real.unsqueeze(2) & real.unsqueeze(1)


@validated
def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between both sides' cosines of the angles in every triangle; mean over triangles' corners.

    Triangles with coinciding corners have no angle and are left out; without any, as with two vectors, the loss is 0.
    Memory grows with N^3.

    Args:
        student: float [N, d'].
        teacher: float [N, d].

    Source: Relational knowledge distillation (Park et al. 2019, arXiv 1904.05068); its weight there is 50.
    """
    student, teacher = check_vectors(student, teacher, same_width=False)
    ours, our_rays = _angles(student)
    theirs, their_rays = _angles(teacher)
    distinct = ~torch.eye(len(student), dtype=torch.bool, device=student.device).unsqueeze(0)
    return masked_mean(F.smooth_l1_loss(ours, theirs, reduction="none"), our_rays & their_rays & distinct)
