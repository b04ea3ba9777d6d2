"""A training run in a second, in every mode and with every loss."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WORDS, tiny_encoder
from tokenizers import Tokenizer
from torch import Tensor

from retrieval_kd.collections.base import Document
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.losses.registry import LOSSES
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.loader import load_recipe, shipped_recipes
from retrieval_kd.recipes.schema import LossSpec, ScheduleSpec, StudentSpec
from retrieval_kd.students.build import build_student
from retrieval_kd.teachers.pairs import PairTokenizer
from retrieval_kd.training.batches import ExtraTexts, TrainingSet
from retrieval_kd.training.dev import DevSet
from retrieval_kd.training.loop import _Run, train
from retrieval_kd.training.machine import Machine
from retrieval_kd.training.towers import DocumentTower, FrozenDocuments, JointReranker, LayerTeacher, LiveDocuments

SCHEDULE = ScheduleSpec(epochs=3, batch_queries=8, learning_rate=3e-3, evaluations=3, checkpoints=6, micro_tokens=64)
LOSSES_OF_A_RECIPE = (
    LossSpec("listwise_kl", 1.0, options={"student_temperature": 0.1}),
    LossSpec("embedding_regression", 1.0),
)
EVERY_LOSS = tuple(LossSpec(name, 0.1) for name in LOSSES)


class Texts:
    """Random documents and queries over the tiny vocabulary."""

    name = "texts"

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.docs = {f"d{i}": " ".join(rng.choice(WORDS, size=8)) for i in range(20)}
        self.query_texts = {f"q{i}": " ".join(rng.choice(WORDS, size=4)) for i in range(24)}

    def documents(self) -> Any:
        return (Document(doc_id, "", text) for doc_id, text in self.docs.items())

    def contents(self, doc_ids: Any) -> dict[str, str]:
        return {doc_id: self.docs[doc_id] for doc_id in doc_ids}


class Job:
    """A one-layer student of a two-layer encoder whose own ranking is the judgement."""

    def __init__(self, mode: str = "asymmetric", dropout: float = 0.0, sizes: Sequence[int] = ()) -> None:
        self.texts = Texts()
        self.mode = mode
        self.start = tiny_encoder(layers=2)
        spec = StudentSpec(mode=mode, layers=(1,), dropout=dropout)  # type: ignore[arg-type]
        self.student = build_student(self.start, spec, self.start.card)
        self.student._card = replace(self.student.card, dimensions=(16, *sizes))
        ids = sorted(self.texts.docs)
        vectors = self.start.encode([self.texts.docs[i] for i in ids], "document")
        self.corpus = EncodedCorpus(ids, vectors, self.start.card, "", "")
        query_ids = list(self.texts.query_texts)
        targets = self.start.encode(list(self.texts.query_texts.values()), "query")
        order = np.argsort(-(targets @ vectors.T), axis=1)
        best = {query_id: ids[row[0]] for query_id, row in zip(query_ids, order, strict=True)}
        lists = [
            CandidateList(q, (best[q], *(ids[j] for j in row[3 : 6 + i % 3])), (1, *([0] * (3 + i % 3))))
            for i, (q, row) in enumerate(zip(query_ids, order, strict=True))
        ]
        scores = [
            10 * np.asarray(vectors[[self.corpus.row_of[d] for d in item.doc_ids]] @ vector, np.float32)
            for item, vector in zip(lists, targets, strict=True)
        ]
        preferences = [(1 / (1 + np.exp(one[None, :] - one[:, None]))).astype(np.float32) for one in scores]
        for one in preferences:
            np.fill_diagonal(one, np.nan)
            one[-1, 1] = np.nan
        self.qrels = {query_id: {doc_id: 1} for query_id, doc_id in best.items()}
        self.data = TrainingSet(lists, self.texts.query_texts, scores, self.qrels, targets, preferences)

    def documents(self, device: torch.device) -> DocumentTower:
        if self.mode == "asymmetric":
            return FrozenDocuments(self.corpus, device)
        return LiveDocuments(self.student, self.texts, self.corpus, device)  # type: ignore[arg-type]

    def layer_teacher(self) -> LayerTeacher:
        return LayerTeacher(self.start, (1,), self.texts.query_texts, self.texts)  # type: ignore[arg-type]

    def run(
        self, folder: Path, losses: Any = LOSSES_OF_A_RECIPE, schedule: ScheduleSpec = SCHEDULE, **options: Any
    ) -> Mapping[str, Any]:
        pool = () if self.mode == "asymmetric" else tuple(self.corpus.ids)
        searched = None if pool else self.corpus
        dev = DevSet(self.texts.query_texts, self.qrels, self.texts, searched, pool)  # type: ignore[arg-type]
        return train(self.student, self.documents, self.data, dev, losses, schedule, 3, folder, **options)


def reranker(work: Job, rate: float = 1e-3, dropout: float = 0.1) -> JointReranker:
    """Return a fresh cross-encoder over the job's texts; with dropout its draws matter too."""
    from transformers import BertConfig, BertForSequenceClassification

    files = tiny_encoder().tokenizer_files
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1,
        initializer_range=0.3, pad_token_id=0, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        module = BertForSequenceClassification(config)
    tokenizer = PairTokenizer(Tokenizer.from_buffer(files["tokenizer.json"]), module, 32)
    return JointReranker(module, tokenizer, work.texts.query_texts, work.texts, rate)  # type: ignore[arg-type]


