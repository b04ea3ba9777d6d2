"""Forward passes behind a boundary: losses see one tensor of outputs, however it was made.

What the encoders of a step give is cut off from how they gave it: the loss is differentiated with respect to the
outputs, and their gradients then go back through the passes. Micro-batches, gradient caching, processes that share
a batch and mixed precision therefore live here, and no loss and no encoder knows of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_kd.batching import cheapest_batches
from retrieval_kd.training.machine import Machine

Positions = npt.NDArray[np.int64]

# A pass and its way back cost a CPU some 12 ms beside their tokens, of which one costs .43 ms (three layers of MiniLM);
# a GPU is the faster the more it is given.
_CPU_OVERHEAD = 28


@dataclass(frozen=True)
class Work:
    """Texts that a model is to pass over.

    Attributes:
        lengths: Tokens of each text; at least one.
        forward: Positions among the texts, int64 ``[n]``, to the model's output for them, float ``[n, ...]``.
    """

    lengths: Sequence[int]
    forward: Callable[[Positions], Tensor]


@dataclass(frozen=True)
class _MicroBatch:
    """What one forward pass leaves behind: its output with a graph, or the random state to run it again from."""

    positions: Positions
    part: Tensor | None
    state: _RandomState | None


class Passes:
    """The forward passes of one step, and the way back through them.

    Attributes:
        texts: Texts passed over with gradients, by all processes.
        tokens: Their tokens that this process passed over.
        padded: The same, padding included.
    """

    def __init__(self, machine: Machine, max_tokens: int, cached: bool = False) -> None:
        """Prepare a step.

        Args:
            machine: The device, the precision, and the processes that share the work.
            max_tokens: Padded tokens in one forward pass.
            cached: Gradient caching (GradCache, Gao et al. 2021, arXiv 2101.06983): keep no activations and run each
                micro-batch again, with the same dropout, once its output's gradient is known. Memory then holds one
                micro-batch's, whatever the size of the batch, for one more forward pass.
        """
        self._machine = machine
        self._max_tokens = max_tokens
        self._cached = cached
        self._runs: list[tuple[Work, Tensor, list[_MicroBatch]]] = []
        self.texts = self.tokens = self.padded = 0

    def run(self, work: Work, gradients: bool = True) -> Tensor:
        """Return the model's output for every text, float ``[len(work.lengths), ...]``, the same on every process.

        Args:
            work: The texts; each process passes over its share of them.
            gradients: Whether :meth:`backward` goes back through these passes.
        """
        keep, replay = gradients and not self._cached, gradients and self._cached
        lengths = np.asarray(work.lengths, dtype=np.int64)
        output: Tensor | None = None
        passed: list[_MicroBatch] = []
        for positions in self._share(lengths):
            state = _RandomState(self._machine.device) if replay else None
            with torch.set_grad_enabled(keep):
                part = self._forward(work, positions)
            if output is None:
                output = part.new_zeros((len(lengths), *part.shape[1:]))
            output[_index(positions, part)] = part.detach()
            passed.append(_MicroBatch(positions, part if keep else None, state))
            if gradients:
                self.tokens += int(lengths[positions].sum())
                self.padded += len(positions) * int(lengths[positions].max())
        if output is None:
            output = self._nothing(work)
        # Each row is zero on all processes but one, so the sum is that one's to the bit.
        output = self._machine.sum(output)
        if gradients:
            self.texts += len(lengths)
            self._runs.append((work, output.requires_grad_(), passed))
        return output

    def backward(self) -> None:
        """Take the gradients that the loss left on the outputs back to the models' parameters."""
        for work, output, passed in self._runs:
            gradient = output.grad
            if gradient is None:
                continue
            kept = [(one.part, gradient[_index(one.positions, gradient)]) for one in passed if one.part is not None]
            if kept:
                parts, gradients = zip(*kept, strict=True)
                torch.autograd.backward(parts, gradients)
            for one in passed:
                if one.state is not None:
                    with one.state.replayed():
                        part = self._forward(work, one.positions)
                    torch.autograd.backward(part, gradient[_index(one.positions, gradient)])
        self._runs.clear()

    def _share(self, lengths: Positions) -> Iterator[Positions]:
        """Yield this process's micro-batches: each n-th text in the order of length, so that all have equal work."""
        order = np.argsort(-lengths, kind="stable")[self._machine.index :: self._machine.processes]
        overhead = _CPU_OVERHEAD if self._machine.device.type == "cpu" else self._max_tokens
        for batch in cheapest_batches(lengths[order], self._max_tokens, overhead):
            yield order[batch]

    def _forward(self, work: Work, positions: Positions) -> Tensor:
        with self._machine.autocast():
            output = work.forward(positions)
        # Similarities and losses are made in full precision, whatever the encoder ran in.
        return output if output.dtype == torch.float64 else output.float()

    def _nothing(self, work: Work) -> Tensor:
        """Return this process's share where there are fewer texts than processes: the output's shape, all zero."""
        with torch.no_grad(), _RandomState(self._machine.device).replayed():
            one = self._forward(work, np.zeros(1, dtype=np.int64))
        return one.new_zeros((len(work.lengths), *one.shape[1:]))


class _RandomState:
    """The random state before a micro-batch, from which dropout draws."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(one) for one in self._devices]

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw again what was drawn, and leave the present state as it is."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _index(positions: Positions, like: Tensor) -> Tensor:
    return torch.from_numpy(positions).to(like.device)
