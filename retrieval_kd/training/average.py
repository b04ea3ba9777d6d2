"""Averages of the weights along the way, which often rank better than the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from retrieval_kd.recipes.schema import ScheduleSpec


class WeightAverage:
    """The average of what the optimiser's steps left, from ``schedule.average_from`` on.

    ``uniform`` weighs all steps alike (stochastic weight averaging, Izmailov et al. 2018, arXiv 1803.05407); ``ema``
    forgets the older ones. Nothing is drawn and no gradient passes, so the training itself is not changed.
    """

    def __init__(self, model: nn.Module, schedule: ScheduleSpec) -> None:
        """Average ``model``, which is copied."""
        ema = get_ema_multi_avg_fn(schedule.average_decay)  # type: ignore[no-untyped-call]
        self._from = schedule.average_from
        self._averaged = AveragedModel(model, multi_avg_fn=ema if schedule.average == "ema" else None)

    def update(self, model: nn.Module, progress: float) -> None:
        """Take the weights of a finished step in; ``progress`` is the share of the run's steps that are done."""
        if progress > self._from:
            self._averaged.update_parameters(model)

    def of(self, model: nn.Module) -> nn.Module:
        """Return a module with the averaged weights; ``model`` itself before the first step that counts."""
        return self._averaged.module if int(self._averaged.n_averaged) else model

    def to_dict(self) -> dict[str, Any]:
        """Return the averages and how many steps they hold."""
        return dict(self._averaged.state_dict())

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from what ``to_dict`` returned."""
        self._averaged.load_state_dict(values)
