"""The training loop: every step in view, no trainer behind it.

A step assembles its lists over their distinct documents, encodes each text once, hands scores and
vectors to the recipe's losses, and moves the student. The loop knows neither which losses there are
nor whether the documents are frozen, nor how many processes share a batch.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import DataError, RecipeError
from retrieval_kd.losses.registry import LOSSES, bind, bind_state
from retrieval_kd.progress import progress
from retrieval_kd.recipes.schema import LossSpec, ScheduleSpec
from retrieval_kd.training.average import WeightAverage
from retrieval_kd.training.batches import Batch, TrainingSet, assemble, epoch_batches
from retrieval_kd.training.checkpoint import Stateful, load_checkpoint, load_weights, save_checkpoint, save_weights
from retrieval_kd.training.dev import DevSet
from retrieval_kd.training.machine import Machine, sparse_token_gradients
from retrieval_kd.training.metrics import MetricsLog, agreement
from retrieval_kd.training.passes import Passes
from retrieval_kd.training.preflight import teacher_warnings
from retrieval_kd.training.schedule import evenly, learning_rate
from retrieval_kd.training.terms import Step, Terms
from retrieval_kd.training.towers import DocumentTower, JointReranker, LayerTeacher, TokenRows, Tower

LAST = "checkpoints/last.safetensors"
BEST = "checkpoints/best.safetensors"

# Steps whose teachers are looked at before training.
_PREVIEWED = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Optimiser steps taken.
        best_step: The step whose weights were best on dev; 0 when none was measured.
        best_ndcg: nDCG@10 on dev of that step.
    """

    step: int = 0
    best_step: int = 0
    best_ndcg: float = -1.0


def check_losses(losses: Sequence[LossSpec], *, pairwise: bool = False) -> None:
    """Refuse, before anything is scored, losses that :func:`train` could not call.

    Args:
        losses: The recipe's terms.
        pairwise: Whether the teacher compares candidates two at a time.

    Raises:
        RecipeError: no such loss or option, an impossible value, or a loss that reads what no step makes.
    """
    for spec in losses:
        bind(spec.name, spec.options)
        bind_state(spec.name, spec.options)
        if LOSSES[spec.name].kind == "pairs" and not pairwise:
            raise RecipeError(
                f"losses: {spec.name} reads pairwise preferences, which the recipe's teacher does not give; "
                "name a pairwise teacher or another loss"
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
    *,
    layer_teacher: LayerTeacher | None = None,
    joint: JointReranker | None = None,
) -> Mapping[str, Any]:
    """Train ``student`` in place and leave its best weights in it.

    ``folder`` receives ``metrics.jsonl``, TensorBoard events and two checkpoints. Called again on the
    folder of a killed run, with the student as it was then, training goes on from the last checkpoint
    and gives, on a CPU, the same loss curve and weights to the bit.

    A document tower's own encoder, if it is another than the student, and ``joint`` train along: they
    are checkpointed with the student, and their weights at the best step are left in them.

    Args:
        student: The encoder to train.
        documents: Makes the document tower on the device of training.
        data: Lists, teacher scores, targets.
        dev: Picks the checkpoint; None keeps the last.
        losses: The terms of the loss with their weights.
        schedule: How long and how fast.
        seed: Seed of batch order and dropout.
        folder: Where logs and checkpoints go.
        layer_teacher: For losses over layers; its layers are matched with the student's in order.
        joint: A reranker that learns along; it scores the lists in place of ``data.teacher``.

    Returns:
        Facts for the manifest: steps, best step, its nDCG@10 on dev, the diagnostics of
        :meth:`retrieval_kd.training.metrics.MetricsLog.summary`, and what was warned of.

    Raises:
        RecipeError: as :func:`check_losses`, widths that do not fit, or a precision the device lacks.
        DataError: the loss is not finite, or a teacher's score is not; names step and terms, or query and document.
    """
    check_losses(losses, pairwise=data.preferences is not None)
    machine = Machine(schedule.precision)
    run = _Run(machine, student, documents, data, losses, schedule, layer_teacher, joint)
    first = itertools.islice(_steps(len(data.lists), schedule, seed, start=0), _PREVIEWED)
    stored = data if joint is None else replace(data, teacher=None)
    warnings = teacher_warnings(stored, losses, (run.preview(positions) for _, _, positions in first))
    if machine.main:
        for line in warnings:
            _log.warning(line)
    total = schedule.steps(len(data.lists))
    at = Progress()
    # The first process may still be clearing the folder of another run.
    machine.wait()
    resumed = (folder / LAST).is_file()
    if resumed:
        at = Progress(**load_checkpoint(folder / LAST, run.trained, run.optimizer, run.states))
    machine.wait()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(MetricsLog(folder, at.step if resumed else None)) if machine.main else None
        advance = stack.enter_context(progress("train", total, "steps"))
        if log is not None and dev is not None and not resumed:
            ndcg = _ndcg(dev, run.trained)
            log.write("dev", 0, {"nDCG@10": ndcg, "queries": len(dev.queries), "documents": dev.documents})
        advance(at.step)
        for step, epoch, positions in _steps(len(data.lists), schedule, seed, start=at.step):
            # Dropout draws from torch's global generator, so a resumed run must find it where it was.
            draw = np.random.default_rng([seed, step, machine.index])
            torch.manual_seed(int(draw.integers(2**63)))
            rate = learning_rate(step, total, schedule)
            extra = None if data.extra is None else data.extra.positions(seed, step)
            pace, done = rate / schedule.learning_rate, (step + 1) / total
            values = run.step(positions, extra, pace, done, f"step {step + 1}")
            at = Progress(step + 1, at.best_step, at.best_ndcg)
            if log is not None:
                log.write("train", at.step, {"epoch": epoch + 1, "learning_rate": rate, **values})
                if dev is not None and at.step in evenly(total, schedule.evaluations):
                    at = _evaluate(at, run.measured, dev, log, folder)
                if at.step in evenly(total, schedule.checkpoints):
                    save_checkpoint(folder / LAST, run.trained, run.optimizer, asdict(at), run.states)
            advance(1)
        at = Progress(**machine.agree(asdict(at)))
        summary = machine.agree(log.summary() if log is not None else {})
    if at.best_step:
        load_weights(folder / BEST, run.trained)
    else:
        run.trained.load_state_dict(run.measured.state_dict())
    run.trained.eval()
    return {
        "steps": at.step,
        "best_step": at.best_step or at.step,
        "dev_nDCG@10": at.best_ndcg if dev else None,
        **summary,
        "warnings": list(warnings),
    }


