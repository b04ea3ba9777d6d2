"""Rankers that read texts together: the cross-encoder, a query and a document; the pairwise ranker, two documents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import nn

from retrieval_kd.artifacts import atomic_write, file_sha256, fingerprint
from retrieval_kd.encoders.base import TOKENIZER, load_tokenizer
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.encoders.torch_encoder import BATCH_TOKENS, WEIGHTS, quiet_transformers
from retrieval_kd.errors import ArtifactError, RecipeError
from retrieval_kd.runs import Scores
from retrieval_kd.scores.normalise import Activation, activate
from retrieval_kd.scores.store import ScoreSource
from retrieval_kd.teachers.onnx_classifier import OnnxClassifier
from retrieval_kd.teachers.pairs import PairTokenizer, RowTokenizer, TripleTokenizer, logits
from retrieval_kd.teachers.rows import TokenRow

# Tokens of this many pairs are in memory at a time, however many pairs there are.
_CHUNK = 4096
# A GPU needs larger batches than a CPU, whose caches the activations should not leave.
_BATCH_TOKENS = {"cpu": BATCH_TOKENS, "cuda": 32 * BATCH_TOKENS}
# Pairs on which a graph has to agree with torch, and how far their logits may be apart.
_CHECKED_PAIRS = 8
_LARGEST_DIFFERENCE = 1e-4

_log = logging.getLogger(__name__)


class TextRanker:
    """A sequence classifier with one label or two, in float32, giving raw logits; of two labels, their difference.

    Which texts it reads together is its kinds' own.

    No activation is applied, whatever the model's configuration names: whether a sigmoid follows has
    depended on the folder and the library's version (sentence-transformers#1546), and a sigmoid
    squashes the margins that a student learns from (sentence-transformers#3540). It is a named step of who reads
    the scores (:func:`retrieval_kd.scores.normalise.activate`).

    On a CPU the scores are those of the model's graph under onnxruntime, which is faster than torch and whose
    threads do not spin while they wait. The graph is made when first needed and has to agree with torch on the
    first inputs scored; otherwise a warning says so and torch scores.

    The score of an input does not depend on the inputs beside it beyond rounding in float32 (measured: below 1e-5).
    """

    _rows: type[RowTokenizer]

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: RowTokenizer,
        files: Mapping[str, str],
        max_length: int,
        template: str,
    ) -> None:
        """Use :meth:`load`."""
        self.name = name
        self.max_length = max_length
        self._template = template or self._rows.ROWS.LAYOUT
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()
        self._tokenizer = tokenizer
        self._files = dict(files)
        self._scorer: Callable[..., Any] | None = self._model if self._device.type == "cuda" else None

    @classmethod
    def load(cls, model: str, max_length: int, template: str = "", activation: Activation = "identity") -> Self:
        """Read a ranker.

        Args:
            model: A local folder or hub id, see :func:`retrieval_kd.encoders.resolve.resolve_model`.
            max_length: Longest input in tokens, special tokens included; the longest text is cut first.
            template: A prompt with a place for each text; the tokenizer's own layout when empty.
            activation: What will be made of the logits; a classifier of two labels needs ``logit_difference`` or
                ``sigmoid``.

        Raises:
            RecipeError: there is no such model, it has fewer positions than ``max_length``, the template leaves no
                room, or the activation does not fit the number of labels.
            ArtifactError: not a sequence classifier with one label or two, without its head, or without
                ``tokenizer.json``; names the folder.
        """
        folder = resolve_model(model)
        tokenizer = load_tokenizer(folder)
        classifier = load_classifier(folder)
        labels = classifier.config.num_labels
        if (labels == 2) != (activation == "logit_difference") and activation != "sigmoid":
            raise RecipeError(
                f"{folder}: a classifier of {labels} label{'s' if labels > 1 else ''} does not go with activation "
                f"{activation}; use {'logit_difference or sigmoid' if labels == 2 else 'identity or sigmoid'}"
            )
        positions = getattr(classifier.config, "max_position_embeddings", None)
        if positions is not None and max_length > positions:
            raise RecipeError(f"teacher.max_length: {max_length} is more than the {positions} positions of {model!r}")
        weights = sorted(folder.glob("*.safetensors"))
        files = {path.name: file_sha256(path) for path in [*weights, folder / "config.json", folder / TOKENIZER]}
        rows = cls._rows(tokenizer, classifier, max_length, template)
        return cls(Path(model).name, classifier, rows, files, max_length, template)

    @property
    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(weights.numel() for weights in self._model.parameters())

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over weights, configuration, tokenizer, template and length."""
        return fingerprint({"files": self._files, "template": self._template, "max_length": self.max_length})

    @property
    def source(self) -> ScoreSource:
        """Return what a score store's manifest says about this teacher."""
        weights = {name: sha for name, sha in self._files.items() if name.endswith(".safetensors")}
        config = cast("Any", self._model.config)
        reading = "logit" if config.num_labels == 1 else "logit_difference"
        return ScoreSource(self.name, fingerprint(weights), self._template, self.max_length, reading)

    def _score(self, inputs: Sequence[tuple[str, ...]], on_rows: Callable[[int], None] | None) -> Scores:
        scores = np.empty(len(inputs), dtype=np.float32)
        for start in range(0, len(inputs), _CHUNK):
            rows = self._tokenizer(inputs[start : start + _CHUNK])
            if self._scorer is None:
                self._scorer = self._cpu_scorer(rows[:_CHECKED_PAIRS])
            scores[start : start + len(rows)] = self._logits(self._scorer, rows, on_rows)
        return scores

    def _logits(
        self, scorer: Callable[..., Any], rows: Sequence[TokenRow], on_rows: Callable[[int], None] | None = None
    ) -> Scores:
        budget = _BATCH_TOKENS[self._device.type]
        with torch.inference_mode():
            return logits(scorer, self._tokenizer, rows, budget, self._device, on_rows).cpu().numpy()

    def _cpu_scorer(self, rows: Sequence[TokenRow]) -> Callable[..., Any]:
        """Return the model's graph if it agrees with the model on these rows, else the model."""
        try:
            graph = OnnxClassifier(self._model, list(self._tokenizer.batch(rows, self._device)))
            difference = float(np.abs(self._logits(graph, rows) - self._logits(self._model, rows)).max())
        except Exception as error:  # noqa: BLE001  the errors of exporter, optimizer and runtime share no base
            _log.warning("%s: scoring with torch; no ONNX graph: %s", self.name, " ".join(str(error).split()))
            return self._model
        if not difference <= _LARGEST_DIFFERENCE:
            _log.warning("%s: scoring with torch; the ONNX graph's logits differ by %.1e", self.name, difference)
            return self._model
        return graph


class CrossEncoder(TextRanker):
    """Query and document read together, one raw logit out."""

    _rows = PairTokenizer

    def score(self, pairs: Sequence[tuple[str, str]], on_rows: Callable[[int], None] | None = None) -> Scores:
        """Score (query, document) texts.

        Args:
            pairs: Any number of pairs; their tokens are made in chunks.
            on_rows: Called with the number of pairs each batch finished.

        Returns:
            Raw logits, float32 ``[len(pairs)]``, in the order of ``pairs``.
        """
        return self._score(pairs, on_rows)


class PairwiseRanker(TextRanker):
    """A query and two documents read together, out of which comes how likely the first is the more relevant.

    duoBERT (arXiv 1910.14424) and PairDistill's teacher (Huang and Chen 2024) are of this kind.
    """

    _rows = TripleTokenizer

    def preferences(
        self, triples: Sequence[tuple[str, str, str]], on_rows: Callable[[int], None] | None = None
    ) -> Scores:
        """Compare (query, first, second) texts.

        Args:
            triples: Any number of triples; their tokens are made in chunks.
            on_rows: Called with the number of triples each batch finished.

        Returns:
            The probability that the first document is more relevant than the second, float32 ``[len(triples)]``,
            in this order only: a model that prefers what it reads first says so here.
        """
        return activate(self._score(triples, on_rows), "sigmoid")


def load_classifier(folder: Path) -> Any:
    """Read a sequence classifier with one label or two, whole and in float32.

    Raises:
        ArtifactError: it is none, its head is missing, or it cannot be read; names the folder.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.num_labels not in (1, 2):
            raise ArtifactError(
                f"{folder}: gives {config.num_labels} numbers for a pair, a teacher one or two; use a cross-encoder "
                "with one label or two, or make one with teacher.fine_tune"
            )
        if getattr(config, "pad_token_id", None) is None:
            raise ArtifactError(f"{folder / 'config.json'}: no pad_token_id, so pairs cannot be batched; name it there")
        with quiet_transformers():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{folder}: cannot read the cross-encoder ({reason}); save the model again") from None
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would draw these at random and only mention it.
        raise ArtifactError(f"{folder}: weight {missing[0]!r} is missing; use a cross-encoder, or teacher.fine_tune")
    return model


def save_classifier(model: nn.Module, start: Path, folder: Path) -> None:
    """Write what :func:`load_classifier` and transformers open.

    Args:
        model: A sequence classifier.
        start: The folder its tokenizer is copied from.
        folder: Where it goes.
    """
    from safetensors.torch import save

    config = cast("Any", model.config)
    config.architectures = [type(model).__name__]
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    contents = {
        "config.json": config.to_json_string().encode(),
        TOKENIZER: (start / TOKENIZER).read_bytes(),
        WEIGHTS: save(weights, metadata={"format": "pt"}),
    }
    settings = start / "tokenizer_config.json"
    if settings.is_file():
        contents[settings.name] = settings.read_bytes()
    for name, content in contents.items():
        with atomic_write(folder / name, "wb") as file:
            file.write(content)
