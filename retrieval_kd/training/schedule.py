"""When things happen in a training run, as functions of the step alone, so that a resumed run agrees."""

from __future__ import annotations

import math

from retrieval_kd.recipes.schema import ScheduleSpec


def learning_rate(step: int, total: int, spec: ScheduleSpec) -> float:
    """Return the rate of one optimiser step.

    The rate climbs linearly over the first ``warmup`` share of the steps and then falls to zero
    (``linear``, ``cosine``) or stays (``constant``).

    Args:
        step: The step about to be taken, from 0.
        total: Steps in all.
        spec: Peak rate, warm-up share and shape.
    """
    warmup = math.ceil(total * spec.warmup)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    if spec.decay == "constant":
        return spec.learning_rate
    done = (step - warmup) / max(1, total - warmup)
    shape = 1 - done if spec.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return spec.learning_rate * shape


def evenly(total: int, times: int) -> frozenset[int]:
    """Return up to ``times`` steps, evenly spread, the last one being ``total``."""
    return frozenset(round(total * i / times) for i in range(1, times + 1)) - {0}
