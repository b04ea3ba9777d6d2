"""The terms of a recipe's loss over one step, at every Matryoshka size.

A step's tensors are kept as vectors, and each kind of input is made from them once for all terms that read it. That is
why nothing here or in the loop depends on which losses a recipe names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from retrieval_kd.errors import DataError, RecipeError
from retrieval_kd.losses.inputs import EmbeddingInputs, InBatchInputs, Inputs, PairInputs, ScoreInputs, StackInputs
from retrieval_kd.losses.registry import Kind, LossInfo, bind, bind_state, loss_info
from retrieval_kd.losses.state import LossState
from retrieval_kd.recipes.schema import LossSpec
from retrieval_kd.training.batches import Batch

Teacher = Literal["scores", "encoder", "late_interaction"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step knows: its lists, and vectors of all who look at them.

    Attributes:
        batch: The lists, on the device of training.
        queries: float ``[B, d]``, the student's, with gradients.
        documents: float ``[C, d]``, with gradients where they are live.
        query_targets: float ``[B, t]``, the large encoder's queries.
        document_targets: float ``[C, t]``, its documents.
        documents_live: Whether documents are to be moved to their targets.
        teacher: float ``[B, L]``, the recipe's teacher's scores of the lists; with gradients where it trains along.
        maxsim: float ``[B, C]``, a late-interaction teacher's scores of every query for every document.
        previous: Queries ``[B, d]`` and documents ``[C, d]`` by a frozen copy of the student as the stage began.
        stacks: The student's queries ``[B, K, w]`` and documents ``[C, K, w]`` by layer.
        teacher_stacks: The same by the teacher's layers matched with them.
        extra: The student's vectors of texts that only embedding losses read, and those to move them to, ``[E, d]``.
        unit: Whether the student's vectors have unit length, so that cut ones are scaled back to it.
        made: Inputs by kind and teacher, each made once.
    """

    batch: Batch
    queries: Tensor
    documents: Tensor
    query_targets: Tensor
    document_targets: Tensor
    documents_live: bool
    teacher: Tensor | None = None
    maxsim: Tensor | None = None
    previous: tuple[Tensor, Tensor] | None = None
    stacks: tuple[Tensor, Tensor] | None = None
    teacher_stacks: tuple[Tensor, Tensor] | None = None
    extra: tuple[Tensor, Tensor] | None = None
    unit: bool = True
    made: dict[tuple[Kind, Teacher], Inputs] = field(default_factory=dict, init=False, repr=False, compare=False)

    def scores(self) -> Tensor:
        """Return the student's score of every query for every document, ``[B, C]``."""
        return self.queries @ self.documents.T

    def lists(self, scores: Tensor) -> Tensor:
        """Gather ``[..., B, C]`` values into the lists, ``[..., B, L]``."""
        return scores.gather(-1, self.batch.columns.expand(*scores.shape[:-1], -1))

    def cut(self, size: int) -> Step:
        """Return the step as it looks to the first ``size`` numbers of the student's vectors.

        Whatever is compared with the student's vectors and as wide as they are is cut too. Teachers' scores are not:
        they are what every size has to reach.
        """

        def both(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if pair is None else (self.cut_vectors(pair[0], size), self.cut_vectors(pair[1], size))

        queries, documents = self.cut_vectors(self.queries, size), self.cut_vectors(self.documents, size)
        # The targets of extra texts are cut where they are compared, like all targets.
        extra = None if self.extra is None else (self.cut_vectors(self.extra[0], size), self.extra[1])
        return replace(
            self,
            queries=queries,
            documents=documents,
            previous=both(self.previous),
            stacks=both(self.stacks),
            extra=extra,
        )

    def cut_vectors(self, vectors: Tensor, size: int) -> Tensor:
        """Return the first ``size`` numbers of vectors as wide as the student's; any other tensor as it is."""
        width = self.queries.shape[-1]
        if vectors.dim() < 2 or vectors.shape[-1] != width or size == width:
            return vectors
        return F.normalize(vectors[..., :size], dim=-1) if self.unit else vectors[..., :size]

    def inputs(self, kind: Kind, teacher: Teacher) -> Inputs:
        """Return the inputs of one kind; fields that the run has no source for stay None.

        Raises:
            RecipeError: The run has no source for the kind at all.
        """
        if (kind, teacher) not in self.made:
            self.made[kind, teacher] = _MAKERS[kind](self, teacher)
        return self.made[kind, teacher]

    def compared(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the student's and the teacher's scores of the lists, and their mask, ``[B, L]`` each, to be measured.

        Where the recipe has no teacher of scores, the encoder's own are taken.
        """
        teacher = self.teacher
        if teacher is None:
            teacher = self.lists(self.query_targets @ self.document_targets.T)
        return self.lists(self.scores()), teacher, self.batch.mask

    def in_batch_teacher(self, teacher: Teacher) -> tuple[Tensor | None, Tensor]:
        """Return a teacher's scores ``[B, C]``, and where they are known."""
        listed = self.listed()
        if teacher == "late_interaction":
            return self.maxsim, torch.ones_like(listed)
        if teacher == "encoder":
            return self.query_targets @ self.document_targets.T, torch.ones_like(listed)
        if self.teacher is None:
            return None, listed
        # A list names each document once, and its padding points at some column: add what is real only.
        filled = torch.where(self.batch.mask, self.teacher, 0.0)
        scores = filled.new_zeros(listed.shape).scatter_add(1, self.batch.columns, filled)
        return scores, listed

    def require_finite(self, teacher: Teacher, remedy: str) -> None:
        """Refuse a teacher's score that is not a number.

        Raises:
            DataError: names the query, the document and the remedy.
        """
        scores, scored = self.in_batch_teacher(teacher)
        if scores is None or bool((scores.isfinite() | ~scored).all()):
            return
        row, column = (scored & ~scores.isfinite()).nonzero()[0].tolist()
        raise DataError(
            f"teacher: the score of query {self.batch.query_ids[row]!r} and document {self.batch.doc_ids[column]!r} is "
            f"{scores[row, column].item()}; {remedy}"
        )

    def listed(self) -> Tensor:
        """Return which documents stand in each query's own list, bool ``[B, C]``."""
        counts = torch.zeros(self.batch.positives.shape, dtype=torch.int64, device=self.batch.columns.device)
        return counts.scatter_add(1, self.batch.columns, self.batch.mask.long()) > 0

    def listed_positives(self) -> Tensor:
        """Return which candidates of each list are judged relevant, bool ``[B, L]``."""
        return self.lists(self.batch.positives) & self.batch.mask


def _score_inputs(step: Step, teacher: Teacher) -> ScoreInputs:
    in_batch = None if teacher == "scores" else step.in_batch_teacher(teacher)[0]
    return ScoreInputs(
        student=step.lists(step.scores()),
        mask=step.batch.mask,
        teacher=step.teacher if in_batch is None else step.lists(in_batch),
        previous=None if step.previous is None else step.lists(step.previous[0] @ step.previous[1].T),
        positives=step.listed_positives(),
    )


def _pair_inputs(step: Step, teacher: Teacher) -> PairInputs:
    preferences = step.batch.preferences
    if preferences is None:
        raise RecipeError("losses: a loss over pairs needs a pairwise teacher's preferences; name a pairwise teacher")
    return PairInputs(
        student=step.lists(step.scores()),
        mask=step.batch.mask,
        preferences=preferences.nan_to_num(),
        compared=~preferences.isnan(),
    )


def _in_batch_inputs(step: Step, teacher: Teacher) -> InBatchInputs:
    student = step.scores()
    scores, scored = step.in_batch_teacher(teacher)
    return InBatchInputs(
        student=student,
        positives=step.batch.positives,
        mask=torch.ones_like(step.batch.positives),
        teacher=scores,
        scored=scored,
        listed=step.listed(),
        documents=step.documents @ step.documents.T,
    )


def _embedding_inputs(step: Step, teacher: Teacher) -> EmbeddingInputs:
    pairs = [(step.queries, step.query_targets)]
    if step.documents_live:
        pairs.append((step.documents, step.document_targets))
    if step.extra is not None:
        pairs.append(step.extra)
    student, targets = zip(*pairs, strict=True)
    return EmbeddingInputs(student=torch.cat(student), teacher=torch.cat(targets))


def _stack_inputs(step: Step, teacher: Teacher) -> StackInputs:
    if step.stacks is None:
        raise RecipeError("losses: a loss over layers needs the encoders' layers, which this run does not give")

    def scores(stacks: tuple[Tensor, Tensor]) -> Tensor:
        queries, documents = stacks
        return step.lists(torch.einsum("bkw,ckw->kbc", queries, documents))

    return StackInputs(
        student=scores(step.stacks),
        mask=step.batch.mask,
        teacher=None if step.teacher_stacks is None else scores(step.teacher_stacks),
        positives=step.listed_positives(),
    )


_MAKERS: Mapping[Kind, Callable[[Step, Teacher], Inputs]] = {
    "scores": _score_inputs,
    "pairs": _pair_inputs,
    "in_batch": _in_batch_inputs,
    "embeddings": _embedding_inputs,
    "stacks": _stack_inputs,
}


@dataclass(frozen=True)
class Term:
    """One loss of a recipe, bound to its options, with what it remembers.

    Attributes:
        label: Its name in the log; a loss that stands twice in a recipe is primed.
        spec: The recipe's entry.
        info: The registry's entry.
        function: The loss with its options.
        state: What it remembers between steps; None for most.
    """

    label: str
    spec: LossSpec
    info: LossInfo
    function: Callable[..., Tensor]
    state: LossState | None

    def inputs(self, step: Step) -> Inputs:
        """Return what the loss is given, its state's fields included."""
        inputs = step.inputs(self.info.kind, self.spec.teacher)
        return inputs if self.state is None else replace(cast("Any", inputs), **self.state.fields())


class Terms:
    """All losses of a recipe over one step."""

    def __init__(self, losses: Sequence[LossSpec], sizes: Mapping[int, float]) -> None:
        """Bind the losses.

        Args:
            losses: The recipe's terms.
            sizes: Weight of each vector size that is trained; one size, the full one, without Matryoshka.
        """
        self._sizes = dict(sizes)
        self._terms: list[Term] = []
        taken: set[str] = set()
        for spec in losses:
            label = spec.name
            while label in taken:
                label += "'"
            taken.add(label)
            function, state = bind(spec.name, spec.options), bind_state(spec.name, spec.options)
            self._terms.append(Term(label, spec, loss_info(spec.name, spec.options), function, state))

    @property
    def states(self) -> dict[str, LossState]:
        """Return what the losses remember, by label, for the checkpoint."""
        return {term.label: term.state for term in self._terms if term.state is not None}

    @property
    def needs(self) -> frozenset[tuple[Kind, str]]:
        """Return the kinds and fields that the losses read."""
        return frozenset((term.info.kind, need) for term in self._terms for need in term.info.needs)

    def __call__(self, step: Step) -> dict[str, Tensor]:
        """Return each term's loss by label, summed over the sizes and not yet weighed, float ``[]``."""
        views = {size: step.cut(size) for size in self._sizes}
        values: dict[str, Tensor] = {}
        for term in self._terms:
            parts = []
            for size, weight in self._sizes.items():
                arguments = term.info.arguments(term.inputs(views[size]))
                if term.info.kind == "embeddings":
                    # Targets, and what a state kept of them, are cut like the vectors that they are compared with.
                    arguments = tuple(step.cut_vectors(tensor, size) for tensor in arguments)
                parts.append(weight * term.function(*arguments))
            values[term.label] = torch.stack(parts).sum()
        return values

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms, float ``[]``."""
        return torch.stack([term.spec.weight * values[term.label] for term in self._terms]).sum()

    def learn(self, step: Step, values: Mapping[str, float], progress: float) -> None:
        """Let the losses that remember learn from a finished step; ``progress`` is the share of steps done."""
        for term in self._terms:
            if term.state is not None:
                term.state.update(term.inputs(step), values[term.label], progress)