class _Run:
    """What stays the same from step to step, and one step."""

    def __init__(
        self,
        machine: Machine,
        student: TorchEncoder,
        documents: Callable[[torch.device], DocumentTower],
        data: TrainingSet,
        losses: Sequence[LossSpec],
        schedule: ScheduleSpec,
        layer_teacher: LayerTeacher | None,
        joint: JointReranker | None,
    ) -> None:
        self.machine = machine
        self.data = data
        self.schedule = schedule
        self.terms = Terms(losses, _sizes(student, schedule))
        self.joint = joint
        stacked = [spec.name for spec in losses if LOSSES[spec.name].kind == "stacks"]
        if stacked and layer_teacher is None:
            raise RecipeError(f"losses: {stacked[0]} needs layers of student and teacher, which this run does not give")
        self.layer_teacher = layer_teacher if stacked else None
        if self.layer_teacher is not None:
            self.layer_teacher.to(machine.device)
        texts = {**data.texts, **data.extra.texts} if data.extra else data.texts
        self.queries = Tower(student, TokenRows(student.tokenizer, "query", lambda ids: texts))
        student.to(machine.device)
        self.documents = documents(machine.device)
        self.trained = nn.ModuleDict({"student": student})
        if self.documents.encoder not in (None, student):
            self.trained["documents"] = self.documents.encoder
        if joint is not None:
            self.trained["joint"] = joint.module
        self.trained.to(machine.device)
        sparse_token_gradients(self.trained)
        if schedule.activation_checkpointing:
            for module in self.trained.values():
                _checkpoint_activations(module)
        _check_widths(student, self.documents, data, losses)
        # Copied now, before a checkpoint is read: what the student knew as the stage began.
        self.previous: tuple[Tower, DocumentTower] | None = None
        if ("scores", "previous") in self.terms.needs:
            self.previous = (self.queries.frozen_copy(), self.documents.frozen_copy())
        groups = [
            {**group, "peak": joint.learning_rate if joint and name == "joint" else schedule.learning_rate}
            for name, module in self.trained.items()
            for group in _decay_groups(module, schedule.weight_decay)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, fused=True)
        self.average = None if schedule.average == "none" else WeightAverage(self.trained, schedule)

    @property
    def states(self) -> dict[str, Stateful]:
        """Return what a checkpoint holds besides weights and moments."""
        averages = {} if self.average is None else {"average": self.average}
        return {**self.terms.states, **averages, "precision": self.machine}

    @property
    def measured(self) -> nn.ModuleDict:
        """Return the modules that are measured and kept: the trained ones, or their averages."""
        modules = self.trained if self.average is None else self.average.of(self.trained)
        return cast("nn.ModuleDict", modules)

    def step(
        self,
        positions: npt.NDArray[np.int64],
        extra: npt.NDArray[np.int64] | None,
        pace: float,
        progress: float,
        where: str,
    ) -> dict[str, Any]:
        """Move the student once.

        Args:
            positions: The batch's queries.
            extra: Positions of the step's extra texts; None without any.
            pace: Share of the peak learning rate.
            progress: Share of the run's steps that are done after this one.
            where: What an error calls this step.

        Returns:
            What the log says about the step.
        """
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * pace
        self.trained.train()
        passes = Passes(self.machine, self.schedule.micro_tokens, self.schedule.gradient_cache)
        try:
            step = self._look(assemble(self.data, positions).to(self.machine.device), extra, passes)
            losses = self.terms(step)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        loss = self.terms.total(losses)
        values = {label: value.item() for label, value in losses.items()}
        if not torch.isfinite(loss):
            shown = ", ".join(f"{label} {value:.4g}" for label, value in values.items())
            raise DataError(f"{where}: loss is {loss.item()} ({shown}); lower schedule.learning_rate")
        self.machine.backward(loss)
        passes.backward()
        try:
            norm = self.machine.move(self.optimizer, self.trained.parameters(), self.schedule.clip)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.trained, progress)
        self.terms.learn(step, values, progress)
        seconds = time.perf_counter() - started
        return {
            "loss": loss.item(),
            "losses": values,
            # A step that fp16 left out has none.
            "gradient_norm": norm if math.isfinite(norm) else None,
            **agreement(*step.compared()),
            "padding": 1 - passes.tokens / passes.padded if passes.padded else 0.0,
            "queries_per_second": len(positions) / seconds,
            "texts_per_second": passes.texts / seconds,
        }

    @torch.no_grad()
    def preview(self, positions: npt.NDArray[np.int64]) -> Step:
        """Return the step of a batch's queries as the losses would read it, without gradients and dropout."""
        self.trained.eval()
        # Cached passes keep nothing to go back through.
        passes = Passes(self.machine, self.schedule.micro_tokens, cached=True)
        return self._look(assemble(self.data, positions).to(self.machine.device), None, passes)

    def _look(self, batch: Batch, extra: npt.NDArray[np.int64] | None, passes: Passes) -> Step:
        """Encode the batch's texts, each once by everyone who has something to say about it."""
        layers: tuple[int, ...] = ()
        stacks = teacher_stacks = None
        if self.layer_teacher is not None:
            layers = tuple(range(len(self.layer_teacher.layers)))
        queries = self.queries.encode(batch.query_ids, passes, layers)
        documents = self.documents.encode(batch.doc_ids, passes, layers)
        if self.layer_teacher is not None:
            matched = self.layer_teacher.layers
            theirs = [
                tower.encode(ids, passes, matched).layers
                for tower, ids in (
                    (self.layer_teacher.queries, batch.query_ids),
                    (self.layer_teacher.documents, batch.doc_ids),
                )
            ]
            teacher_stacks = (_present(theirs[0]), _present(theirs[1]))
            # Frozen documents are the teacher's: in asymmetric mode the student's layers rank the teacher's.
            own = teacher_stacks[1] if documents.layers is None else documents.layers
            stacks = (_present(queries.layers), own)
        previous = None
        if self.previous is not None:
            frozen_queries, frozen_documents = self.previous
            previous = (
                frozen_queries.encode(batch.query_ids, passes).vectors,
                frozen_documents.encode(batch.doc_ids, passes).vectors.to(queries.vectors),
            )
        extra_vectors = None
        if extra is not None and self.data.extra is not None:
            encoded = self.queries.encode([self.data.extra.ids[i] for i in extra], passes).vectors
            extra_vectors = (encoded, torch.from_numpy(np.asarray(self.data.extra.targets[extra])).to(encoded))
        targets = self.documents.targets(batch.doc_ids)
        vectors = documents.vectors.to(queries.vectors)
        step = Step(
            batch=batch,
            queries=queries.vectors,
            documents=vectors,
            query_targets=torch.from_numpy(np.asarray(self.data.query_targets[batch.rows])).to(vectors),
            document_targets=vectors.detach() if targets is None else targets.to(vectors),
            documents_live=targets is not None,
            teacher=batch.teacher if self.joint is None else self._live_scores(self.joint, batch, passes),
            maxsim=None if self.data.maxsim is None else self.data.maxsim(batch.query_ids, batch.doc_ids).to(vectors),
            previous=previous,
            stacks=stacks,
            teacher_stacks=teacher_stacks,
            extra=extra_vectors,
            unit=self.queries.encoder.card.normalize,
        )
        if self.joint is not None:
            step.require_finite("scores", "mend the teacher or lower joint.learning_rate")
        if step.maxsim is not None:
            step.require_finite("late_interaction", "mend the teacher")
        return step

    def _live_scores(self, joint: JointReranker, batch: Batch, passes: Passes) -> Tensor:
        lists, ranks = batch.mask.nonzero(as_tuple=True)
        columns = batch.columns[lists, ranks].tolist()
        pairs = [(batch.query_ids[i], batch.doc_ids[column]) for i, column in zip(lists.tolist(), columns, strict=True)]
        logits = joint.scores(pairs, passes)
        return logits.new_zeros(batch.mask.shape).index_put((lists, ranks), logits)


