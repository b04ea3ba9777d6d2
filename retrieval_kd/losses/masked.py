"""Softmax over the valid entries of a padded row, with gradients that never touch the padding."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_log_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the log-softmax over each row's valid entries; 0 where masked, so that products with it vanish."""
    return torch.log_softmax(scores.masked_fill(~mask, -torch.inf), dim=-1).masked_fill(~mask, 0.0)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax over each row's valid entries; 0 where masked."""
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)


def masked_logsumexp(scores: Tensor, mask: Tensor) -> Tensor:
    """Return log sum exp over each row's valid entries; every row must have one."""
    return torch.logsumexp(scores.masked_fill(~mask, -torch.inf), dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the valid entries; 0, still differentiable, where there is none."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
