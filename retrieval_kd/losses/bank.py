"""Contrastive distillation of vectors, with a bank of earlier teacher vectors as negatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.errors import DataError
from retrieval_kd.losses.checks import Count, Positive, check_options, check_vectors, finite, require, validated
from retrieval_kd.losses.inputs import EmbeddingInputs, Inputs

_OWN = 1.0 - 1e-5  # cosine from which two teacher vectors are of one text, rounding allowed for


@validated
def contrastive_kd(student: Tensor, teacher: Tensor, bank: Tensor, *, temperature: Positive = 0.05) -> Tensor:
    """Each student vector finds its own teacher vector among the batch's and the bank's; cosines, mean over texts.

    A vector that equals a text's own, because the bank still has it from an earlier epoch or a step has two texts
    alike, is no negative of that text.

    Args:
        student: float [N, d].
        teacher: float [N, d].
        bank: float [M, d], M may be 0; then one vector has nothing to be told from and the loss is 0.
        temperature: Divides the cosines.

    Source: DistilCSE (Gao et al. 2021, arXiv 2112.05638), contrastive knowledge distillation.
    """
    student, teacher = check_vectors(student, teacher)
    keys = teacher
    if len(bank):
        require(bank.dim() == 2 and bank.shape[1] == teacher.shape[1], f"bank {list(bank.shape)} has another width")
        keys = torch.cat([teacher, finite("bank", bank).detach().to(teacher)])
    own = torch.arange(len(student), device=student.device)
    again = _same(teacher, keys)
    again[own, own] = False
    cosines = F.normalize(student, dim=-1) @ F.normalize(keys, dim=-1).T
    return F.cross_entropy((cosines / temperature).masked_fill(again, -torch.inf), own)


def _same(some: Tensor, others: Tensor) -> Tensor:
    """Return which pairs of vectors have one direction, bool [N, M]."""
    return F.normalize(some, dim=-1) @ F.normalize(others, dim=-1).T > _OWN


@dataclass(kw_only=True)
class MemoryBank:
    """The last ``size`` teacher vectors, newest last, each text's once.

    Attributes:
        size: Vectors kept.
    """

    size: Count = 4096
    vectors: Tensor = field(init=False, default_factory=lambda: torch.empty(0, 0))

    def __post_init__(self) -> None:
        """Refuse sizes that are no count."""
        check_options(MemoryBank, size=self.size)

    def fields(self) -> dict[str, Tensor]:
        """Return ``bank``, float [M, d], of earlier steps only."""
        return {"bank": self.vectors}

    def update(self, inputs: Inputs, loss: float, progress: float) -> None:
        """Append the step's teacher vectors, drop the oldest and those that have come again."""
        if not isinstance(inputs, EmbeddingInputs):
            raise DataError("losses: a memory bank keeps vectors; give it embedding inputs")
        teacher = inputs.teacher.detach()
        kept = teacher
        if len(self.vectors):
            earlier = self.vectors.to(teacher)
            kept = torch.cat([earlier[~_same(earlier, teacher).any(dim=1)], teacher])
        self.vectors = kept[max(0, len(kept) - self.size) :].clone()

    def to_dict(self) -> dict[str, Any]:
        """Return the vectors."""
        return {"vectors": self.vectors}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from what ``to_dict`` returned."""
        self.vectors = values["vectors"]
