"""What training runs on: a device, the processes that share each batch, and the precision of the encoders."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed, nn

from retrieval_kd import processes
from retrieval_kd.encoders.static import StaticBody
from retrieval_kd.errors import DataError, RecipeError

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Others wait while the first process evaluates or saves, however long that takes.
_PATIENCE = timedelta(days=2)


class Machine:
    """One process's share of a training run; under ``torchrun`` there are several.

    Attributes:
        device: Where the models lie.
        processes: How many processes share each batch.
        index: Which of them this is; 0 writes logs and checkpoints.
    """

    def __init__(self, precision: Precision = "fp32") -> None:
        """Join the other processes, if there are any, and check that the device computes in ``precision``.

        Raises:
            RecipeError: it does not.
        """
        # Torch's own process group and not an Accelerator: that one's precision cannot change within a process, while
        # the stages of a recipe may differ in theirs, and on a CPU it takes torchrun's processes for strangers.
        gpus = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpus else torch.device("cpu")
        self.processes = processes.count()
        self.index = processes.index()
        if gpus:
            torch.cuda.set_device(self.device)
        if self.processes > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if gpus else "gloo", timeout=_PATIENCE)
            atexit.register(distributed.destroy_process_group)
        _check_precision(precision, self.device)
        self._dtype = _DTYPES.get(precision)
        # Gradients in fp16 underflow unless the loss is scaled up; bf16 has the range of fp32.
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    @property
    def main(self) -> bool:
        """Return whether this process writes logs and checkpoints."""
        return self.index == 0

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Run the block's matrix products in the recipe's precision."""
        if self._dtype is None:
            yield
            return
        with torch.autocast(self.device.type, self._dtype):
            yield

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, the same on each; the tensor itself where there is one."""
        if self.processes == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def agree(self, value: T) -> T:
        """Return what the first process passes: any value that JSON gives back as it was."""
        if self.processes == 1:
            return value
        text = json.dumps(value).encode() if self.main else b""
        length = torch.tensor(len(text), device=self.device)
        distributed.broadcast(length, src=0)
        sent = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.main:
            sent.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        distributed.broadcast(sent, src=0)
        agreed: T = json.loads(bytes(sent.tolist()))
        return agreed

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.processes > 1:
            distributed.barrier()

    def backward(self, loss: Tensor) -> None:
        """Differentiate the loss, scaled up where the precision needs it."""
        torch.autograd.backward(self._scaler.scale(loss))

    def move(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip: float) -> float:
        """Add up the processes' gradients, clip them and let the optimiser take a step.

        Under fp16 a step whose gradients overflow is left out and the next loss is scaled up less.

        Returns:
            The norm of the gradients before clipping; infinite where the step was left out.

        Raises:
            DataError: the gradients are not finite, though no scaling is to blame.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        self._sum_gradients(trained)
        self._scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, clip))
        scale = self._scaler.get_scale()
        if not math.isfinite(norm) and scale <= 1:
            raise DataError(f"gradient norm is {norm}; lower schedule.learning_rate")
        self._scaler.step(optimizer)
        self._scaler.update()
        return norm if math.isfinite(norm) else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return the loss scale, for a checkpoint; nothing where no loss is scaled."""
        return dict(self._scaler.state_dict())

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from what ``to_dict`` returned."""
        if values:
            self._scaler.load_state_dict(dict(values))

    def _sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.processes == 1:
            return
        # A parameter that no text of any process reached keeps no gradient, so that the optimiser leaves it alone.
        reached = self.sum(torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)).tolist()
        found = [parameter for parameter, count in zip(parameters, reached, strict=True) if count]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in found])
        for parameter, total in zip(found, torch.split(self.sum(flat), [p.numel() for p in found]), strict=True):
            parameter.grad = total.view_as(parameter)


def sparse_token_gradients(module: nn.Module) -> None:
    """Let token tables get gradients of only the rows they read; ``Machine.move`` adds them up.

    A dense gradient of BERT's 30,522 rows is 47 MB that every micro-batch would clear and add: on a CPU that takes as
    long as 80 tokens do in three layers.
    """
    from transformers import PreTrainedModel

    for part in module.modules():
        if isinstance(part, StaticBody):
            part.sparse = True
        elif isinstance(part, PreTrainedModel) and isinstance(table := part.get_input_embeddings(), nn.Embedding):
            table.sparse = True


def _check_precision(precision: Precision, device: torch.device) -> None:
    if precision == "fp16" and device.type == "cpu":
        raise RecipeError("schedule.precision: fp16 needs a GPU, and training runs on a CPU here; use fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise RecipeError(f"schedule.precision: {name} does not compute in bf16; use fp32 or fp16")
