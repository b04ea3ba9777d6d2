"""``rkd teach``: an encoder becomes a cross-encoder by learning to pick the positive out of a list.

The loss is the listwise softmax cross-entropy of RankT5 (arXiv:2210.10634, eq. 5) with one positive:
``-log( exp s+ / (exp s+ + sum exp s-) )``, averaged over the lists of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor, nn
from torch.nn import functional as F

from retrieval_kd.artifacts import Artifact, Spec, build, file_sha256, fingerprint
from retrieval_kd.batching import length_sorted_batches
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.base import load_tokenizer
from retrieval_kd.encoders.layout import MODULES, read_layout
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.encoders.torch_encoder import BATCH_TOKENS, WEIGHTS, quiet_transformers
from retrieval_kd.errors import ArtifactError, DataError, RecipeError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.progress import progress
from retrieval_kd.recipes.schema import FineTuneSpec, ScheduleSpec
from retrieval_kd.teachers.cross_encoder import save_classifier
from retrieval_kd.teachers.pairs import PairTokenizer, logits
from retrieval_kd.training.batches import epoch_batches
from retrieval_kd.training.checkpoint import load_checkpoint, save_checkpoint
from retrieval_kd.training.metrics import MetricsLog
from retrieval_kd.training.schedule import learning_rate

STAGE = "teach"
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_STEPS = 20
# Tokens whose activations are kept for one backward pass; a step's lists are spread over as many as it takes.
_GRAPH_TOKENS = 8192
_WEIGHT_DECAY = 0.01
_CLIP = 1.0
_HEADS = ("classifier.", "score.", "pre_classifier.", "pooler.", "head.")


def fine_tune_cross_encoder(
    collection: Collection,
    lists: Sequence[CandidateList],
    spec: FineTuneSpec,
    max_length: int,
    seed: int,
    folder: Path,
) -> Artifact:
    """Train a cross-encoder on mined lists; the folder opens with :class:`CrossEncoder` and transformers.

    Each list gives its first positive and its first ``spec.negatives`` negatives. A killed run goes on
    from its last checkpoint and gives, on a CPU, the same weights to the bit.

    Args:
        collection: Where texts are looked up.
        lists: The candidates; at most ``spec.queries`` of them are used (all when 0).
        spec: Where to start and how long.
        max_length: Longest pair in tokens.
        seed: Seed of the new head, the batch order and dropout.
        folder: Where the model goes: config.json, model.safetensors, tokenizer.json, metrics.jsonl.

    Raises:
        DataError: no lists, an id the collection does not have, or a loss that is not finite.
        RecipeError: there is no such encoder, or it has fewer positions than ``max_length``.
        ArtifactError: the encoder cannot be read.
    """
    used = lists[: spec.queries or None]
    if not used:
        raise DataError("no lists to fine-tune on; mine candidates for the training queries first")
    start = _body_folder(spec.start)
    identity = Spec(
        STAGE,
        config={"fine_tune": asdict(spec), "max_length": max_length},
        inputs={
            "start": file_sha256(start / WEIGHTS),
            "collection": collection.fingerprint,
            "lists": fingerprint([asdict(item) for item in used]),
        },
        seed=seed,
    )

    def work(target: Path) -> Mapping[str, Any]:
        tokenizer = load_tokenizer(start)
        model = _new_cross_encoder(start, max_length, seed)
        pairs = _PairLists(collection, used, spec.negatives, PairTokenizer(tokenizer, model, max_length))
        summary = _train(model, pairs, spec, seed, target)
        save_classifier(model, start, target)
        (target / CHECKPOINT).unlink(missing_ok=True)
        return summary

    return build(folder, identity, work)


class _PairLists:
    """The token rows of each list, its positive first."""

    def __init__(
        self, collection: Collection, lists: Sequence[CandidateList], negatives: int, tokenizer: PairTokenizer
    ) -> None:
        self.tokenizer = tokenizer
        self._collection = collection
        self._queries = collection.queries()
        self._ids = [(item.query_id, _positive_first(item, negatives)) for item in lists]
        for query_id, _ in self._ids:
            if query_id not in self._queries:
                raise DataError(f"{collection.name}: no query {query_id!r}; mine the lists from this collection")

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, positions: Iterable[int]) -> list[list[Encoding]]:
        chosen = [self._ids[i] for i in positions]
        texts = self._collection.contents(dict.fromkeys(doc_id for _, doc_ids in chosen for doc_id in doc_ids))
        flat = iter(self.tokenizer([(self._queries[q], texts[doc_id]) for q, doc_ids in chosen for doc_id in doc_ids]))
        return [[next(flat) for _ in doc_ids] for _, doc_ids in chosen]


def listwise_loss(scores: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the summed softmax cross-entropy of lists whose first score is the positive's.

    Args:
        scores: ``[sum(lengths)]``, the lists one after another.
        lengths: Documents of each list.
    """
    padded = nn.utils.rnn.pad_sequence(
        list(torch.split(scores, list(lengths))), batch_first=True, padding_value=-math.inf
    )
    return F.cross_entropy(padded, torch.zeros(len(lengths), dtype=torch.long, device=scores.device), reduction="sum")


