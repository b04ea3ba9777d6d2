"""A training run in a second, in every mode and with every loss."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WORDS, tiny_encoder
from tokenizers import Tokenizer

from retrieval_kd.collections.base import Document
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.losses.registry import LOSSES
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.loader import load_recipe, shipped_recipes
from retrieval_kd.recipes.schema import LossSpec, ScheduleSpec, StudentSpec
from retrieval_kd.students.build import build_student
from retrieval_kd.teachers.pairs import PairTokenizer
from retrieval_kd.training.batches import TrainingSet
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
    **schedule: Any,
) -> Outcome:
    """Return the loss and all gradients of one step of a fresh run."""
    job = Job(mode, dropout, sizes=sizes)
    if double:
        job.student.double()
        job.start.double()
    run = _Run(
        Machine(schedule.get("precision", "fp32")),
        job.student,
        job.documents,
        job.data,
        losses,
        replace(SCHEDULE, **{"clip": 1e9, "micro_tokens": 48, **schedule}),
        job.layer_teacher(),
        None,
    )
    gradients: dict[str, torch.Tensor] = {}
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            {n: p.grad.clone() for n, p in run.trained.named_parameters() if p.grad is not None}
        )
    )
    torch.manual_seed(1)
    return run.step(ROWS, None, 1.0, 0.5, "step")["loss"], gradients


def assert_equal(one: Outcome, other: Outcome, within: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=within)
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).abs().max() <= within * max(1.0, float(gradient.abs().max())), name


Case = tuple[str, tuple[LossSpec, ...], str, tuple[int, ...], bool]


def cases() -> Iterator[Case]:
    """Yield each pair of losses that a shipped recipe combines, bare and fully wrapped; all losses in every way."""
    pairs: dict[str, tuple[LossSpec, ...]] = {"every loss": EVERY_LOSS}
    for name in shipped_recipes():
        for stage in load_recipe(name).training:
            for pair in itertools.combinations(stage.losses, min(2, len(stage.losses))):
                pairs.setdefault(" + ".join(spec.name for spec in pair), pair)
    for (label, losses), mode, sizes, cached in itertools.product(
        pairs.items(), ("symmetric", "asymmetric"), ((), (8, 4)), (False, True)
    ):
        if losses is not EVERY_LOSS and cached != bool(sizes):
            continue
        yield f"{label}, {mode}, sizes {sizes}, cached {cached}", losses, mode, sizes, cached
