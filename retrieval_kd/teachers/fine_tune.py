"""``rkd teach``: an encoder becomes a ranker that reads texts together, by learning to tell positives from negatives.

A cross-encoder learns the listwise softmax cross-entropy of RankT5 (arXiv 2210.10634, eq. 5) with one positive,
``-log( exp s+ / (exp s+ + sum exp s-) )``, averaged over the lists of a step. A pairwise ranker learns, as duoBERT
(arXiv 1910.14424), the binary cross-entropy of which document of a pair is the positive, in both orders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrieval_kd.artifacts import Artifact, Spec, build, file_sha256, fingerprint
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.base import load_tokenizer
from retrieval_kd.encoders.layout import body_folder
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.encoders.torch_encoder import BATCH_TOKENS, WEIGHTS, quiet_transformers
from retrieval_kd.errors import ArtifactError, RecipeError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.schema import FineTuneSpec
from retrieval_kd.teachers.cross_encoder import save_classifier
from retrieval_kd.teachers.learning import CHECKPOINT, ListTexts, learn
from retrieval_kd.teachers.pairs import PairTokenizer, RowTokenizer, TripleTokenizer, logits
from retrieval_kd.teachers.rows import TokenRow

STAGE = "teach"
_HEADS = ("classifier.", "score.", "pre_classifier.", "pooler.", "head.")
Kind = Literal["cross_encoder", "pairwise"]


def fine_tune_ranker(
    kind: Kind,
    collection: Collection,
    lists: Sequence[CandidateList],
    spec: FineTuneSpec,
    max_length: int,
    seed: int,
    folder: Path,
    template: str = "",
) -> Artifact:
    """Train a ranker on mined lists; the folder opens with :class:`CrossEncoder` or its pairwise kin and transformers.

    Each list gives its first positive and its first ``spec.negatives`` negatives. A killed run goes on
    from its last checkpoint and gives, on a CPU, the same weights to the bit.

    Args:
        kind: What it will read: a query and one document, or two.
        collection: Where texts are looked up.
        lists: The candidates; at most ``spec.queries`` of them are used (all when 0).
        spec: Where to start and how long.
        max_length: Longest input in tokens.
        seed: Seed of the new head, the batch order and dropout.
        folder: Where the model goes: config.json, model.safetensors, tokenizer.json, metrics.jsonl.
        template: The prompt it will be used with; the tokenizer's own layout when empty.

    Raises:
        DataError: no lists, an id the collection does not have, or a loss or gradient that is not finite.
        RecipeError: there is no such encoder, or it has fewer positions than ``max_length``.
        ArtifactError: the encoder cannot be read.
    """
    used = lists[: spec.queries or None]
    texts = ListTexts(collection, used, spec.negatives)
    start = body_folder(resolve_model(spec.start))
    identity = Spec(
        STAGE,
        config={"kind": kind, "fine_tune": asdict(spec), "max_length": max_length, "template": template},
        inputs={
            "start": file_sha256(start / WEIGHTS),
            "collection": collection.fingerprint,
            "lists": fingerprint([asdict(item) for item in used]),
        },
        seed=seed,
    )

    def work(target: Path) -> Mapping[str, Any]:
        model = _new_ranker(start, max_length, seed)
        lesson: ListwiseLesson | PairwiseLesson
        if kind == "cross_encoder":
            lesson = ListwiseLesson(texts, PairTokenizer(load_tokenizer(start), model, max_length, template))
        else:
            lesson = PairwiseLesson(texts, TripleTokenizer(load_tokenizer(start), model, max_length, template))
        summary = learn(model, lesson, spec, seed, target, f"fine-tune the {kind.replace('_', '-')} teacher")
        save_classifier(model, start, target)
        (target / CHECKPOINT).unlink(missing_ok=True)
        return summary

    return build(folder, identity, work)


class ListwiseLesson:
    """Pick the positive out of its list."""

    dropout = True

    def __init__(self, texts: ListTexts, tokenizer: RowTokenizer) -> None:
        """Read each list's pairs, its positive's first."""
        self._texts = texts
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        """Return the number of lists."""
        return len(self._texts)

    def rows(self, positions: Iterable[int]) -> list[Sequence[TokenRow]]:
        """Return each list's pairs."""
        lists = [[(query, document) for document in documents] for query, documents in self._texts(positions)]
        return tokenized(self._tokenizer, lists)

    def loss(
        self, model: Callable[..., Any], rows: Sequence[Sequence[TokenRow]], device: torch.device
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the listwise loss; judgements teach, and no scores."""
        scores = logits(model, self._tokenizer, list(itertools.chain(*rows)), BATCH_TOKENS, device)
        return listwise_loss(scores, [len(pairs) for pairs in rows]), []


class PairwiseLesson:
    """Tell which document of each (positive, negative) pair is the positive, whichever is read first."""

    dropout = True

    def __init__(self, texts: ListTexts, tokenizer: RowTokenizer) -> None:
        """Read each list's triples: positive first and negative first in turns."""
        self._texts = texts
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        """Return the number of lists."""
        return len(self._texts)

    def rows(self, positions: Iterable[int]) -> list[Sequence[TokenRow]]:
        """Return each list's triples."""
        lists = [
            [triple for negative in negatives for triple in ((query, positive, negative), (query, negative, positive))]
            for query, (positive, *negatives) in self._texts(positions)
        ]
        return tokenized(self._tokenizer, lists)

    def loss(
        self, model: Callable[..., Any], rows: Sequence[Sequence[TokenRow]], device: torch.device
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the pairwise loss; judgements teach, and no scores."""
        scores = logits(model, self._tokenizer, list(itertools.chain(*rows)), BATCH_TOKENS, device)
        return pairwise_loss(scores, [len(triples) for triples in rows]), []


def tokenized(tokenizer: RowTokenizer, lists: Sequence[Sequence[tuple[str, ...]]]) -> list[Sequence[TokenRow]]:
    """Return the token rows of each list's inputs; they are tokenized together."""
    flat = iter(tokenizer(list(itertools.chain(*lists))))
    return [list(itertools.islice(flat, len(inputs))) for inputs in lists]


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


def pairwise_loss(scores: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the binary cross-entropy of each list's comparisons, averaged within a list and summed over lists.

    Args:
        scores: ``[sum(lengths)]``, logits of "the first is the positive", which it is in every other one.
        lengths: Comparisons of each list, an even number.
    """
    positive_first = (torch.arange(len(scores), device=scores.device) + 1).remainder(2).to(scores.dtype)
    losses = F.binary_cross_entropy_with_logits(scores, positive_first, reduction="none")
    return torch.stack([part.mean() for part in torch.split(losses, list(lengths))]).sum()


def _new_ranker(folder: Path, max_length: int, seed: int) -> nn.Module:
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