def matrix(work: Job, scale: float = 10.0) -> Callable[[Sequence[str], Sequence[str]], Tensor]:
    """Return a late-interaction teacher whose scores are the encoder's, made longer."""
    targets = {item.query_id: row for item, row in zip(work.data.lists, work.data.query_targets, strict=True)}

    def score(query_ids: Sequence[str], doc_ids: Sequence[str]) -> Tensor:
        documents = work.corpus.vectors[[work.corpus.row_of[doc_id] for doc_id in doc_ids]]
        queries = np.stack([targets[query_id] for query_id in query_ids])
        return torch.from_numpy(scale * queries @ documents.T)

    return score


def extra_texts(work: Job) -> ExtraTexts:
    """Return ten texts, four a step, that embedding losses read beside the queries."""
    texts = {f"x/{i}": f"w{i} w{i + 1}" for i in range(10)}
    return ExtraTexts(texts, work.start.encode(list(texts.values()), "query"), 4)


def job(folder: Path, mode: str = "asymmetric", dropout: float = 0.0, **options: Any) -> tuple[TorchEncoder, Any]:
    """Train and return the student and the run's summary."""
    work = Job(mode, dropout)
    return work.student, work.run(folder, **options)


def every_loss(folder: Path, mode: str, **options: Any) -> tuple[TorchEncoder, Any]:
    """Train with all losses of the registry at once, with dropout and two Matryoshka sizes."""
    work = Job(mode, dropout=0.2, sizes=(8,))
    return work.student, work.run(folder, EVERY_LOSS, layer_teacher=work.layer_teacher(), **options)


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def stopping_after(steps: int, stop: Callable[[], None] = _interrupt) -> Iterator[None]:
    """Stop a run within the block as it begins the step after ``steps``."""
    step, begun = _Run.step, 0

    def stopped(*arguments: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun > steps:
            stop()
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(_Run, "step", stopped)
        yield
    assert begun == steps + 1


def events(folder: Path, event: str = "train") -> list[dict[str, Any]]:
    """Return the log's rows of one event."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def curve(folder: Path) -> list[tuple[int, str, float]]:
    """Return what must be equal in two runs of one recipe; speeds are not."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["event"], row.get("nDCG@10", row.get("loss"))) for row in rows]


ROWS = np.arange(12)
Outcome = tuple[float, dict[str, torch.Tensor]]


def one_step(
    losses: Sequence[LossSpec],
    mode: str = "symmetric",
    dropout: float = 0.0,
    double: bool = True,
    sizes: Sequence[int] = (8,),
    joint: bool = False,
    extra: bool = False,
    **schedule: Any,
) -> Outcome:
    """Return the loss and all gradients of one step of a run that has moved since it began."""
    job = Job(mode, dropout, sizes=sizes)
    trained_along = reranker(job, dropout=dropout) if joint else None
    texts = extra_texts(job) if extra else None
    job.data = replace(job.data, maxsim=matrix(job), extra=texts)
    if double:
        job.student.double()
        job.start.double()
        if trained_along is not None:
            trained_along.module.double()
    run = _Run(
        Machine(schedule.get("precision", "fp32")),
        job.student,
        job.documents,
        job.data,
        losses,
        replace(SCHEDULE, **{"clip": 1e9, "micro_tokens": 48, **schedule}),
        job.layer_teacher(),
        trained_along,
    )
    # Where nothing was learnt yet nothing can be forgotten, and the term that holds on to it has no gradient.
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in job.student.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=draw))
    gradients: dict[str, torch.Tensor] = {}
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            {n: p.grad.clone() for n, p in run.trained.named_parameters() if p.grad is not None}
        )
    )
    torch.manual_seed(1)
    return run.step(ROWS, None if texts is None else texts.positions(1, 0), 1.0, 0.5, "step")["loss"], gradients


def assert_equal(one: Outcome, other: Outcome, within: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=within)
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).abs().max() <= within * max(1.0, float(gradient.abs().max())), name


@dataclass(frozen=True)
class Case:
    """One step that must not depend on how many processes share it, nor on caching."""

    label: str
    losses: tuple[LossSpec, ...]
    mode: str
    joint: bool = False
    extra: bool = False
    sizes: tuple[int, ...] = ()
    cached: bool = False

    def step(self, **schedule: Any) -> Outcome:
        """Return the loss and all gradients."""
        how = {"sizes": self.sizes, "joint": self.joint, "extra": self.extra, "gradient_cache": self.cached}
        return one_step(self.losses, self.mode, **{**how, **schedule})


LATE_INTERACTION = tuple(LossSpec(name, teacher="late_interaction") for name in ("tct", "listwise_kl"))


def kinds() -> Iterator[Case]:
    """Yield all losses, a late-interaction teacher, and each pair of losses that a shipped recipe combines."""
    found = {
        "every loss": Case("every loss", EVERY_LOSS, "", extra=True),
        "late interaction": Case("late interaction", LATE_INTERACTION, ""),
    }
    for name in shipped_recipes():
        for stage in load_recipe(name).training:
            joint, extra = stage.joint is not None, bool(stage.extra_texts.batch)
            for pair in itertools.combinations(stage.losses, min(2, len(stage.losses))):
                label = " + ".join(spec.name for spec in pair) + ", joint" * joint + ", extra texts" * extra
                found.setdefault(label, Case(label, pair, "", joint, extra))
    yield from found.values()


def cases() -> Iterator[Case]:
    """Yield each kind bare and fully wrapped, and all losses in every way."""
    for kind, mode, sizes, cached in itertools.product(
        kinds(), ("symmetric", "asymmetric"), ((), (8, 4)), (False, True)
    ):
        if kind.losses is EVERY_LOSS or cached == bool(sizes):
            label = f"{kind.label}, {mode}, sizes {sizes}, cached {cached}"
            yield replace(kind, label=label, mode=mode, sizes=sizes, cached=cached)
