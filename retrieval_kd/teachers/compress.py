"""``rkd teach``: a cross-encoder becomes a smaller one, by some of its layers learning what all of them know.

After "Understanding BERT Rankers Under Distillation" (Gao, Dai and Callan 2020, arXiv 2007.11088): first the
representation, then the ranking; the order is the recipe's, so that the shorter ways the paper compares can be run too.
The representation stage regresses hidden states only, on the (query, document) pairs the teacher ranks; the paper's
(TinyBERT's) regresses attentions too, on general text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from retrieval_kd.artifacts import Artifact, Spec, build, file_sha256, fingerprint
from retrieval_kd.batching import length_sorted_batches
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.base import load_tokenizer
from retrieval_kd.encoders.torch_encoder import BATCH_TOKENS
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.schema import CompressSpec
from retrieval_kd.students.build import keep_layers
from retrieval_kd.teachers.cross_encoder import load_classifier, save_classifier
from retrieval_kd.teachers.fine_tune import tokenized
from retrieval_kd.teachers.learning import CHECKPOINT, ListTexts, learn
from retrieval_kd.teachers.pairs import PairTokenizer, one_score
from retrieval_kd.teachers.rows import TokenRow

STAGE = "compress"


def compress_stage(
    collection: Collection,
    lists: Sequence[CandidateList],
    larger: Path,
    spec: CompressSpec,
    number: int,
    max_length: int,
    seed: int,
    folder: Path,
    template: str = "",
    start: Path | None = None,
) -> Artifact:
    """Run one stage of making a cross-encoder smaller; the folder opens as :func:`fine_tune_ranker`'s does.

    A killed run goes on from its last checkpoint and gives, on a CPU, the same weights to the bit.

    Args:
        collection: Where texts are looked up.
        lists: The candidates; at most ``spec.queries`` of them are used (all when 0).
        larger: The cross-encoder that teaches.
        spec: Which layers are kept, and the stages.
        number: Which of ``spec.stages``, from 0.
        max_length: Longest pair in tokens.
        seed: Seed of the batch order.
        folder: Where the smaller model goes.
        template: The prompt of the larger model; the tokenizer's own pair when empty.
        start: The smaller model as the stage before left it; cut from the larger one when None.

    Raises:
        DataError: no lists, an id the collection does not have, or a loss or gradient that is not finite.
        RecipeError: a layer that the larger model does not have.
        ArtifactError: a model cannot be read.
    """
    stage = spec.stages[number]
    used = lists[: spec.queries or None]
    texts = ListTexts(collection, used, spec.negatives)
    identity = Spec(
        STAGE,
        config={
            "layers": spec.layers,
            "negatives": spec.negatives,
            "stage": asdict(stage),
            "max_length": max_length,
            "template": template,
        },
        inputs={
            "larger": model_hash(larger),
            "start": model_hash(start) if start else "",
            "collection": collection.fingerprint,
            "lists": fingerprint([asdict(item) for item in used]),
        },
        seed=seed,
    )

    def work(target: Path) -> Mapping[str, Any]:
        teacher = load_classifier(larger)
        smaller = load_classifier(start) if start else cut_layers(load_classifier(larger), spec.layers)
        tokenizer = PairTokenizer(load_tokenizer(larger), smaller, max_length, template)
        lesson = RegressionLesson(texts, tokenizer, teacher, stage.target, spec.layers)
        summary = learn(smaller, lesson, stage, seed, target, f"make the cross-encoder smaller, {stage.target}")
        save_classifier(smaller, larger, target)
        (target / CHECKPOINT).unlink(missing_ok=True)
        return summary

    return build(folder, identity, work)


def cut_layers(model: Any, layers: tuple[int, ...]) -> Any:
    """Keep some of a classifier's layers, in place, and its embeddings and head.

    Raises:
        RecipeError: a layer that it does not have.
    """
    keep_layers(model.base_model, layers, "teacher.compress.layers")
    model.config.num_hidden_layers = len(layers)
    return model


class RegressionLesson:
    """Reproduce a larger classifier: its hidden states, or its score."""

    # The larger model's answer is exact; the noise of dropout would only be regressed away.
    dropout = False

    def __init__(
        self,
        texts: ListTexts,
        tokenizer: PairTokenizer,
        larger: nn.Module,
        target: Literal["hidden", "logits"],
        layers: tuple[int, ...],
    ) -> None:
        """Learn from ``larger``, whose ``layers`` are those of the smaller model in order."""
        self._texts = texts
        self._tokenizer = tokenizer
        self._larger = larger.eval()
        self._target = target
        # State 0 is what the embeddings give, state n what layer n - 1 does.
        self._states = (0, *(layer + 1 for layer in layers))

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
        """Return the mean squared error of each list's pairs, summed over lists, and both models' scores of each."""
        flat = list(itertools.chain(*rows))
        self._larger.to(device)
        parts, order = [], []
        for positions in length_sorted_batches([len(row.ids) for row in flat], BATCH_TOKENS):
            inputs = self._tokenizer.batch([flat[i] for i in positions], device)
            parts.append(self._errors(model, inputs))
            order.append(positions)
        told = torch.cat(parts, dim=1)[:, torch.from_numpy(np.argsort(np.concatenate(order))).to(device)]
        lists = torch.split(told, [len(pairs) for pairs in rows], dim=1)
        return torch.stack([one[0].mean() for one in lists]).sum(), [one[1:].detach() for one in lists]

    def _errors(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return of each pair the squared error, the smaller model's score and the larger one's, ``[3, B]``."""
        hidden = self._target == "hidden"
        ours = model(**inputs, output_hidden_states=hidden)
        with torch.no_grad():
            theirs = self._larger(**inputs, output_hidden_states=hidden)
        score, wanted = one_score(ours.logits), one_score(theirs.logits)
        # Weights that no error reaches must get no gradient, not even of 0: they would decay.
        told = score.detach(), wanted
        if not hidden:
            return torch.stack([(score - wanted).square(), *told])
        mask = inputs["attention_mask"].to(ours.logits.dtype)
        differences = [
            (mine - theirs.hidden_states[number]).square().mean(dim=2)
            for mine, number in zip(ours.hidden_states, self._states, strict=True)
        ]
        errors = (torch.stack(differences).mean(dim=0) * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.stack([errors, *told])


def model_hash(folder: Path) -> str:
    """Return the sha256 over a model's weights and configuration."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return fingerprint({path.name: file_sha256(path) for path in files})
