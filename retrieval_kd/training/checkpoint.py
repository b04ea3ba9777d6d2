"""Checkpoints: one safetensors file each, replaced atomically, so a killed run resumes bit for bit.

A checkpoint holds the model, AdamW's two moments, the step, and whatever else remembers earlier steps, such as a
loss with a memory bank. Nothing else is state: every draw comes from (seed, epoch, step) and the learning rate is a
function of the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from retrieval_kd.artifacts import atomic_write
from retrieval_kd.errors import ArtifactError

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Stateful(Protocol):
    """What remembers earlier steps, such as :class:`retrieval_kd.losses.state.LossState`."""

    def to_dict(self) -> dict[str, Any]:
        """Return numbers and tensors by name."""

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from what ``to_dict`` returned."""


def save_weights(path: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Write a model's weights with JSON facts beside them."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path, "wb") as file:
        file.write(save(tensors, metadata={"facts": json.dumps(facts)}))


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Read what :func:`save_weights` wrote into ``model`` and return the facts.

    Raises:
        ArtifactError: the file is torn or holds other weights than the model's; names the file.
    """
    tensors, facts = _read(path)
    _restore(path, model, tensors)
    return facts


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
    states: Mapping[str, Stateful] | None = None,
) -> None:
    """Write weights, AdamW moments, facts (step, best so far) and states by name as one file."""
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            tensors.update({f"optimizer.{name}.{moment}": state[moment].contiguous() for moment in _MOMENTS})
            tensors[f"optimizer.{name}.step"] = state["step"].reshape(1).clone()
    numbers: dict[str, dict[str, Any]] = {}
    for name, stateful in (states or {}).items():
        values = stateful.to_dict()
        numbers[name] = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
        kept = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        tensors.update({f"state.{name}/{key}": value.detach().contiguous() for key, value in kept.items()})
    with atomic_write(path, "wb") as file:
        file.write(save(tensors, metadata={"facts": json.dumps({"facts": facts, "states": numbers})}))


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    states: Mapping[str, Stateful] | None = None,
) -> dict[str, Any]:
    """Restore what :func:`save_checkpoint` wrote and return the facts.

    Raises:
        ArtifactError: the file is torn or belongs to another model or other losses; names the file.
    """
    tensors, kept = _read(path)
    if kept["states"].keys() != (states or {}).keys():
        names = sorted(kept["states"])
        raise ArtifactError(f"{path}: holds the states of {names or 'no loss'}; delete it and train again")
    _restore(path, model, {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    for name, parameter in model.named_parameters():
        if f"optimizer.{name}.step" in tensors:
            # Fused AdamW keeps its moments and its step where the parameter is.
            optimizer.state[parameter] = {
                "step": tensors[f"optimizer.{name}.step"].reshape(()).to(parameter.device),
                **{moment: tensors[f"optimizer.{name}.{moment}"].to(parameter.device) for moment in _MOMENTS},
            }
    for name, stateful in (states or {}).items():
        prefix = f"state.{name}/"
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        stateful.restore({**kept["states"][name], **own})
    facts: dict[str, Any] = kept["facts"]
    return facts


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - not a dict
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: torn or not a checkpoint ({error}); delete it and train again") from None


def _restore(path: Path, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArtifactError(f"{path}: holds another model's weights ({reason}); delete it and train again") from None