def _train(model: nn.Module, lists: _PairLists, spec: FineTuneSpec, seed: int, folder: Path) -> Mapping[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=_WEIGHT_DECAY, fused=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    schedule = ScheduleSpec(learning_rate=spec.learning_rate, warmup=spec.warmup)
    batches = [
        positions
        for epoch in range(spec.epochs)
        for positions in epoch_batches(len(lists), spec.batch_queries, seed, epoch)
    ]
    done = 0
    resumed = (folder / CHECKPOINT).is_file()
    if resumed:
        done = load_checkpoint(folder / CHECKPOINT, model, optimizer.optimizer)["step"]
    model.train()
    with (
        MetricsLog(folder, done if resumed else None) as log,
        progress("fine-tune the cross-encoder", len(batches) * spec.batch_queries, "lists") as advance,
    ):
        advance(done * spec.batch_queries)
        for step in range(done, len(batches)):
            started = time.perf_counter()
            # Dropout draws from torch's global generator, so a resumed run must find it where it was.
            torch.manual_seed(int(np.random.default_rng([seed, step]).integers(2**63)))
            rate = learning_rate(step, len(batches), schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = lists.rows(batches[step])
            loss = 0.0
            for part in _parts(rows):
                flat = [row for pairs in part for row in pairs]
                scores = logits(wrapped, lists.tokenizer, flat, BATCH_TOKENS, accelerator.device)
                # The loss is a mean over lists, so the gradients of its parts add up to its own.
                part_loss = listwise_loss(scores, [len(pairs) for pairs in part]) / len(rows)
                accelerator.backward(part_loss)
                loss += part_loss.item()
            if not math.isfinite(loss):
                raise DataError(f"step {step + 1}: loss is {loss}; lower teacher.fine_tune.learning_rate")
            norm = accelerator.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            pairs_per_second = sum(len(pairs) for pairs in rows) / (time.perf_counter() - started)
            values = {"loss": loss, "learning_rate": rate, "gradient_norm": float(norm)}
            log.write("teach", step + 1, {**values, "pairs_per_second": pairs_per_second})
            if (step + 1) % CHECKPOINT_STEPS == 0:
                save_checkpoint(folder / CHECKPOINT, model, optimizer.optimizer, {"step": step + 1})
            advance(len(rows))
    return {"steps": len(batches), "lists": len(lists)}


def _parts(rows: Sequence[list[Encoding]]) -> Iterator[list[list[Encoding]]]:
    """Split a step's lists into parts whose activations fit in memory together; a list is never cut."""
    sizes = [sum(len(row.ids) for row in pairs) for pairs in rows]
    for positions in length_sorted_batches(sizes, _GRAPH_TOKENS):
        yield [rows[i] for i in positions]


def _positive_first(item: CandidateList, negatives: int) -> tuple[str, ...]:
    others = [doc_id for doc_id, label in zip(item.doc_ids, item.labels, strict=True) if label <= 0]
    return (item.doc_ids[0], *others[:negatives])


def _body_folder(name: str) -> Path:
    folder = resolve_model(name)
    return read_layout(folder).body if (folder / MODULES).is_file() else folder


def _new_cross_encoder(folder: Path, max_length: int, seed: int) -> nn.Module:
    """Read an encoder's body and put a head with one label on it, drawn from ``seed``."""
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    try:
        with quiet_transformers():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{folder}: cannot read the encoder ({reason}); save the model again") from None
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise RecipeError(f"teacher.max_length: {max_length} is more than the {positions} positions of {str(folder)!r}")
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(report["missing_keys"]):
        if not any(head in name for head in _HEADS):
            raise ArtifactError(f"{folder / WEIGHTS}: weight {name!r} is missing; save the model again")
        weight = model.get_parameter(name)
        with torch.no_grad():
            if weight.ndim > 1:
                weight.normal_(0.0, getattr(model.config, "initializer_range", 0.02), generator=generator)
            else:
                weight.zero_()
    return cast("nn.Module", model)
