"""TAID: a target that moves from the student's own distribution to the teacher's as training goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retrieval_kd.losses.checks import Fraction, NonNegative, Positive, check_options, require, validated
from retrieval_kd.losses.inputs import Inputs
from retrieval_kd.losses.listwise import Direction, Reduction, listwise_kl


@validated
def taid(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    blend: Tensor,
    *,
    student_temperature: Positive = 1.0,
    teacher_temperature: Positive = 1.0,
    direction: Direction = "teacher_student",
    reduction: Reduction = "batchmean",
    square_temperature: bool = False,
) -> Tensor:
    """Listwise KL to the blend of both sides' tempered scores: no gradient at 0, plain listwise KL at 1.

    A recipe's option ``of`` names another loss whose target is to move, with that loss's own options: ``prod``,
    ``scaled_listwise_kl`` or ``tct``. Their terms of the labels stay as they are.

    Args:
        student: float [B, L].
        teacher: float [B, L].
        mask: bool [B, L].
        blend: float [], in 0..1; see ``TaidState``.
        student_temperature: Divides the student's scores, before blending.
        teacher_temperature: Divides the teacher's scores, before blending.
        direction: As in ``listwise_kl``.
        reduction: As in ``listwise_kl``.
        square_temperature: As in ``listwise_kl``.

    Source: TAID (Shing et al. 2025, arXiv 2501.16937), over lists in place of vocabularies.
    """
    return listwise_kl(
        student,
        teacher,
        mask,
        blend,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        direction=direction,
        reduction=reduction,
        square_temperature=square_temperature,
    )


@dataclass(kw_only=True)
class TaidState:
    """How far the target has moved: a linear ramp, overtaken while the loss falls.

    Attributes:
        start: Blend of the first step.
        end: Blend it does not pass.
        rate: Largest step beyond the ramp.
        momentum: Share of the past in the running relative improvement.
    """

    start: Fraction = 0.4
    end: Fraction = 1.0
    rate: NonNegative = 5e-4
    momentum: Fraction = 0.99
    blend: float = field(init=False)
    trend: float = field(init=False, default=0.0)
    last_loss: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Refuse ramps that lead backwards."""
        check_options(TaidState, start=self.start, end=self.end, rate=self.rate, momentum=self.momentum)
        require(self.start <= self.end, f"start: {self.start} must not be above end: {self.end}")
        self.blend = self.start

    def fields(self) -> dict[str, Tensor]:
        """Return ``blend``, float []."""
        return {"blend": torch.tensor(self.blend)}

    def update(self, inputs: Inputs, loss: float, progress: float) -> None:
        """Move the blend; never back, never below the ramp."""
        if self.last_loss:
            improvement = (self.last_loss - loss) / self.last_loss
            self.trend = self.momentum * self.trend + (1 - self.momentum) * improvement
        step = self.rate * (1 - self.blend) / (1 + math.exp(-self.trend))
        ramp = self.start + (self.end - self.start) * progress
        self.blend = min(self.end, max(ramp, self.blend + step))
        self.last_loss = loss

    def to_dict(self) -> dict[str, Any]:
        """Return blend, trend and last loss."""
        return {"blend": self.blend, "trend": self.trend, "last_loss": self.last_loss}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from what ``to_dict`` returned."""
        self.blend, self.trend, self.last_loss = values["blend"], values["trend"], values["last_loss"]
