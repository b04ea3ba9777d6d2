"""What a loss remembers from step to step, kept outside it so that the loss stays a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from retrieval_kd.losses.inputs import Inputs


class LossState(Protocol):
    """Fills fields of the inputs before a step and learns from the step; saved with every checkpoint.

    The training loop calls ``loss(*info.arguments(dataclasses.replace(inputs, **state.fields())))``, then ``update``.
    """

    def fields(self) -> dict[str, Tensor]:
        """Return the input fields that this state provides for the coming step."""

    def update(self, inputs: Inputs, loss: float, progress: float) -> None:
        """Learn from a finished step.

        Args:
            inputs: What the loss was given.
            loss: What it returned.
            progress: Share of the stage's steps that are done, 0..1.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: numbers and tensors by name."""

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from what ``to_dict`` returned."""
