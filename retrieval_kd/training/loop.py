"""The training loop: every step in view, no trainer behind it.

A step assembles its lists over their distinct documents, encodes each text once, hands scores and
vectors to the recipe's losses, and moves the student. The loop knows neither which losses there are
nor whether the documents are frozen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import DataError, RecipeError
from retrieval_kd.losses.inputs import EmbeddingInputs, InBatchInputs, Inputs, ScoreInputs
from retrieval_kd.losses.registry import LOSSES, Kind, bind
from retrieval_kd.progress import progress
from retrieval_kd.recipes.schema import LossSpec, ScheduleSpec
from retrieval_kd.training.batches import Batch, TrainingSet, assemble, epoch_batches
from retrieval_kd.training.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from retrieval_kd.training.dev import DevSet
from retrieval_kd.training.metrics import MetricsLog
from retrieval_kd.training.schedule import evenly, learning_rate
from retrieval_kd.training.towers import DocumentTower, encode_rows

LAST = "checkpoints/last.safetensors"
BEST = "checkpoints/best.safetensors"
# What a step hands to its losses, see _loss_inputs.
_PROVIDED: Mapping[Kind, frozenset[str]] = {
    "scores": frozenset({"student", "mask", "teacher"}),
    "in_batch": frozenset({"student", "positives", "mask"}),
    "embeddings": frozenset({"student", "teacher"}),
}


@dataclass(frozen=True)
class Progress:
    """How far a run has come; all that a checkpoint holds besides tensors.

    Attributes:
        step: Optimiser steps taken.
        best_step: The step whose weights were best on dev; 0 when none was measured.
        best_ndcg: nDCG@10 on dev of that step.
    """

    step: int = 0
    best_step: int = 0
    best_ndcg: float = -1.0


def check_losses(losses: Sequence[LossSpec]) -> None:
    """Refuse, before anything is scored, losses that :func:`train` could not call.

    Raises:
        RecipeError: no such loss or option, an impossible value, or a loss that reads what no step makes.
    """
    for spec in losses:
        bind(spec.name, spec.options)
        info = LOSSES[spec.name]
        missing = sorted(set(info.needs) - _PROVIDED.get(info.kind, frozenset()))
        if missing:
            usable = (name for name, other in LOSSES.items() if set(other.needs) <= _PROVIDED.get(other.kind, set()))
            raise RecipeError(
                f"losses: {spec.name} reads {info.kind} inputs ({', '.join(missing)}), which training does not make; "
                f"use one of {', '.join(usable)}"
            )


def train(
    student: TorchEncoder,
    documents: Callable[[torch.device], DocumentTower],
    data: TrainingSet,
    dev: DevSet | None,
    losses: Sequence[LossSpec],
    schedule: ScheduleSpec,
    seed: int,
    folder: Path,
) -> Mapping[str, Any]:
    """Train ``student`` in place and leave its best weights in it.

    ``folder`` receives ``metrics.jsonl``, TensorBoard events and two checkpoints. Called again on the
    folder of a killed run, training goes on from the last checkpoint and gives, on a CPU, the same
    loss curve and weights to the bit.

    Args:
        student: The encoder to train.
        documents: Makes the document tower on the device of training.
        data: Lists, teacher scores, targets.
        dev: Picks the checkpoint; None keeps the last.
        losses: The terms of the loss with their weights.
        schedule: How long and how fast.
        seed: Seed of batch order and dropout.
        folder: Where logs and checkpoints go.

    Returns:
        Facts for the manifest: steps, best step, its nDCG@10 on dev.

    Raises:
        RecipeError: as :func:`check_losses`.
        DataError: the loss is not finite; names step and terms.
    """
    check_losses(losses)
    from accelerate import Accelerator

    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(_decay_groups(student, schedule.weight_decay), lr=schedule.learning_rate, fused=True)
    model, optimizer = accelerator.prepare(student, optimizer)
    terms = _terms(losses)
    rows = student.tokenizer([data.texts[item.query_id] for item in data.lists], "query")
    tower = documents(accelerator.device)
    queries_per_epoch = min(len(data.lists), schedule.epoch_queries or len(data.lists))
    total = schedule.epochs * math.ceil(queries_per_epoch / schedule.batch_queries)

    at = Progress()
    resumed = (folder / LAST).is_file()
    if resumed:
        at = Progress(**load_checkpoint(folder / LAST, student, optimizer.optimizer))
    with MetricsLog(folder, at.step if resumed else None) as log, progress("train", total, "steps") as advance:
        if not resumed and dev is not None:
            log.write(
                "dev", 0, {"nDCG@10": dev.ndcg_at_10(student), "queries": len(dev.queries), "documents": dev.documents}
            )
        advance(at.step)
        for step, epoch, positions in _steps(len(data.lists), schedule, seed, start=at.step):
            started = time.perf_counter()
            # Dropout draws from torch's global generator, so a resumed run must find it where it was.
            torch.manual_seed(int(np.random.default_rng([seed, step]).integers(2**63)))
            rate = learning_rate(step, total, schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate

            model.train()
            batch = assemble(data, positions)
            queries = encode_rows(model, [rows[i] for i in positions], schedule.micro_tokens, accelerator.device)
            inputs = _loss_inputs(batch, queries, tower, data)
            values = {label: term.function(inputs) for label, term in terms.items()}
            loss = torch.stack([term.weight * values[label] for label, term in terms.items()]).sum()
            if not torch.isfinite(loss):
                raise DataError(
                    f"step {step + 1}: loss is {loss.item()} ({_shown(values)}); lower schedule.learning_rate"
                )
            accelerator.backward(loss)
            norm = float(accelerator.clip_grad_norm_(model.parameters(), schedule.clip))
            if not math.isfinite(norm):
                raise DataError(f"step {step + 1}: gradient norm is {norm}; lower schedule.learning_rate")
            optimizer.step()
            optimizer.zero_grad()

            at = Progress(step + 1, at.best_step, at.best_ndcg)
            log.write(
                "train",
                at.step,
                {
                    "epoch": epoch + 1,
                    "loss": loss.item(),
                    "losses": {name: value.item() for name, value in values.items()},
                    "learning_rate": rate,
                    "gradient_norm": norm,
                    "queries_per_second": len(positions) / (time.perf_counter() - started),
                },
            )
            if dev is not None and at.step in evenly(total, schedule.evaluations):
                at = _evaluate(at, student, dev, log, folder)
            if at.step in evenly(total, schedule.checkpoints):
                save_checkpoint(folder / LAST, student, optimizer.optimizer, asdict(at))
            advance(1)
    if at.best_step:
        load_weights(folder / BEST, student)
    student.eval()
    return {"steps": at.step, "best_step": at.best_step or at.step, "dev_nDCG@10": at.best_ndcg if dev else None}


def _evaluate(at: Progress, student: TorchEncoder, dev: DevSet, log: MetricsLog, folder: Path) -> Progress:
    """Measure the student on dev and keep its weights if they are the best so far."""
    ndcg = dev.ndcg_at_10(student)
    log.write("dev", at.step, {"nDCG@10": ndcg})
    if ndcg <= at.best_ndcg:
        return at
    save_weights(folder / BEST, student, {"step": at.step, "nDCG@10": ndcg})
    return Progress(at.step, at.step, ndcg)


def _steps(
    count: int, schedule: ScheduleSpec, seed: int, start: int
) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    """Yield (step, epoch, positions) from step ``start`` on."""
    step = 0
    for epoch in range(schedule.epochs):
        for positions in epoch_batches(count, schedule.batch_queries, seed, epoch, schedule.epoch_queries):
            if step >= start:
                yield step, epoch, positions
            step += 1


@dataclass(frozen=True)
class _Term:
    weight: float
    function: Callable[[Mapping[Kind, Inputs]], Tensor]


def _terms(losses: Sequence[LossSpec]) -> dict[str, _Term]:
    """Bind each loss of the recipe; one that stands there twice is numbered in the log."""
    terms: dict[str, _Term] = {}
    for spec in losses:
        label = spec.name
        while label in terms:
            label += "'"
        terms[label] = _Term(spec.weight, _bound(spec))
    return terms


def _bound(spec: LossSpec) -> Callable[[Mapping[Kind, Inputs]], Tensor]:
    function = bind(spec.name, spec.options)
    info = LOSSES[spec.name]

    return lambda inputs: function(*info.arguments(inputs[info.kind]))


def _loss_inputs(batch: Batch, queries: Tensor, tower: DocumentTower, data: TrainingSet) -> Mapping[Kind, Inputs]:
    """Score every query against every document once; lists are gathered from that matrix."""
    device = queries.device
    documents = tower.vectors(batch.doc_ids)
    in_batch = queries @ documents.T
    targets = torch.from_numpy(np.asarray(data.query_targets[batch.rows])).to(device)
    vectors = queries
    document_targets = tower.targets(batch.doc_ids)
    if document_targets is not None:
        vectors, targets = torch.cat([queries, documents]), torch.cat([targets, document_targets])
    return {
        "scores": ScoreInputs(
            student=in_batch.gather(1, batch.columns.to(device)),
            mask=batch.mask.to(device),
            teacher=None if batch.teacher is None else batch.teacher.to(device),
        ),
        "in_batch": InBatchInputs(
            student=in_batch,
            positives=batch.positives.to(device),
            mask=torch.ones_like(in_batch, dtype=torch.bool),
        ),
        "embeddings": EmbeddingInputs(student=vectors, teacher=targets),
    }


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave biases and layer norms alone, as BERT's own recipe does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _shown(values: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {value.item():.4g}" for name, value in values.items())
