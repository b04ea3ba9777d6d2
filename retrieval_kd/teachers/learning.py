"""One training run of a ranker that reads texts together; what it learns is a lesson."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from retrieval_kd.batching import length_sorted_batches
from retrieval_kd.collections.base import Collection
from retrieval_kd.errors import DataError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.progress import progress
from retrieval_kd.recipes.schema import CompressionStage, FineTuneSpec, ScheduleSpec
from retrieval_kd.teachers.rows import TokenRow
from retrieval_kd.training.batches import epoch_batches
from retrieval_kd.training.checkpoint import load_checkpoint, save_checkpoint
from retrieval_kd.training.metrics import MetricsLog, agreement
from retrieval_kd.training.schedule import learning_rate

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_STEPS = 20
# Tokens whose activations are kept for one backward pass; a step's lists are spread over as many as it takes.
_GRAPH_TOKENS = 8192
_WEIGHT_DECAY = 0.01
_CLIP = 1.0


class Lesson(Protocol):
    """What a ranker learns from a list."""

    dropout: bool
    """Whether the ranker's dropout is on while it learns."""

    def __len__(self) -> int:
        """Return the number of lists."""

    def rows(self, positions: Iterable[int]) -> list[Sequence[TokenRow]]:
        """Return the token rows of each list."""

    def loss(
        self, model: Callable[..., Any], rows: Sequence[Sequence[TokenRow]], device: torch.device
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss summed over these lists, and each list's scores ``[2, L]``: the ranker's, and its teacher's.

        No scores where no teacher gives any.
        """


class ListTexts:
    """The texts of lists: each query with its positive first, then its negatives."""

    def __init__(self, collection: Collection, lists: Sequence[CandidateList], negatives: int) -> None:
        """Take each list's first positive and its first ``negatives`` negatives.

        Raises:
            DataError: there is no list, or a query that the collection does not have.
        """
        if not lists:
            raise DataError("no lists to learn from; mine candidates for the training queries first")
        self._collection = collection
        self._queries = collection.queries()
        self._ids = [(item.query_id, _positive_first(item, negatives)) for item in lists]
        for query_id, _ in self._ids:
            if query_id not in self._queries:
                raise DataError(f"{collection.name}: no query {query_id!r}; mine the lists from this collection")

    def __len__(self) -> int:
        """Return the number of lists."""
        return len(self._ids)

    def __call__(self, positions: Iterable[int]) -> Iterator[tuple[str, list[str]]]:
        """Yield the texts of each list: query, documents."""
        chosen = [self._ids[i] for i in positions]
        texts = self._collection.contents(dict.fromkeys(doc_id for _, doc_ids in chosen for doc_id in doc_ids))
        return ((self._queries[query_id], [texts[doc_id] for doc_id in doc_ids]) for query_id, doc_ids in chosen)


def learn(
    model: nn.Module, lesson: Lesson, spec: FineTuneSpec | CompressionStage, seed: int, folder: Path, label: str
) -> Mapping[str, Any]:
    """Train a ranker in place; a killed run goes on from its last checkpoint and gives, on a CPU, the same bits.

    Args:
        model: A sequence classifier.
        lesson: What it learns; the loss of a step is the mean over its lists.
        spec: How long and how fast.
        seed: Seed of the batch order and dropout.
        folder: Where checkpoints and metrics.jsonl go.
        label: What progress bar and log call it.

    Raises:
        DataError: a loss or gradient that is not finite, or an id the collection does not have.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=_WEIGHT_DECAY, fused=True)
    schedule = ScheduleSpec(learning_rate=spec.learning_rate, warmup=spec.warmup)
    batches = [
        positions
        for epoch in range(spec.epochs)
        for positions in epoch_batches(len(lesson), spec.batch_queries, seed, epoch)
    ]
    done = 0
    resumed = (folder / CHECKPOINT).is_file()
    if resumed:
        done = load_checkpoint(folder / CHECKPOINT, model, optimizer)["step"]
    model.train(lesson.dropout)
    with (
        MetricsLog(folder, done if resumed else None) as log,
        progress(label, len(batches) * spec.batch_queries, "lists") as advance,
    ):
        advance(done * spec.batch_queries)
        for step in range(done, len(batches)):
            started = time.perf_counter()
            # Dropout draws from torch's global generator, so a resumed run must find it where it was.
            torch.manual_seed(int(np.random.default_rng([seed, step]).integers(2**63)))
            rate = learning_rate(step, len(batches), schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = lesson.rows(batches[step])
            loss, compared = 0.0, []
            for part in _parts(rows):
                summed, scores = lesson.loss(model, part, device)
                # The loss is a mean over lists, so the gradients of its parts add up to its own.
                part_loss = summed / len(rows)
                torch.autograd.backward(part_loss)
                loss += part_loss.item()
                compared += scores
            if not math.isfinite(loss):
                raise DataError(f"step {step + 1} of {label}: loss is {loss}; lower its learning_rate")
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), _CLIP))
            if not math.isfinite(norm):
                raise DataError(f"step {step + 1} of {label}: gradient norm is {norm}; lower its learning_rate")
            optimizer.step()
            optimizer.zero_grad()
            rows_per_second = sum(map(len, rows)) / (time.perf_counter() - started)
            values = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, **_agreement(compared)}
            log.write("teach", step + 1, {**values, "pairs_per_second": rows_per_second})
            if (step + 1) % CHECKPOINT_STEPS == 0:
                save_checkpoint(folder / CHECKPOINT, model, optimizer, {"step": step + 1})
            advance(len(rows))
    model.eval()
    return {"steps": len(batches), "lists": len(lesson)}


def _agreement(lists: Sequence[Tensor]) -> dict[str, float | None]:
    """Return how far the ranker ranks its lists as its teacher does; nothing where it has none.

    Args:
        lists: For each ``[2, L]``, the ranker's scores and its teacher's.
    """
    if not lists:
        return {}
    padded = nn.utils.rnn.pad_sequence([scores.T for scores in lists], batch_first=True)
    lengths = torch.tensor([scores.shape[1] for scores in lists], device=padded.device)
    mask = torch.arange(padded.shape[1], device=padded.device) < lengths.unsqueeze(1)
    return agreement(padded[..., 0], padded[..., 1], mask)


def _parts(rows: Sequence[Sequence[TokenRow]]) -> Iterator[list[Sequence[TokenRow]]]:
    """Split a step's lists into parts whose activations fit in memory together; a list is never cut."""
    sizes = [sum(len(row.ids) for row in inputs) for inputs in rows]
    for positions in length_sorted_batches(sizes, _GRAPH_TOKENS):
        yield [rows[i] for i in positions]


def _positive_first(item: CandidateList, negatives: int) -> tuple[str, ...]:
    others = [doc_id for doc_id, label in zip(item.doc_ids, item.labels, strict=True) if label <= 0]
    return (item.doc_ids[0], *others[:negatives])