def _evaluate(at: Progress, measured: nn.ModuleDict, dev: DevSet, log: MetricsLog, folder: Path) -> Progress:
    """Measure the student on dev and keep its weights if they are the best so far."""
    ndcg = _ndcg(dev, measured)
    log.write("dev", at.step, {"nDCG@10": ndcg, **log.means()})
    if ndcg <= at.best_ndcg:
        return at
    save_weights(folder / BEST, measured, {"step": at.step, "nDCG@10": ndcg})
    return Progress(at.step, at.step, ndcg)


def _ndcg(dev: DevSet, modules: nn.ModuleDict) -> float:
    towers = cast("dict[str, TorchEncoder]", dict(modules.items()))
    return dev.ndcg_at_10(towers["student"], towers.get("documents"))


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


def _sizes(student: TorchEncoder, schedule: ScheduleSpec) -> dict[int, float]:
    """Return the weight of each width that the student's card promises."""
    widths = student.card.dimensions
    weights = schedule.size_weights or (1.0,) * len(widths)
    if len(weights) != len(widths):
        raise RecipeError(
            f"schedule.size_weights: {len(weights)} weights for the widths {list(widths)}; give one for each, the full "
            "one first"
        )
    return dict(zip(widths, weights, strict=True))


def _check_widths(
    student: TorchEncoder, documents: DocumentTower, data: TrainingSet, losses: Sequence[LossSpec]
) -> None:
    """Refuse vectors that are compared though their widths differ.

    Raises:
        RecipeError: names the widths and what to do.
    """
    width, targets = student.card.dimension, data.query_targets.shape[1]
    if width == targets:
        return
    embedding = [spec.name for spec in losses if LOSSES[spec.name].kind == "embeddings"]
    fitting = [name for name in embedding if not LOSSES[name].any_width]
    if fitting:
        raise RecipeError(
            f"losses: {fitting[0]} compares the student's vectors ({width} wide) with the encoder's ({targets} wide); "
            "set student.projection to true, or use a relational loss"
        )
    if documents.encoder is None:
        raise RecipeError(
            f"student: its vectors are {width} wide and the frozen documents' {targets}; set student.projection to true"
        )


def _present(layers: Tensor | None) -> Tensor:
    if layers is None:
        raise RecipeError("losses: a loss over layers needs an encoder with layers")
    return layers


def _checkpoint_activations(module: nn.Module) -> None:
    """Let a transformer keep only the states between its layers."""
    body = cast("Any", getattr(module, "body", module))
    try:
        body.activation_checkpointing_enable()
    except (AttributeError, ValueError):
        raise RecipeError(
            f"schedule.activation_checkpointing: {type(body).__name__} has no layers to checkpoint; set it to false"
        ) from None


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave biases and layer norms alone, as BERT's own recipe does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
